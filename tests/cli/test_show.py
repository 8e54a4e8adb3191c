import pytest
import timm
import torch
from PIL import Image

import vmamba.models
from tests.running import make_folder, one_line, vmamba

QUICK = ("--model", "test_vmamba", "--img-size", "32x48", "--device", "cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "trained.pth"
    torch.manual_seed(1)
    torch.save(timm.create_model("test_vmamba").state_dict(), path)
    return path


def panels(path):
    """The number of pixels, having checked that something is drawn."""
    with Image.open(path) as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100
        return image.width


@pytest.mark.parametrize("kind", ["routes", "erf", "attention", "features"])
def test_each_kind_as_png_and_svg(kind, tmp_path):
    limit = () if kind == "routes" else ("--limit", 1)
    for suffix in ("png", "svg"):
        path = tmp_path / f"{kind}.{suffix}"
        result = vmamba("show", kind, *QUICK, *limit, "--output", path)
        assert result.status == 0, result.err
        assert f"wrote  {path}" in result.out
    panels(tmp_path / f"{kind}.png")
    assert (tmp_path / f"{kind}.svg").read_text().count("<path") > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{kind}.png", f"{kind}.svg"]


def test_without_options_digits_and_a_name_in_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = vmamba("show", "features")
    assert result.status == 0, result.err
    assert "vmamba_nano_32 is not trained: --checkpoint FILE" in result.out
    panels(tmp_path / "features_vmamba_nano_32.png")


def test_the_receptive_field_before_and_after_training(weights, tmp_path):
    alone, both = tmp_path / "alone.png", tmp_path / "both.png"
    assert vmamba("show", "erf", *QUICK, "--limit", 2, "--output", alone).status == 0
    result = vmamba("show", "erf", *QUICK, "--limit", 2, "--checkpoint", weights, "--output", both)
    assert result.status == 0, result.err
    lines = [line for line in result.out.splitlines() if "of the image" in line]
    assert [line.partition(":")[0] for line in lines] == ["untrained", "trained.pth"]
    assert lines[0].partition(":")[2] != lines[1].partition(":")[2]
    assert "99% in" in lines[0]
    assert panels(both) > 1.8 * panels(alone)


def test_images_of_a_folder(tmp_path):
    data = make_folder(tmp_path / "data", per_class=1, splits=("train",))
    path = tmp_path / "attention.png"
    result = vmamba(
        "show", "attention", data, *QUICK, "--block", "stages.0.blocks.0", "--at", "0.1,0.9", "--output", path
    )
    assert result.status == 0, result.err
    with Image.open(path) as image:
        assert image.height > 300  # three rows


def test_models_of_timm_have_features_and_receptive_fields(tmp_path):
    for kind in ("features", "erf"):
        path = tmp_path / f"{kind}.png"
        result = vmamba("show", kind, "--model", "test_convnext", "--img-size", 64, "--limit", 1, "--output", path)
        assert result.status == 0, result.err
        panels(path)


def test_a_picture_that_is_there_stays(tmp_path):
    path = tmp_path / "mine.png"
    path.write_bytes(b"mine")
    assert "is there already; --overwrite" in one_line(vmamba("show", "routes", *QUICK, "--output", path))
    assert path.read_bytes() == b"mine"
    assert vmamba("show", "routes", *QUICK, "--output", path, "--overwrite").status == 0
    panels(path)


def test_a_folder_that_cannot_be_written_to_is_noticed_before_the_work():
    result = vmamba("show", "erf", *QUICK, "--limit", 1, "--output", "/proc/erf.png")
    assert "cannot write /proc/erf.png: No such file" in one_line(result)
    assert result.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rutes",), "'features'); did you mean routes?"),
        (("routes", "--model", "vmamba_tini"), "unknown model 'vmamba_tini'; did you mean vmamba_tiny"),
        (("routes", "--model", "test_convnext"), "does not scan"),
        (("attention", *QUICK, "--block", "stages.1.blocks.7"), "no block 'stages.1.blocks.7' scans in test_vmamba"),
        (("attention", *QUICK, "--at", "0.5"), "'0.5' is no place such as 0.5,0.5"),
        (("attention", *QUICK, "--at", "1.5,0"), "--at: a place is two shares in [0, 1)"),
        (("attention", *QUICK, "--at", "class"), "has no token 'class'"),
        (("features", *QUICK, "--indices", "0,9"), "no map 9; there are 0 to 3"),
        (("features", *QUICK, "--indices", "a"), "'a' is no list such as 0,2"),
        (("erf", "nowhere.png", *QUICK), "nowhere.png not found"),
        (("routes", "--img-size", "0x3"), "sides are positive"),
        (("routes", "--img-size", "big"), "'big' is no size such as 224 or 192x256"),
        (("routes", *QUICK, "--output", "routes.txt"), "no picture ends in '.txt'; use .png or .svg"),
        (("routes", *QUICK, "--output", "nowhere/routes.png"), "there is no folder nowhere"),
        (("routes", *QUICK, "--limit", "3"), "does not know '--limit'"),
        (("erf", "--modl", "x"), "vmamba show erf does not know '--modl'; did you mean --model"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in one_line(vmamba("show", *arguments))
    assert list(tmp_path.iterdir()) == []
