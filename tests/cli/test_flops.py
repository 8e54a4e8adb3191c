import csv

import pytest

from tests.running import one_line, vmamba
from vmamba.analysis import cost_table


def test_a_model():
    result = vmamba("flops", "test_vmamba", "--size", "64x96")
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith("test_vmamba at 64x96: 0.466 M parameters, ")
    modules = {line.split()[0]: line.split() for line in lines[3 : lines.index("", 3)]}
    assert modules["(all)"][3] == "100.0%"
    assert modules["stages.3"][-1] == "Stage"
    assert "a scan: 9 N + 1 operations" in result.out
    assert "authors: " in lines[-1]
    if "fvcore is not installed" not in result.out:
        assert "GFLOPs, the same; it alone counts layer_norm" in result.out


def test_any_model_of_timm_at_its_own_size():
    result = vmamba("flops", "test_vit", "--no-fvcore", "--depth", 1, "--in-chans", 1)
    assert result.status == 0, result.err
    assert "test_vit at 160x160" in result.out
    assert "no published rule is known" in result.out
    assert "blocks.0" not in result.out


def test_the_table(tmp_path, monkeypatch):
    """The files; that all models are in them is tested where the rows are."""
    few = dict(list(cost_table.published_models().items())[-2:])
    monkeypatch.setattr(cost_table, "published_models", lambda: few)
    result = vmamba("flops", "--all", "--no-fvcore", "--output", tmp_path / "new" / "flops")
    assert result.status == 0, result.err
    with open(tmp_path / "new" / "flops.csv", newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == list(reversed(few))
    assert all(name in (tmp_path / "new" / "flops.md").read_text() for name in few)


@pytest.mark.parametrize("suffix", ["csv", "md"])
def test_a_table_that_is_there_stays(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(cost_table, "published_models", dict)
    path = tmp_path / f"README.{suffix}"
    path.write_text("mine")
    command = ("flops", "--all", "--no-fvcore", "--output", tmp_path / "README")
    assert f"{path} is there already; --overwrite" in one_line(vmamba(*command))
    assert path.read_text() == "mine"
    assert vmamba(*command, "--overwrite").status == 0


def test_a_model_built_for_one_size_that_is_not_square():
    result = vmamba("flops", "swin_tiny_patch4_window7_224", "--size", "100x120", "--no-fvcore")
    assert result.status == 0, result.err
    assert "swin_tiny_patch4_window7_224 at 100x120" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "which model? give a name, or --all"),
        (("test_vmambo",), "unknown model 'test_vmambo'; did you mean test_vmamba"),
        (("test_vmamba", "--all"), "leave model and size out"),
        (("test_vmamba", "--size", "64x"), "'64x' is no size such as 224 or 512x2048"),
        (("test_vmamba", "--size", "1x2x3"), "is no size such as"),
        (("convnext_tiny", "--size", "1"), "convnext_tiny takes no images of 1x1, try another --size: "),
    ],
)
def test_mistakes(arguments, message):
    assert message in one_line(vmamba("flops", *arguments))
