"""Every published file, rebuilt from its layout, is read, converted and fits its model, strictly."""

import pytest
import timm
import torch

from tests.weights import published
from vmamba.models._checkpoint import CheckpointError
from vmamba.weights import checkpoints, find
from vmamba.weights.contents import own_weights

ALL = list(checkpoints())
FEW = [
    "vanilla_vmamba_tiny.in1k",
    "efficientvmamba_tiny.in1k",
    "msvmamba_nano.in1k",
    "msvmambav3_tiny.in1k",
    "plainmamba_l1.in1k",
    "spatialmamba_tiny.in1k",
    "vim_tiny_patch16_224.in1k",
    "vmamba_tiny_s2l5_mask_rcnn_3x.coco",
    "plainmamba_l1_retinanet_1x.coco",
    "msvmamba_micro_upernet_160k.ade20k",
]


def load(name: str, cache) -> None:
    """Through timm, as a user would; detectors and segmentors by what is common to them."""
    checkpoint = find(name)
    path = published.save(checkpoint, cache / checkpoint.file_name)
    weights = own_weights(checkpoint, path)
    chosen = {round(value.flatten()[0].item()) for value in weights.values() if value.is_floating_point()}
    assert max(chosen) < 400, "the other set of weights was taken"
    if checkpoint.task == "classification":
        with torch.device("meta"):  # nothing is drawn or copied, and all is compared
            model = timm.create_model(name, pretrained=True)
        assert weights.keys() == model.state_dict().keys()
    else:
        assert weights.keys() == published.layout(checkpoint).keys()


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("name", FEW)
def test_published_files_load(name, cache, small_stated_sizes):
    load(name, cache)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("name", [name for name in ALL if name not in FEW])
def test_all_published_files_load(name, cache, small_stated_sizes):
    load(name, cache)


@pytest.fixture
def small_stated_sizes(monkeypatch):
    """The rebuilt files have every shape, but not the bytes."""
    from vmamba.weights import Checkpoint

    monkeypatch.setattr(Checkpoint, "has_size", lambda self, count: True)


@pytest.mark.parametrize("name", FEW)
def test_a_tensor_lost_is_noticed(name, cache):
    checkpoint = find(name)
    weights = published.tensors(checkpoint)
    lost = next(key for key in weights if "A_log" in key)
    del weights[lost]
    path = published.save(checkpoint, cache / checkpoint.file_name, weights)
    with pytest.raises(CheckpointError, match=f"is not {name}: it does not fit this model: "):
        own_weights(checkpoint, path)


def test_a_bare_file_is_read_as_well(cache):
    checkpoint = find("vmamba_tiny_s1l8")
    path = cache / checkpoint.file_name
    path.parent.mkdir(parents=True)
    torch.save(published.tensors(checkpoint), path)
    assert len(own_weights(checkpoint, path)) == len(published.layout(checkpoint))


def test_no_weights(cache):
    cache.mkdir(parents=True)
    torch.save({"epoch": 3}, cache / "x.pth")
    with pytest.raises(CheckpointError, match=r"x.pth is not vmamba_tiny_s1l8.in1k: it holds no weights"):
        own_weights(find("vmamba_tiny_s1l8"), cache / "x.pth")
