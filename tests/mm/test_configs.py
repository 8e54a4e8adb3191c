"""The configurations: they build, cost what their authors say, start and decay as published, and find their data."""

import functools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch

pytest.importorskip("mmdet", reason="needs the mm extra")
pytest.importorskip("mmseg", reason="needs the mm extra")

import mmengine.config.utils
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, DefaultScope
from mmengine.structures import InstanceData

from tests.models.golden import golden
from tests.running import ROOT, vmamba
from vmamba.errors import UserError
from vmamba.mm.flops import Cost, build_on_meta, count_dense, published_dense_flops, published_size
from vmamba.mm.optim import LayerDecayConstructor

FOLDER = ROOT / "configs"
DEMOS = "digits_"  # their tests train them
NAMES = sorted(
    path.stem
    for kind in ("detection", "segmentation")
    for path in (FOLDER / kind).glob("*.py")
    if not path.stem.startswith(DEMOS)
)


@pytest.fixture(scope="module", autouse=True)
def _quick_bases():
    """MMEngine reads all of MMDetection's model cards for each base it looks up; here it reads each once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmengine.config.utils, "load", functools.cache(mmengine.config.utils.load))
        yield


@functools.cache
def settings(name: str) -> Config:
    (path,) = (path for kind in ("detection", "segmentation") for path in (FOLDER / kind).glob(f"{name}.py"))
    return Config.fromfile(path)


_BUILT: dict[str, torch.nn.Module] = {}


def built(name: str) -> torch.nn.Module:
    """The model on the meta device; configurations of the same model share it."""
    model = model_of(name)
    if model not in _BUILT:
        _BUILT[model] = build_on_meta(settings(name))
    return _BUILT[model]


def model_of(name: str) -> str:
    """What a configuration builds."""
    return json.dumps(settings(name).model.to_dict(), sort_keys=True)


# ---------------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of the table in configs/README.md; costs in millions and in thousands of millions."""

    image: str
    published_params: str
    params: str
    published_flops: str
    flops: str
    macs: str
    result: str
    note: str


def table() -> dict[str, Row]:
    lines = (FOLDER / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| [")]
    return {Path(re.findall(r"\((.*)\)", name)[0]).stem: Row(*rest) for name, *rest in cells}


TABLE = table()

# What the notes below the table explain. All other published figures are met to their last digit.
LAST_DIGIT, CUT_OFF = "b", "d"
OTHER_PARAMS = {"e", "g", "j"}
OTHER_FLOPS = {"c", "h", "i"}

# One of each family and detector; all others are slow.
QUICK = {
    "efficientvmamba_tiny_mask_rcnn_1x",
    "efficientvmamba_base_retinanet_1x",
    "efficientvmamba_small_upernet_160k",
    "msvmamba_micro_mask_rcnn_1x",
    "msvmamba_micro_upernet_160k",
    "plainmamba_l1_mask_rcnn_1x",
    "plainmamba_l1_upernet_160k",
    "spatialmamba_tiny_mask_rcnn_1x",
    "spatialmamba_tiny_upernet_160k",
    "vanilla_vmamba_tiny_mask_rcnn_1x",
    "vanilla_vmamba_tiny_upernet_160k",
    "vim_tiny_cascade_mask_rcnn_100ep",
    "vim_tiny_upernet_60k",
    "vmamba_tiny_s1l8_mask_rcnn_1x",
    "vmamba_tiny_s1l8_upernet_160k",
}


def meets(found: float, published: str, note: str) -> bool:
    """Whether a cost is the published one, to the digits that are given."""
    digits = len(published.partition(".")[2])
    if CUT_OFF in note.split():
        return published in (f"{found:.{digits}f}", f"{math.floor(found * 10**digits) / 10**digits:.{digits}f}")
    if LAST_DIGIT in note.split() and digits == 3:
        return found == pytest.approx(float(published), rel=1e-5)
    return f"{found:.{digits}f}" == published


def test_the_table_has_every_configuration():
    assert sorted(TABLE) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name):
    row = TABLE[name]
    params = sum(x.numel() for x in built(name).parameters()) / 1e6
    assert f"{params:.3f}" == row.params
    if row.published_params and not OTHER_PARAMS & set(row.note.split()):
        assert meets(params, row.published_params, row.note)


@pytest.mark.parametrize("name", [pytest.param(x, marks=[] if x in QUICK else [pytest.mark.slow]) for x in NAMES])
def test_operations(name):
    row = TABLE[name]
    height, width, cost, published = costs(model_of(name), name)
    assert (f"{height}x{width}", f"{cost.macs / 1e9:.3f}") == (row.image, row.macs)
    assert row.flops == ("" if published is None else f"{published / 1e9:.3f}")
    if row.published_flops and not OTHER_FLOPS & set(row.note.split()):
        assert meets(published / 1e9, row.published_flops, row.note)


@pytest.mark.parametrize("name", ["vim_tiny_cascade_mask_rcnn_100ep", "vim_base_mask_rcnn_100ep"])
@pytest.mark.parametrize("training", [False, True])
def test_vims_detectors_see_squares_of_one_size(name, training):
    """In tests too: the position embedding was trained on no other grid."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        preprocessor = MODELS.build(settings(name).model.data_preprocessor)
    sample = DetDataSample(metainfo={"img_shape": (683, 1024)})
    sample.gt_instances = InstanceData(masks=BitmapMasks(np.zeros((1, 683, 1024), np.uint8), 683, 1024))
    data = preprocessor({"inputs": [torch.zeros(3, 683, 1024)], "data_samples": [sample]}, training)
    assert data["inputs"].shape == (1, 3, 1024, 1024)
    (sample,) = data["data_samples"]
    assert sample.batch_input_shape == (1024, 1024)
    assert not training or sample.gt_instances.masks.masks.shape == (1, 1024, 1024)


_COSTS: dict[str, tuple[int, int, Cost, int | None]] = {}


def costs(model: str, name: str) -> tuple[int, int, Cost, int | None]:
    if model not in _COSTS:
        size = published_size(settings(name))
        _COSTS[model] = (*size, count_dense(built(name), *size), published_dense_flops(built(name), *size))
    return _COSTS[model]


def test_the_command_counts_at_any_size():
    result = vmamba("flops-dense", "efficientvmamba_tiny_upernet_160k", "--size", 96, 100)
    assert result.status == 0
    name, image, params, published, macs = result.out.splitlines()[-1].split()
    assert (name, image, params) == ("efficientvmamba_tiny_upernet_160k", "96x100", "14.487")
    assert 0 < float(macs) < float(published) * 1.1 < 3


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

LR = 1e-4


def groups(name: str) -> dict[str, tuple[float, float]]:
    """(weight decay, learning rate) of every parameter, as fractions of the configuration's."""
    wrapper = settings(name).optim_wrapper
    optimizer = wrapper.optimizer
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        {
            "type": wrapper.get("constructor", "DefaultOptimWrapperConstructor"),
            "optim_wrapper_cfg": {"type": "OptimWrapper", "optimizer": dict(optimizer)},
            "paramwise_cfg": wrapper.paramwise_cfg.to_dict(),
        }
    )
    model = built(name)
    names = {id(x): key for key, x in model.named_parameters()}
    return {
        names[id(x)]: (group["weight_decay"] / optimizer.weight_decay, group["lr"] / optimizer.lr)
        for group in constructor(model).optimizer.param_groups
        for x in group["params"]
    }


def published_names(family: str, variant: str, name: str) -> dict[str, tuple[str, int]]:
    """What the parameters of a configuration's backbone were published as, and with how many dimensions.

    Every published tensor is filled with its own number, which its parameter here then has.
    """
    entries = golden(family, variant)["state_dict"]
    numbered = {key: torch.tensor(float(i)).expand(shape) for i, (key, shape, _) in enumerate(entries)}
    backbone = built(name).backbone
    converted = backbone.filter_fn(numbered, backbone.model)
    return {
        f"backbone.model.{key}": (entries[int(value.flatten()[0])][0], len(entries[int(value.flatten()[0])][1]))
        for key, value in converted.items()
        if key in dict(backbone.model.named_parameters())
    }


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("vmamba", "vmamba_tiny_s1l8"),
        ("vmamba", "vanilla_vmamba_tiny"),
        ("efficientvmamba", "efficientvmamba_tiny"),
        ("msvmamba", "msvmamba_nano"),
        ("spatialmamba", "spatialmamba_tiny"),
    ],
)
@pytest.mark.parametrize("kind", ["mask_rcnn_1x", "upernet_160k"])
def test_what_is_called_norm_in_published_models_does_not_decay(family, variant, kind):
    name = f"{variant}_{kind}"
    published = published_names(family, variant, name)
    assert len(published) > 100
    expected = {key for key, (old, _) in published.items() if "norm" in old}
    found = groups(name)
    assert {key for key in published if found[key][0] == 0} == expected
    assert all(found[f"backbone.outnorm{i}.weight"][0] == 0 for i in range(4))
    assert {rate for _, rate in found.values()} == {1}


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("mask_rcnn_1x", r"level_embed|pos_embed|norm|bias|A_log|D|direction_Bs"),
        ("retinanet_1x", r"level_embed|pos_embed|norm|bias|A_log|D|direction_Bs"),
        ("upernet_160k", r"norm|pos_embed|A_log|D|direction_Bs"),
    ],
)
def test_plainmamba_decays_as_published(kind, rule):
    name = f"plainmamba_l1_{kind}"
    published = published_names("plainmamba", "plainmamba_l1", name)
    found = groups(name)
    expected = {key for key, (old, _) in published.items() if re.search(rule, old)}
    assert {key for key in published if found[key][0] == 0} == expected
    others = set(found) - set(published)
    beside = {key for key in others if key.startswith("backbone.") and found[key][0] == 0}
    assert beside == {key for key in others if key.startswith("backbone.") and re.search(rule, key)}


@pytest.mark.parametrize(("size", "rate"), [("tiny", 0.92), ("small", 0.95)])
def test_vim_segments_with_the_published_rates(size, rate):
    name = f"vim_{size}_upernet_60k"
    published = published_names("vim", f"vim_{size}_patch16_224", name)
    found = groups(name)
    slow = {key for key, (_, lr) in found.items() if lr != 1}
    assert slow == {key for key, (old, _) in published.items() if re.match(r"patch_embed|pos_embed", old)}
    assert {found[key][1] for key in slow} == {rate**25}
    learning = {key: old for key, old in published.items() if key in found}
    expected = {key for key, (old, dim) in learning.items() if dim == 1 or old.endswith(".bias")}
    assert {key for key in learning if found[key][0] == 0} == expected


def test_vim_detects_with_rates_that_fall_from_layer_to_layer():
    found = groups("vim_tiny_cascade_mask_rcnn_100ep")
    assert {key for key, (decay, _) in found.items() if decay == 0} == {"backbone.model.pos_embed"}
    rates = {key: lr for key, (_, lr) in found.items()}
    assert rates["backbone.model.pos_embed"] == pytest.approx(0.7**25)
    assert rates["backbone.model.stem.conv.weight"] == pytest.approx(0.7**25)
    for i in range(24):
        assert rates[f"backbone.model.blocks.{i}.mixer.ssm.A_log"] == pytest.approx(0.7 ** (24 - i))
    assert {lr for key, lr in rates.items() if not key.startswith("backbone.model.")} == {1}


def test_layer_decay_needs_layers():
    constructor = LayerDecayConstructor(
        {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": LR, "weight_decay": 0.1}}, {"decay_rate": 0.7}
    )
    with pytest.raises(UserError, match="layer decay needs a backbone of this package, and Linear has none"):
        constructor(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", NAMES)
def test_starts_from_the_published_classifier(name):
    backbone = settings(name).model.backbone
    assert backbone.pretrained == f"{backbone.model_name}.in1k"
    assert backbone.pretrained in timm.list_pretrained()


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_pipelines_build_and_nothing_is_tied_to_a_machine(name):
    cfg = settings(name)
    assert not re.search(r'"(/|[A-Z]:)', json.dumps(cfg.to_dict()))
    pipelines = [cfg[f"{split}_dataloader"].dataset.pipeline for split in ("train", "val", "test")]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        for pipeline in [*pipelines, *([cfg.tta_pipeline] if "tta_pipeline" in cfg else [])]:
            assert len(Compose(pipeline).transforms) == len(pipeline)


@pytest.mark.parametrize(
    "name", ["vmamba_tiny_s1l8_mask_rcnn_3x", "plainmamba_l1_retinanet_1x", "vim_base_mask_rcnn_100ep"]
)
def test_coco_is_where_the_environment_says(name, monkeypatch):
    assert settings(name).train_dataloader.dataset.data_root == "data/coco/"
    monkeypatch.setenv("COCO_ROOT", "elsewhere/coco")
    cfg = settings.__wrapped__(name)
    roots = {cfg[f"{split}_dataloader"].dataset.data_root for split in ("train", "val", "test")}
    assert roots == {"elsewhere/coco/"}
    files = {cfg[f"{split}_evaluator"].ann_file for split in ("val", "test")}
    assert files == {"elsewhere/coco/annotations/instances_val2017.json"}


@pytest.mark.parametrize("name", ["spatialmamba_base_upernet_160k", "vmamba_small_s2l15_upernet_160k_640"])
def test_ade20k_is_where_the_environment_says(name, monkeypatch):
    monkeypatch.setenv("ADE20K_ROOT", "elsewhere/ade")
    cfg = settings.__wrapped__(name)
    assert {cfg[f"{split}_dataloader"].dataset.data_root for split in ("train", "val", "test")} == {"elsewhere/ade"}


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_schedules_end_with_training_and_steps_have_the_published_size(name):
    cfg = settings(name)
    loop = cfg.train_cfg
    warm_up, main = cfg.param_scheduler
    assert main.end == loop.get("max_epochs", loop.get("max_iters"))
    assert (not warm_up.by_epoch, main.by_epoch) == (True, "max_epochs" in loop)
    processes = 4 if "vim" in name and cfg.default_scope == "mmseg" else 8
    assert cfg.train_dataloader.batch_size * processes == cfg.auto_scale_lr.base_batch_size
