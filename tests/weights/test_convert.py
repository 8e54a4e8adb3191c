"""Published files to safetensors, files taken in, and what is pushed."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tests.models.test_checkpoints import Attack
from tests.weights import published
from vmamba.errors import UserError
from vmamba.weights import fetch, find, places, push, record
from vmamba.weights.contents import own_weights
from vmamba.weights.convert import convert, read_metadata
from vmamba.weights.importing import take_in

CLASSIFIER = "msvmamba_nano.in1k"
DETECTOR = "plainmamba_l1_mask_rcnn_1x.coco"


def saved(name: str, folder: Path) -> Path:
    checkpoint = find(name)
    return published.save(checkpoint, folder / checkpoint.file_name)


# ---------------------------------------------------------------------------------------------------------------------
# convert
# ---------------------------------------------------------------------------------------------------------------------


def test_a_classifier_is_written_under_our_names(tmp_path):
    source = saved(CLASSIFIER, tmp_path)
    path = convert(find(CLASSIFIER), source, tmp_path / "out")
    assert path == tmp_path / "out" / f"{CLASSIFIER}.safetensors"
    model = timm.create_model("msvmamba_nano", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    weights = load_file(path)
    assert weights.keys() == model.state_dict().keys()
    expected = own_weights(find(CLASSIFIER), source)
    assert all(torch.equal(value, expected[key]) for key, value in weights.items())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_detector_keeps_its_names(tmp_path):
    source = saved(DETECTOR, tmp_path)
    weights = load_file(convert(find(DETECTOR), source, tmp_path))
    expected = torch.load(source, weights_only=True)["state_dict"]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in weights.items())


def test_origin_and_licence_are_inside(tmp_path):
    source = saved(CLASSIFIER, tmp_path)
    stored = read_metadata(convert(find(CLASSIFIER), source, tmp_path))
    assert stored.pop("metrics") == json.dumps({"top1": 77.3})
    assert stored == {
        "format": "pt",
        "name": CLASSIFIER,
        "task": "classification",
        "model": "msvmamba_nano",
        "source": find(CLASSIFIER).url,
        "source_sha256": record.sha256(source),
        "license": "none stated",
        "paper": "arXiv:2405.14174",
        "title": find(CLASSIFIER).title,
        "repository": "https://github.com/YuHengsss/MSVMamba",
    }


def test_the_converted_file_is_found_first(cache):
    path = convert(find(CLASSIFIER), saved(CLASSIFIER, cache), places.destination())
    assert fetch(CLASSIFIER) == path
    assert convert(find(CLASSIFIER), cache / f"{CLASSIFIER}.pth", places.destination()) == path
    assert fetch(CLASSIFIER) == path


def test_what_is_converted_is_not_converted(tmp_path):
    path = convert(find(CLASSIFIER), saved(CLASSIFIER, tmp_path), tmp_path)
    with pytest.raises(UserError, match="is converted already"):
        convert(find(CLASSIFIER), path, tmp_path)


def test_a_file_of_other_origin_stays(tmp_path):
    other = tmp_path / f"{CLASSIFIER}.safetensors"
    save_file({"x": torch.ones(1)}, other)
    before = other.read_bytes()
    with pytest.raises(UserError, match=r"safetensors is there already, and was not made of .*in1k.pth; rename it"):
        convert(find(CLASSIFIER), saved(CLASSIFIER, tmp_path), tmp_path)
    assert other.read_bytes() == before


def test_it_may_be_read_by_whom_the_umask_lets(tmp_path):
    source = saved(CLASSIFIER, tmp_path)
    before = os.umask(0o027)
    try:
        path = convert(find(CLASSIFIER), source, tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_full_disk_leaves_nothing_of_what_is_converted(tmp_path, full_at_a_million):
    with pytest.raises(UserError, match=r"cannot write .*File too large"):
        convert(find(CLASSIFIER), saved(CLASSIFIER, tmp_path), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        convert(find(CLASSIFIER), saved(CLASSIFIER, tmp_path), tmp_path / "file")


# ---------------------------------------------------------------------------------------------------------------------
# import
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_is_taken_in(tmp_path, cache):
    source = published.save(find(CLASSIFIER), tmp_path / "best_ckpt.pth")
    path = take_in(find(CLASSIFIER), source, places.destination())
    assert path == cache / f"{CLASSIFIER}.pth"
    assert path.read_bytes() == source.read_bytes()
    assert fetch(CLASSIFIER) == path
    assert take_in(find(CLASSIFIER), source, places.destination()) == path
    assert take_in(find(CLASSIFIER), path, places.destination()) == path


def test_a_converted_file_is_taken_in(tmp_path, cache):
    source = convert(find(CLASSIFIER), saved(CLASSIFIER, tmp_path), tmp_path)
    source = source.rename(tmp_path / "model.safetensors")
    path = take_in(find(CLASSIFIER), source, places.destination())
    assert path == cache / f"{CLASSIFIER}.safetensors"
    assert fetch(CLASSIFIER) == path


def test_another_file_does_not_take_its_place_unasked(tmp_path, cache):
    first = published.save(find(CLASSIFIER), tmp_path / "first.pth")
    second = published.save(find(CLASSIFIER), tmp_path / "second.pth", published.tensors(find(CLASSIFIER), 1.0))
    path = take_in(find(CLASSIFIER), first, places.destination())
    with pytest.raises(UserError, match="is there already, and is another file; --accept renames it"):
        take_in(find(CLASSIFIER), second, places.destination())
    assert path.read_bytes() == first.read_bytes()
    for file, old in ((second, first), (first, second)):
        take_in(find(CLASSIFIER), file, places.destination(), accept=True)
        assert path.read_bytes() == file.read_bytes()
        assert fetch(CLASSIFIER) == path
        assert sorted(cache.glob("*.old*"))[-1].read_bytes() == old.read_bytes()


@pytest.mark.parametrize("hides", ["converted", "of the checkout"])
def test_no_other_file_hides_what_is_taken_in(hides, tmp_path, cache, caplog):
    first = published.save(find(CLASSIFIER), tmp_path / "first.pth")
    second = published.save(find(CLASSIFIER), tmp_path / "second.pth", published.tensors(find(CLASSIFIER), 1.0))
    if hides == "converted":
        take_in(find(CLASSIFIER), first, cache)
        hiding = convert(find(CLASSIFIER), cache / f"{CLASSIFIER}.pth", cache)
    else:
        Path("pyproject.toml").touch()
        hiding = take_in(find(CLASSIFIER), first, Path("checkpoints")).absolute()
    content = hiding.read_bytes()
    take_in(find(CLASSIFIER), first, cache)  # what the other was made of, or equals
    with pytest.raises(UserError, match=f"{hiding} is there already and would be found before .*; --accept renames it"):
        take_in(find(CLASSIFIER), second, cache)
    with caplog.at_level("INFO"):
        path = take_in(find(CLASSIFIER), second, cache, accept=True)
    assert fetch(CLASSIFIER) == path
    assert path.read_bytes() == second.read_bytes()
    assert hiding.with_name(f"{hiding.name}.old").read_bytes() == content
    assert f"{hiding} is now called {hiding.name}.old" in caplog.text
    assert fetch(CLASSIFIER) == path == cache / f"{CLASSIFIER}.pth"
    convert(find(CLASSIFIER), path, cache)


def test_a_full_disk_leaves_nothing_of_what_is_taken_in(tmp_path, cache, request):
    content = {find(CLASSIFIER).weights: published.tensors(find(CLASSIFIER)), "optimizer": torch.zeros(300_000)}
    torch.save(content, tmp_path / "x.pth")
    request.getfixturevalue("full_at_a_million")
    with pytest.raises(UserError, match=r"cannot copy .*x.pth to .*: File too large"):
        take_in(find(CLASSIFIER), tmp_path / "x.pth", cache)
    assert not list(cache.iterdir())


def test_another_model_is_not_taken_in(tmp_path, cache):
    source = saved("msvmamba_micro.in1k", tmp_path)
    with pytest.raises(UserError) as error:
        take_in(find(CLASSIFIER), source, places.destination())
    assert f"{source} is not {CLASSIFIER}: it does not fit this model: " in str(error.value)
    assert not cache.exists() or not list(cache.glob("*.pth*"))


def test_another_detector_is_not_taken_in(tmp_path):
    source = saved("plainmamba_l2_mask_rcnn_1x.coco", tmp_path)
    with pytest.raises(UserError, match=f"is not {DETECTOR}: it does not fit"):
        take_in(find(DETECTOR), source, places.destination())


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        take_in(find(CLASSIFIER), tmp_path / "absent.pth", places.destination())


def test_nothing_in_a_file_is_executed(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"model_ema": published.tensors(find(CLASSIFIER)), "config": Attack(trap)}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="pickled code is never executed"):
        take_in(find(CLASSIFIER), tmp_path / "evil.pth", places.destination())
    assert not trap.exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_file_that_may_not_be_read(name, tmp_path, forbid):
    (tmp_path / name).touch()
    forbid(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} cannot be read: Permission denied"):
        take_in(find(CLASSIFIER), tmp_path / name, places.destination())


def test_a_truncated_file(tmp_path):
    source = saved(CLASSIFIER, tmp_path)
    os.truncate(source, source.stat().st_size - 100)
    with pytest.raises(UserError, match="is truncated, corrupt or no checkpoint at all"):
        take_in(find(CLASSIFIER), source, places.destination())


# ---------------------------------------------------------------------------------------------------------------------
# push
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_pushed_can_be_used_from_the_hub(hub, cache, monkeypatch):
    path = saved(CLASSIFIER, cache)
    with push.prepared(find(CLASSIFIER), path, "me/nano") as folder:
        assert {item.name for item in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
        address = push.upload(folder, "me/nano")
    assert address == f"{hub.url}/me/nano/commit/{hub.COMMIT}"
    (uploaded,) = hub.commits
    hub.files = {f"me/nano/resolve/main/{name}": data for name, data in uploaded.items()}
    model = timm.create_model("hf-hub:me/nano", pretrained=True)
    expected = own_weights(find(CLASSIFIER), path)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert model.pretrained_cfg["license"] == "none stated"


def test_a_detector_is_pushed_with_a_card(cache):
    with push.prepared(find(DETECTOR), saved(DETECTOR, cache), "me/det") as folder:
        assert {item.name for item in folder.iterdir()} == {"README.md", "model.safetensors"}
        text = (folder / "README.md").read_text()
    assert "license: apache-2.0" in text
    assert "pipeline_tag: object-detection" in text
    assert f"vmamba weights import model.safetensors --as {DETECTOR}" in text


def test_the_hub_refuses(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    (tmp_path / "README.md").touch()
    with hub.refusing(), pytest.raises(UserError, match=r"could not push to me/nano: .*403.*; hf auth login"):
        push.upload(tmp_path, "me/nano")


def test_cards_say_whose_the_weights_are():
    import yaml

    for name in (CLASSIFIER, "efficientvmamba_tiny.in1k", "msvmambav3_tiny.in1k"):
        text = push.card(find(name), "me/x")
        header = yaml.safe_load(text.split("---")[1])
        assert header["license"] == ("other" if find(name).license == "none stated" else find(name).license)
        assert find(name).url in text
        assert find(name).repository in text
        assert f"top-1 {find(name).metrics['top1']}" in text
        assert (find(name).license_note or "") in text


def test_safetensors_of_other_origin(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    assert read_metadata(tmp_path / "x.safetensors") == {}
