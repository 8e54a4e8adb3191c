"""Weights for the backbones: classifiers', published detectors' and segmentors', our own, and wrong ones."""

import copy
import logging
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from torch import nn

pytest.importorskip("mmengine", reason="needs the mm extra")

from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint, save_checkpoint

from tests.mm.published import HIERARCHICAL, PLAINMAMBA_SEG, VIM, Published, published_weights, without_prefix
from tests.models.golden import golden, placeholders, weights
from tests.running import ROOT
from vmamba.errors import UserError
from vmamba.models._checkpoint import CheckpointError
from vmamba.weights import find

SMALL = {"type": "MambaBackbone", "model_name": "test_vmamba"}


def build(config: dict = SMALL, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return MODELS.build({**config, **kwargs})


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.fixture
def log():
    """The messages that are logged."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    logger = MMLogger.get_instance("vmamba-test")
    handler = Keep(logging.INFO)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture
def save(tmp_path):
    def write(content, name="checkpoint.pth"):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return write


def written_by_mmengine(state_dict: dict) -> dict:
    """A file's content, with all that MMEngine's Runner puts beside the weights."""
    return {
        "meta": {"epoch": 12, "iter": 7330, "seed": np.int64(1), "dataset_meta": {"classes": ("zero", "one")}},
        "state_dict": OrderedDict(state_dict),
        "message_hub": {
            "log_scalars": {"train/loss": HistoryBuffer([1.0, 0.5], [1, 1])},
            "runtime_info": {"loss": np.float32(0.5)},
            "resumed_keys": {"train/loss": True},
        },
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "param_schedulers": [{"last_step": 12}],
    }


# -- A classifier's weights -------------------------------------------------------------------------------------------


def classifier(family: str, variant: str) -> dict[str, torch.Tensor]:
    return weights(golden(family, variant)["state_dict"])


@pytest.mark.parametrize(
    ("family", "variant", "config"),
    [
        pytest.param("vmamba", "vmamba_tiny_s1l8", {}, marks=pytest.mark.slow),
        ("efficientvmamba", "efficientvmamba_tiny", {}),
        ("msvmamba", "msvmamba_nano", {}),
        pytest.param("spatialmamba", "spatialmamba_tiny", {}, marks=pytest.mark.slow),
        ("vim", "vim_tiny_patch16_224", {"type": "VimSegBackbone", "img_size": 320}),
        ("vim", "vim_tiny_patch16_224", {"type": "VimDetBackbone", "img_size": 320}),
        ("plainmamba", "plainmamba_l1", {"type": "PlainMambaSegBackbone"}),
    ],
)
def test_published_classifier(family, variant, config, save, log):
    file = save({"model": classifier(family, variant)})
    config = {"type": "MambaBackbone", "model_name": variant, **config}
    backbone = build(config, pretrained=file)
    parts = {key: x for key, x in backbone.state_dict().items() if not key.startswith("model.")}
    backbone.init_weights()

    kwargs = {"class_token": "none", "img_size": 320} if family == "vim" else {}
    model = timm.create_model(variant, pretrained=True, pretrained_cfg_overlay={"file": file}, **kwargs)
    found = backbone.model.state_dict()
    dropped = {key.partition(".")[0] for key in model.state_dict()} - {key.partition(".")[0] for key in found}
    assert dropped == ({"head"} if config["type"] in ("VimSegBackbone", "PlainMambaSegBackbone") else {"head", "norm"})
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in found.items())
    # What a classifier has not is as it was.
    assert same({key: x for key, x in backbone.state_dict().items() if not key.startswith("model.")}, parts)
    ignored = ", ".join(f"{name}.*" for name in sorted(dropped))
    assert log == [f"{variant}: loaded {len(found)}/{len(found)} tensors of {file}, ignored {ignored}"]


def test_our_own_classifier_of_other_classes(save):
    own = timm.create_model("test_vmamba", num_classes=7).state_dict()
    backbone = build(pretrained=save({"state_dict": own, "epoch": 3}))
    backbone.init_weights()
    assert all(torch.equal(x, own[key]) for key, x in backbone.model.state_dict().items())


@pytest.mark.parametrize("said", [True, "true", "efficientvmamba_tiny.in1k", "efficientvmamba_tiny"])
def test_by_name(said, tmp_path, monkeypatch):
    monkeypatch.setenv("VMAMBA_CHECKPOINTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # where files that were seen are remembered
    published = classifier("efficientvmamba", "efficientvmamba_tiny")
    torch.save({"state_dict": published}, tmp_path / find("efficientvmamba_tiny.in1k").file_name)
    backbone = build({"type": "MambaBackbone", "model_name": "efficientvmamba_tiny"}, pretrained=said)
    backbone.init_weights()
    assert torch.equal(backbone.model.stem.conv.weight, published["patch_embed.0.weight"])


def test_init_cfg_says_the_same(save):
    own = timm.create_model("test_vmamba").state_dict()
    file = save(own)
    said = {"type": "Pretrained", "checkpoint": file}
    for init_cfg in (said, [said]):
        backbone = build(init_cfg=init_cfg)
        backbone.init_weights()
        assert torch.equal(backbone.model.stem.conv1.weight, own["stem.conv1.weight"])
    with pytest.raises(UserError, match=r"both pretrained=.* and init_cfg name weights"):
        build(pretrained=file, init_cfg={"type": "Pretrained", "checkpoint": file})


def test_nothing_is_drawn_anew_without_weights():
    backbone = build(pretrained=None)
    before = copy.deepcopy(backbone.state_dict())
    backbone.init_weights()
    assert same(backbone.state_dict(), before)


def test_a_detector_loads_its_backbone_when_it_is_initialised(save):
    own = timm.create_model("test_vmamba").state_dict()
    detector = Detector({**SMALL, "pretrained": save(own)})
    detector.init_weights()
    assert torch.equal(detector.backbone.model.stem.conv1.weight, own["stem.conv1.weight"])
    assert detector.backbone.is_init


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("absent.pth", "pretrained='absent.pth' is neither a file, a URL nor the name of weights"),
        ("vmamba_tiny_s1l8.in1", "did you mean vmamba_tiny_s1l8.in1k"),
        ("resnet50.a1_in1k", "is neither a file"),
        (True, "No pretrained weights exist"),
    ],
)
def test_weights_that_are_nowhere(pretrained, message):
    with pytest.raises(UserError, match=message) as error:
        build(pretrained=pretrained).init_weights()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: timm.create_model("test_vanilla_vmamba").state_dict(), "does not fit this model: .* missing"),
        (lambda: timm.create_model("test_vmamba", depths=(1, 1, 2, 1)).state_dict(), "unexpected .stages.2.blocks.1"),
        (lambda: timm.create_model("test_vmamba", embed_dim=32).state_dict(), "of another shape"),
        (lambda: {}, "holds no weights"),
        (lambda: {"meta": {"epoch": 1}}, "holds no weights"),
    ],
)
def test_wrong_weights(content, message, save):
    file = save(content())
    with pytest.raises(CheckpointError, match=message) as error:
        build(pretrained=file).init_weights()
    assert str(error.value).startswith(f"{file} for test_vmamba: ")
    assert "\n" not in str(error.value)


# -- Detectors and segmentors -----------------------------------------------------------------------------------------


class Detector(BaseModel):
    """What has a backbone, a neck and a head, as detectors and segmentors have."""

    def __init__(self, backbone: dict) -> None:
        super().__init__()
        self.backbone = build(backbone)
        self.neck = nn.Conv2d(self.backbone.channels[0], 8, 1)
        self.bbox_head = nn.Linear(8, 2)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return self.bbox_head(self.neck(self.backbone(inputs)[0]).mean((2, 3)))


def whole(detector: nn.Module, backbone: dict) -> dict:
    """A detector's weights: the given ones of the backbone, twos elsewhere."""
    rest = {key: torch.full_like(x, 2) for key, x in detector.state_dict().items() if not key.startswith("backbone.")}
    return {f"backbone.{key}": x for key, x in backbone.items()} | rest


def case(variant: str) -> Published:
    return next(c for c in (*HIERARCHICAL, *VIM, *PLAINMAMBA_SEG) if c.variant == variant)


CASES = ["efficientvmamba_tiny", "vim_seg_tiny", "vim_det_tiny@192x192", "plainmamba_seg_l1"]


@pytest.mark.parametrize("variant", CASES)
def test_published_detector(variant, save):
    published = case(variant)
    detector = Detector(published.config)
    file = save(written_by_mmengine(whole(detector, published_weights(published))))
    load_checkpoint(detector, file, map_location="cpu")

    found = copy.deepcopy(detector.state_dict())
    detector.backbone.load_state_dict(published_weights(published), strict=True)
    assert same(found, detector.state_dict())
    assert (detector.neck.weight == 2).all()
    # Once more from what MMEngine saves of it.
    save_checkpoint({"state_dict": found, "meta": {}}, file)
    for p in detector.parameters():
        nn.init.ones_(p)
    load_checkpoint(detector, file, map_location="cpu")
    assert same(found, detector.state_dict())


@pytest.mark.parametrize("own", [False, True])
def test_detectors_weights_start_another(own, save, log):
    published = case("vim_det_tiny@192x192")
    detector = Detector(published.config)
    detector.backbone.load_state_dict(published_weights(published))
    content = detector.state_dict() if own else whole(detector, published_weights(published))
    file = save(written_by_mmengine(content))
    backbone = build(published.config, pretrained=file)
    backbone.init_weights()
    assert same(backbone.state_dict(), detector.backbone.state_dict())
    count = len(backbone.state_dict())
    assert log == [f"vim_tiny_patch16_224: loaded {count}/{count} tensors of {file}, ignored bbox_head.*, neck.*"]


def test_vim_is_resized_to_its_own_grid():
    published = case("vim_det_tiny@192x192")
    backbone = build(published.config, img_size=(128, 320))
    backbone.load_state_dict(published_weights(published))
    assert backbone.model.pos_embed.shape == (1, 8, 20, 192)
    again = build(published.config, img_size=(320, 320))
    again.load_state_dict(backbone.state_dict())
    assert again.model.pos_embed.shape == (1, 20, 20, 192)


LAYOUTS = ["vmamba_tiny_s1l8", "vmamba_tiny_s2l5", "vanilla_vmamba_tiny", "efficientvmamba_tiny", "msvmamba_nano"]
LAYOUTS += ["msvmambav3_tiny", "spatialmamba_tiny", "vim_seg_tiny", "vim_det_tiny", "plainmamba_seg_l1"]


def test_no_backbone_takes_anothers_weights():
    with torch.device("meta"):
        backbones = {variant: case(variant).build() for variant in LAYOUTS}
    for variant in LAYOUTS:
        published = without_prefix(placeholders(case(variant).layout))
        for other, backbone in backbones.items():
            if other == variant:
                backbone.load_state_dict(published)
                continue
            with pytest.raises(CheckpointError, match=rf"backbone for {backbone.model_name}: ") as error:
                backbone.load_state_dict(published, strict=False)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda sd: {k: x for k, x in sd.items() if not k.startswith("backbone.")}, "there is none: .*'backbone.'"),
        (lambda sd: timm.create_model("test_vmamba").state_dict(), "there is none: .*argument pretrained"),
        (lambda sd: {k: x for k, x in sd.items() if "outnorm2" not in k}, r"2 missing \(outnorm2.weight"),
        (lambda sd: sd | {"backbone.model.stages.9.w": torch.zeros(1)}, r"1 unexpected \(model.stages.9.w"),
        (
            lambda sd: sd | {"backbone.outnorm0.weight": torch.zeros(3)},
            r"outnorm0.weight is \(3,\), expected \(16,\)",
        ),
    ],
)
def test_wrong_detector_through_mmengine(wrong, message, save):
    detector = Detector(SMALL)
    before = copy.deepcopy(detector.state_dict())
    file = save(written_by_mmengine(wrong(detector.state_dict())))
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(detector, file)
    assert str(error.value).startswith("the checkpoint's backbone for test_vmamba: ")
    assert "\n" not in str(error.value)
    assert same(detector.backbone.state_dict(), {k[9:]: x for k, x in before.items() if k.startswith("backbone.")})


@pytest.mark.parametrize("package", ["mmdet", "mmseg"])
def test_published_file_in_a_real_one(package, save):
    pytest.importorskip(package, reason="needs the mm extra")
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    folder, name = {"mmdet": ("detection", "mask_rcnn_1x"), "mmseg": ("segmentation", "upernet_160k")}[package]
    config = Config.fromfile(ROOT / "configs" / folder / f"msvmamba_nano_{name}.py")
    init_default_scope(package)
    model = MODELS.build({**config.model, "_scope_": package})
    published = published_weights(case("msvmamba_nano"))
    load_checkpoint(model, save(written_by_mmengine(whole(model, published))), strict=True)
    found = copy.deepcopy(model.backbone.state_dict())
    model.backbone.load_state_dict(published)
    assert same(found, model.backbone.state_dict())
