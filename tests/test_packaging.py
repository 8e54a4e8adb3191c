"""What leaves this repository: the wheel, looked into, and the source distribution, built from."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with the source distribution, and the wheel built from it, without this checkout's help."""
    folder = tmp_path_factory.mktemp("distributions")
    environment = {"PATH": "/usr/bin:/bin:/usr/local/bin", "VMAMBA_NO_CUDA": "1"}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_the_wheel_holds_the_binary_the_configurations_and_no_sources(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "vmamba/_C.so" in names
    assert "vmamba/models/vmamba.py" in names
    assert "vmamba/weights/manifest.yaml" in names
    bundled = {name for name in names if name.startswith("vmamba/configs/classification/")}
    own = {f"vmamba/{path.relative_to(ROOT)}" for path in (ROOT / "configs" / "classification").glob("*.yaml")}
    assert bundled == own
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h", ".cuh")) or name.startswith("tests/")]


def test_the_wheel_is_for_every_python_of_this_platform(distributions):
    (wheel,) = distributions.glob("*.whl")
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert "any" not in wheel.name.split("-")[4]


def test_the_wheel_works_where_only_it_is(distributions, tmp_path):
    """Unpacked away from the checkout: the kernel runs, a bundled configuration is found, the command answers."""
    (wheel,) = distributions.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import torch, timm, vmamba, vmamba.ops; from vmamba.training.config import load\n"
        f"assert vmamba.__file__.startswith({str(tmp_path)!r}), vmamba.__file__\n"
        "assert vmamba.ops.backend_info()['cpu'].backend == 'kernel'\n"
        "assert timm.create_model('test_vmamba', num_classes=3)(torch.randn(1, 3, 64, 64)).shape == (1, 3)\n"
        "print(load('vmamba_tiny_s1l8').model)"
    )
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "vmamba_tiny_s1l8"


def test_the_source_distribution_holds_what_a_build_needs(distributions):
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    suffixes = (".cpp", ".h", ".cu", ".cuh")
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes}
    assert sources <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "vmamba/weights/manifest.yaml"} <= names
    assert not [name for name in names if name.endswith(".so")]
