from tests.running import one_line, vmamba
from vmamba.cli.models import own_models


def test_table():
    result = vmamba("models", "vmamba_tiny_s1l8")
    assert result.status == 0, result.err
    header, row = result.out.splitlines()
    assert header.split() == ["model", "params", "(M)", "MACs", "(G)", "top-1", "(%)", "licence"]
    name, params, macs, top1, licence = row.split()
    assert (name, params, top1, licence) == ("vmamba_tiny_s1l8", "30.25", "82.6", "mit")
    assert 4.5 < float(macs) < 5.2


def test_pattern():
    names = {line.split()[0] for line in vmamba("models", "*_s1*").out.splitlines()[1:]}
    assert names == {"vmamba_tiny_s1l8", "vmamba_small_s1l20", "vmamba_base_s1l20"}


def test_only_models_of_this_package_are_listed():
    names = own_models()
    assert {"vmamba_tiny_s1l8", "vmamba_nano_32"} <= set(names)
    assert "resnet18" not in names


def test_no_match():
    assert "no model matches 'vmamba_tiny_s1l9'; did you mean vmamba_tiny_s1l8" in one_line(
        vmamba("models", "vmamba_tiny_s1l9")
    )
