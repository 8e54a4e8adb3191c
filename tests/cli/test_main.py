import subprocess
import sys

import pytest

from tests.running import one_line, vmamba
from vmamba.cli.main import COMMANDS


def test_help_lists_the_commands():
    for arguments in ((), ("--help",)):
        result = vmamba(*arguments)
        assert result.status == 0
        assert all(name in result.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name, capsys):
    if COMMANDS[name][0].startswith("vmamba.mm"):
        pytest.importorskip("mmdet", reason="needs the mm extra")
    with pytest.raises(SystemExit) as caught:
        vmamba(name, "--help")
    assert caught.value.code == 0


def test_version():
    assert vmamba("--version").out.startswith("vmamba ")


def test_unknown_command():
    assert one_line(vmamba("trian")) == "vmamba: error: unknown command 'trian'; did you mean train, train-dense?"


def test_mistaken_options():
    message = one_line(vmamba("train", "--batch_size", 3))
    assert "vmamba train does not know '--batch_size'; did you mean --batch-size" in message
    assert "vmamba models does not know 'b'" in one_line(vmamba("models", "a", "b"))
    assert "the following arguments are required: PATH" in one_line(vmamba("predict"))
    assert "argument --batch-size: '0' is not a whole number" in one_line(vmamba("validate", "--batch-size", 0))


def test_as_a_program():
    run = subprocess.run([sys.executable, "-m", "vmamba.cli.main", "nothing"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith("vmamba: error: unknown command 'nothing'")


def test_missing_package():
    code = "import sys; sys.modules['cv2'] = None; from vmamba.cli.main import main; sys.exit(main(['train-dense']))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith("vmamba: error: ")
    assert "vmamba[mm]" in line


@pytest.mark.parametrize(("package", "brings"), [("cli", "'vmamba'"), ("mm", "'vmamba[mm]'")])
def test_where_a_missing_package_comes_from(package, brings, monkeypatch):
    monkeypatch.setitem(COMMANDS, "new", (f"vmamba.{package}.absent", ""))
    assert f"pip install {brings}" in one_line(vmamba("new"))


def test_the_commands_themselves_do_not_import_torch():
    """The package's `__init__` registers the models and so needs torch; the command must not make it slower still."""
    code = (
        "import sys, types; package = types.ModuleType('vmamba'); package.__path__ = ['vmamba'];"
        "package.__version__ = '0'; sys.modules['vmamba'] = package;"
        "import vmamba.cli.main, vmamba.cli.train, vmamba.cli.validate, vmamba.cli.predict, vmamba.cli.models;"
        "import vmamba.cli.benchmark, vmamba.cli.flops;"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
