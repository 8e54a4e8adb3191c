"""The compiled library: what it is made of, every instruction set, and what happens without it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vmamba
from vmamba.ops import backend_info
from vmamba.ops.extension import has_kernel, library_path

ROOT = Path(__file__).resolve().parents[2]
AGREE = """
import torch
from tests.ops.scan_cases import CASES, relative_error, results_and_gradients
for case in CASES:
    want = results_and_gradients(case, case.inputs(), backend="reference", out_dtype=torch.float64)
    got = results_and_gradients(case, {k: x.float() for k, x in case.inputs().items()})
    for name in got:
        assert relative_error(got[name], want[name]) < 1e-5, (case.name, name)
print(torch.ops.vmamba.cpu_isa() if ISA else "", len(CASES), "cases agree")
"""


def run(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a new interpreter that finds the package in ``cwd``."""
    environment = {**os.environ, "PYTHONPATH": str(cwd), **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_kernels_are_built_and_run():
    info = backend_info()
    assert info["cpu"].backend == "kernel", info["cpu"].reason
    assert vmamba.backend_info() == info
    assert re.search(r"avx512|avx2|baseline", info["cpu"].reason)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_agrees_with_the_reference(isa):
    """The widest one of this machine is what all other tests run."""
    done = run(f"ISA = True{AGREE}", VMAMBA_CPU_ISA=isa, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("baseline", isa))


def test_an_unknown_instruction_set_is_refused():
    done = run("import torch, vmamba.ops; torch.ops.vmamba.cpu_isa()", VMAMBA_CPU_ISA="mmx")
    assert "VMAMBA_CPU_ISA must be avx512, avx2 or baseline, got mmx" in done.stderr


def test_the_library_uses_the_stable_abi_alone():
    """No C++ symbol of torch and none of Python: what keeps one binary good for every version of either."""
    path = library_path()
    assert path is not None
    listed = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    undefined = [line.split()[-1] for line in listed.splitlines()]
    foreign = [s for s in undefined if re.match(r"_ZN?K?(2at|3c10|5torch)|_?Py", s)]
    assert not foreign, foreign
    assert any(s.startswith(("aoti_torch_", "torch_")) for s in undefined)


def test_without_the_library_the_reference_serves_the_cpu_and_says_so(tmp_path):
    """In a copy of the package that holds no library."""
    hidden = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "vmamba", tmp_path / "vmamba", ignore=hidden)
    shutil.copytree(ROOT / "tests" / "ops", tmp_path / "tests" / "ops", ignore=hidden)
    done = run(f"ISA = False{AGREE}\nimport vmamba.info; print(vmamba.info.report())", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cases agree" in done.stdout and "reference: the extension is not built" in done.stdout
    assert "vmamba runs on its slow PyTorch reference: the extension is not built" in done.stderr


@pytest.mark.skipif(has_kernel("cuda"), reason="this build has CUDA kernels")
def test_a_device_without_kernels_names_the_cure():
    from vmamba.ops.extension import require_kernel

    with pytest.raises(RuntimeError, match="no kernel for device 'cuda': this build is CPU only; reinstall"):
        require_kernel(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="no kernel for device 'xpu'"):
        require_kernel(torch.device("xpu"))


def test_the_info_command():
    done = run("import runpy; runpy.run_module('vmamba.info', run_name='__main__')")
    assert done.returncode == 0, done.stderr
    for fact in ("vmamba ", "torch ", "scan on cpu", "scan on cuda"):
        assert fact in done.stdout
