"""Checkpoints through timm's own path: every published layout and wrapper, and every way to be wrong."""

import argparse
import pickle
import re
import types

import numpy as np
import pytest
import timm
import torch

from tests.models.common import image, seeded
from vmamba.models._checkpoint import CheckpointError
from vmamba.models.vmamba import checkpoint_filter_fn

SECOND, FIRST = "test_vmamba", "test_vanilla_vmamba"


def published(name: str, **kwargs) -> dict[str, torch.Tensor]:
    """The weights of a seeded model in the layout its authors publish."""
    inner = {"conv1": "0", "norm1": "2", "conv2": "5", "norm2": "7", "conv": "0", "norm": "2"}
    down = {"conv": "1", "norm": "3"} if name == SECOND else {"norm": "norm", "reduction": "reduction"}
    renames = [
        (r"^stem\.(\w+)", lambda m: f"patch_embed.{inner[m[1]]}"),
        (r"^stages\.(\d)\.downsample\.(\w+)", lambda m: f"layers.{int(m[1]) - 1}.downsample.{down[m[2]]}"),
        (r"^stages\.(\d)\.blocks\.(\d)\.norm1", r"layers.\1.blocks.\2.norm"),
        (r"^stages\.", "layers."),
        (r"\.mixer\.ssm\.x_proj\.weight", ".op.x_proj_weight"),
        (r"\.mixer\.ssm\.dt_", ".op.dt_projs_"),
        (r"\.mixer\.ssm\.A_log", ".op.A_logs"),
        (r"\.mixer\.ssm\.D", ".op.Ds"),
        (r"\.mixer\.conv", ".op.conv2d"),
        (r"\.mixer\.", ".op."),
        (r"^norm\.", "classifier.norm."),
        (r"^head\.fc\.", "classifier.head."),
    ]
    result = {}
    for key, value in seeded(name, seed=7, **kwargs).state_dict().items():
        for pattern, new in renames:
            key = re.sub(pattern, new, key)
        if key.endswith("x_proj_weight"):
            value = value.unflatten(0, (4, -1))
        elif key.endswith(("A_logs", "Ds")):
            value = value.flatten(0, 1)
        result[key] = value
    return result


def january_2024(weights: dict) -> dict:
    renames = [
        (r"^patch_embed\.0", "patch_embed.proj"),
        (r"^patch_embed\.2", "patch_embed.norm"),
        (r"(blocks\.\d)\.norm", r"\1.ln_1"),
        (r"\.op\.", ".self_attention."),
        (r"^classifier\.", ""),
    ]
    result = {}
    for key, value in weights.items():
        for pattern, new in renames:
            key = re.sub(pattern, new, key)
        result[key] = value
    return result


def four_dimensional(weights: dict) -> dict:
    projections = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    return {key: value[..., None, None] if key.endswith(projections) else value for key, value in weights.items()}


def single_file(weights: dict) -> dict:
    result = {}
    for key, value in weights.items():
        if key.endswith("x_proj_weight"):
            key, value = key.replace("x_proj_weight", "x_proj.weight"), value.flatten(0, 1)
        elif key.endswith("dt_projs_weight"):
            key, value = key.replace("dt_projs_weight", "dt_projs.weight"), value.flatten(0, 1)
        key = key.replace("downsample.norm", "downsample.1").replace("downsample.reduction", "downsample.2")
        result[key] = value
    return result


def unchanged(weights: dict) -> dict:
    return weights


def load(name: str, path, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs).eval()


@pytest.fixture
def save(tmp_path):
    def write(content, name="checkpoint.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (SECOND, unchanged),
        (SECOND, four_dimensional),
        (SECOND, single_file),
        (FIRST, unchanged),
        (FIRST, january_2024),
        (FIRST, four_dimensional),
        (FIRST, single_file),
    ],
)
def test_layouts(name, layout, save):
    model = load(name, save({"model": layout(published(name))}))
    x = image(2, 3, 64, 64)
    assert torch.equal(model(x), seeded(name, seed=7)(x))


@pytest.mark.parametrize("name", [SECOND, FIRST])
def test_wrappers(name, save):
    weights = published(name)
    other = {key: value + 1 for key, value in weights.items()}
    expected = seeded(name, seed=7).state_dict()
    wrapped = [
        weights,
        {"model": weights},
        {"state_dict": weights, "meta": {"epoch": 3}},
        {"model": other, "model_ema": weights, "optimizer": {"state": {}}, "epoch": 1},
        {"model": weights, "model_ema": None},
        {"model": {f"module.{key}": value for key, value in weights.items()}},
        {"model": expected},
        expected,
    ]
    for content in wrapped:
        for found in (load(name, save(content)).state_dict(), checkpoint_filter_fn(content, seeded(name))):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    expected = seeded(SECOND, seed=7).state_dict()
    safetensors.save_file(expected, tmp_path / "weights.safetensors")
    found = load(SECOND, tmp_path / "weights.safetensors").state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_raw_training_checkpoint(save, monkeypatch):
    """With all that such a file pickles beside the weights; yacs need not be installed to read it."""
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config", "__qualname__": "CfgNode"})
    monkeypatch.setitem(__import__("sys").modules, "yacs.config", yacs)
    path = save(
        {
            "model": published(SECOND),
            "config": yacs.CfgNode(MODEL=yacs.CfgNode(TYPE="vssm")),
            "args": argparse.Namespace(lr=1e-3),
            "max_accuracy": np.float64(82.6),
        }
    )
    monkeypatch.delitem(__import__("sys").modules, "yacs.config")
    x = image(1, 3, 32, 32)
    assert torch.equal(load(SECOND, path)(x), seeded(SECOND, seed=7)(x))


@pytest.mark.parametrize("name", [SECOND, FIRST])
def test_adapts_as_timm_does(name, save):
    path = save({"model": published(name)})
    whole = seeded(name, seed=7)
    x = image(1, 3, 64, 64)

    fine_tuned = load(name, path, num_classes=10)
    assert fine_tuned(x).shape == (1, 10)
    assert torch.equal(fine_tuned.forward_features(x), whole.forward_features(x))
    assert torch.equal(load(name, path, num_classes=0)(x), whole.forward_head(whole.forward_features(x), True))
    grey = load(name, path, in_chans=1, num_classes=5)
    torch.testing.assert_close(
        grey.forward_features(x[:, :1]), whole.forward_features(x[:, :1].expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5
    )
    features = load(name, path, features_only=True)(x)
    expected = whole.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


def test_state_dict_overlay():
    model = timm.create_model(SECOND, pretrained=True, pretrained_cfg_overlay={"state_dict": published(SECOND)})
    assert torch.equal(model.norm.weight, seeded(SECOND, seed=7).norm.weight)


# ---------------------------------------------------------------------------------------------------------------------
# What must fail, in one line
# ---------------------------------------------------------------------------------------------------------------------


def complaint(name: str, path, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(name, path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert name in message
    assert len(message) < 900
    return message


def test_another_generation(save):
    message = complaint(SECOND, save({"model": published(FIRST)}))
    assert "missing (stem.conv2.weight, stem.conv2.bias, stem.norm2.weight, ...)" in message
    assert "unexpected (stages.0.blocks.0.mixer.conv.bias, stages.1.downsample.reduction.weight" in message
    assert "of another shape (stem.conv1.weight is (16, 3, 4, 4), expected (8, 3, 3, 3)" in message


def test_another_size(save):
    message = complaint(SECOND, save({"model": published(SECOND, embed_dim=32)}))
    assert "missing" not in message
    assert "stem.conv1.weight is (16, 3, 3, 3), expected (8, 3, 3, 3)" in message


def test_another_architecture(save):
    message = complaint(SECOND, save(timm.create_model("test_resnet").state_dict()))
    assert "missing (stem.conv1.weight" in message
    assert "unexpected (conv1" in message


def test_some_weights_lost(save):
    weights = published(SECOND)
    del weights["layers.1.blocks.0.op.Ds"], weights["classifier.head.bias"]
    assert "2 missing (stages.1.blocks.0.mixer.ssm.D, head.fc.bias)" in complaint(SECOND, save({"model": weights}))


def test_another_number_of_classes(save):
    message = complaint(SECOND, save({"model": published(SECOND, num_classes=10)}))
    assert "2 of another shape (head.fc.weight is (10, 128), expected (1000, 128)" in message


def test_detector(save):
    """Detectors have norms of their own and no classifier; that is said, not died of."""
    weights = {f"backbone.{k}": v for k, v in published(SECOND).items() if not k.startswith("classifier")}
    weights |= {"backbone.outnorm0.weight": torch.ones(16), "rpn_head.rpn_conv.weight": torch.ones(3)}
    message = complaint(SECOND, save({"state_dict": weights, "meta": {}}))
    assert "4 missing (norm.weight, norm.bias, head.fc.weight, ...), 1 unexpected (outnorm0.weight)" in message


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [1, 2], torch.ones(3), {"model": {}}])
def test_no_weights(content, save):
    complaint(SECOND, save(content))


def test_truncated(save, tmp_path):
    path = save({"model": published(SECOND)})
    whole = path.read_bytes()
    for size in (0, 1, 1000, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        assert f"truncated, corrupt or no checkpoint at all ({size:,} bytes)" in complaint(SECOND, path)


@pytest.mark.parametrize("name", ["noise.pth", "noise.safetensors", "text.pth"])
def test_corrupt(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"not a checkpoint\n" * 50 if name == "text.pth" else np.random.default_rng(0).bytes(5000))
    assert "truncated, corrupt or no checkpoint at all" in complaint(SECOND, path)


def test_no_such_file(tmp_path):
    assert "there is no such file" in complaint(SECOND, tmp_path / "absent.pth")


class Attack:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_code_is_not_executed(save, tmp_path):
    trap = tmp_path / "trap"
    message = complaint(SECOND, save({"model": published(SECOND), "config": Attack(trap)}))
    assert "io.open" in message
    assert "never executed" in message
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Attack(trap)}))
    complaint(SECOND, tmp_path / "plain.pth")
    assert not trap.exists()


def test_other_errors_are_left_alone(save):
    with pytest.raises(TypeError, match="no_such_argument"):
        load(SECOND, save({"model": published(SECOND)}), no_such_argument=1)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(SECOND, pretrained=True)
