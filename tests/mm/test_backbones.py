"""The backbones: the published numbers, images of any size, training, and input they refuse."""

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine", reason="needs the mm extra")

from mmengine.model import convert_sync_batchnorm
from mmengine.registry import MODELS

import vmamba.mm  # noqa: F401  (registers the backbones)
from tests.golden import recipe
from tests.mm.published import (
    HIERARCHICAL,
    PLAINMAMBA_ADAPTER,
    PLAINMAMBA_SEG,
    VIM,
    Published,
    published_weights,
    without_prefix,
)
from tests.models.common import image
from tests.models.golden import TOLERANCE, mismatches, placeholders
from tests.running import ROOT
from vmamba.errors import UserError
from vmamba.mm.packages import MissingPackage
from vmamba.mm.plainmamba_adapter import centres


def has_mmcv() -> bool:
    try:
        import mmcv.ops  # noqa: F401
    except ImportError:
        return False
    return True


NEEDS_MMCV = pytest.mark.skipif(not has_mmcv(), reason="the adapter needs MMCV's operators")

_STRIDE_16 = {"patch_size": 16, "stride": 16, "img_size": 64}
_FOUR = {"out_indices": (0, 1, 2, 3)}
SMALL = {
    "vmamba": {"type": "MambaBackbone", "model_name": "test_vmamba"},
    "efficientvmamba": {"type": "MambaBackbone", "model_name": "test_efficientvmamba"},
    "msvmamba": {"type": "MambaBackbone", "model_name": "test_msvmamba"},
    "spatialmamba": {"type": "MambaBackbone", "model_name": "test_spatialmamba"},
    "vim_seg": {"type": "VimSegBackbone", "model_name": "test_vim", **_STRIDE_16, **_FOUR},
    "vim_det": {"type": "VimDetBackbone", "model_name": "test_vim_rope", "out_channels": 32, **_STRIDE_16},
    "plainmamba_seg": {
        "type": "PlainMambaSegBackbone", "model_name": "test_plainmamba", "patch_size": 8, "img_size": 64, **_FOUR,
    },
    "plainmamba_adapter": {
        "type": "PlainMambaAdapter", "model_name": "test_plainmamba", "patch_size": 8, "img_size": 64,
    },
}  # fmt: skip
"""A small backbone of every kind."""


def kinds(*names: str) -> list:
    return [pytest.param(name, marks=NEEDS_MMCV if name == "plainmamba_adapter" else []) for name in names]


KINDS = kinds(*SMALL)


def build(kind: str, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS.build({**SMALL[kind], **kwargs})


# -- Published numbers ------------------------------------------------------------------------------------------------


def cases(published: list[Published], slow: Callable[[str], bool], *marks: pytest.MarkDecorator) -> list:
    """Parameters of a test, the slow ones marked."""
    return [
        pytest.param(case, id=case.variant, marks=[*marks, pytest.mark.slow] if slow(case.variant) else list(marks))
        for case in published
    ]


def every(slow: Callable[[str], bool]) -> list:
    """All published backbones."""
    plain = [*HIERARCHICAL, *VIM, *PLAINMAMBA_SEG]
    return [*cases(plain, slow), *cases(PLAINMAMBA_ADAPTER, slow, NEEDS_MMCV)]


def is_large(variant: str) -> bool:
    return any(size in variant for size in ("small", "base", "l2", "l3"))


def has_a_smaller_twin(variant: str) -> bool:
    return variant in ("vanilla_vmamba_tiny", "msvmambav3_tiny", "vim_seg_small@128x128")


WITH_OUTPUTS = [case for case in every(has_a_smaller_twin) if "outputs" in case.values[0].data]


@pytest.mark.parametrize("case", WITH_OUTPUTS)
def test_maps(case):
    data = case.data
    backbone = case.build().eval()
    backbone.load_state_dict(published_weights(case))
    x = torch.from_numpy(recipe.image(**data["input"]))
    expected = {name: summary for name, summary in data["outputs"].items() if name.strip("0123456789") in ("feat", "p")}

    with torch.no_grad():
        outputs = dict(zip(expected, backbone(x), strict=True))
        if "last_feat" in data["outputs"]:
            expected["last_feat"] = data["outputs"]["last_feat"]
            outputs["last_feat"] = backbone.last_map(x)

    errors = mismatches(outputs, expected)
    assert max(errors.values()) < TOLERANCE, errors


PARAMETERS = {
    "vanilla_vmamba_tiny": 22_125_792,
    "vanilla_vmamba_small": 43_649_760,
    "vanilla_vmamba_base": 75_230_848,
    "vmamba_tiny_s2l5": 29_938_176,
    "vmamba_small_s2l15": 49_380_096,
    "vmamba_base_s2l15": 87_534_592,
    "vmamba_tiny_s1l8": 29_481_408,
    "vmamba_small_s1l20": 48_245_184,
    "vmamba_base_s1l20": 85_591_296,
    "efficientvmamba_tiny": 6_109_332,
    "efficientvmamba_small": 10_761_584,
    "efficientvmamba_base": 32_949_480,
    "msvmamba_nano": 6_479_808,
    "msvmamba_micro": 11_367_168,
    "msvmamba_tiny": 32_278_656,
    "msvmambav3_tiny": 31_496_064,
    "msvmambav3_small": 49_448_640,
    "msvmambav3_base": 89_568_768,
    "spatialmamba_tiny": 26_236_758,
    "spatialmamba_small": 42_562_176,
    "spatialmamba_base": 94_977_936,
}
"""Of the published backbones of four stages; golden files of the others count the dense model."""


@pytest.mark.parametrize("case", every(is_large))
def test_layout_maps_one_to_one(case):
    with torch.device("meta"):
        backbone = case.build()
    published = without_prefix(placeholders(case.layout))
    backbone.load_state_dict(published, strict=True)

    computed = case.data.get("computed", {})
    assert sum(x.numel() for x in backbone.state_dict().values()) == sum(
        x.numel() for key, x in published.items() if key not in computed
    )
    counted = sum(p.numel() for p in backbone.parameters())
    assert counted == (PARAMETERS[case.variant] if case in HIERARCHICAL else case.data["params"])


def test_every_norm_has_the_published_epsilon():
    epsilons = {
        kind: {
            m.eps
            for name, m in build(kind).named_modules()
            if isinstance(m, nn.LayerNorm) and not name.startswith("model.")
        }
        for kind in ("vmamba", "plainmamba_seg", "vim_det")
    }
    assert epsilons == {"vmamba": {1e-5}, "plainmamba_seg": {1e-6}, "vim_det": {1e-6}}


@NEEDS_MMCV
def test_every_norm_of_the_adapter_has_the_published_epsilon():
    adapter = build("plainmamba_adapter")
    assert {m.eps for m in adapter.interactions.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.eps for m in adapter.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}


# -- Maps -------------------------------------------------------------------------------------------------------------


def sizes(x) -> list[tuple[int, ...]]:
    return [tuple(y.shape[2:]) for y in x]


@pytest.mark.parametrize("size", [(64, 96), (17, 41)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_size(kind, size):
    backbone = build(kind).eval()
    with torch.no_grad():
        maps = backbone(image(1, 3, *size))
    assert [x.shape[1] for x in maps] == backbone.channels == backbone.num_features
    assert all(x.isfinite().all() for x in maps)
    if size == (64, 96):
        strides = {"vim_det": (4, 8, 16, 32, 64), "plainmamba_seg": (16,) * 4}.get(kind, (4, 8, 16, 32))
        assert sizes(maps) == [(-(-64 // s), -(-96 // s)) for s in strides]


@NEEDS_MMCV
def test_the_adapters_maps_are_rounded_up():
    assert sizes(build("plainmamba_adapter").eval()(image(1, 3, 67, 101))) == [(17, 26), (9, 13), (5, 7), (3, 4)]


def test_vim_of_stride_8():
    backbone = build("vim_seg", stride=8).eval()
    assert sizes(backbone(image(1, 3, 72, 136))) == [(16, 32), (8, 16), (4, 8), (2, 4)]


def test_places_are_centres_of_cells():
    places = centres([(1, 2), (2, 1)], torch.device("cpu"))
    assert places.flatten(0, 2).tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]


def test_some_stages_alone():
    x = image(1, 3, 32, 48)
    every, some = build("vmamba").eval(), build("vmamba", out_indices=(0, 2)).eval()
    assert some.channels == [16, 64]
    some.load_state_dict({k: v for k, v in every.state_dict().items() if not k.startswith(("outnorm1", "outnorm3"))})
    assert all(torch.equal(a, b) for a, b in zip(some(x), every(x)[::2], strict=True))


def test_without_out_norms():
    backbone = build("vmamba", out_norm=False).eval()
    x = image(1, 3, 32, 48)
    maps = backbone.model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), maps, strict=True))


# -- Training ---------------------------------------------------------------------------------------------------------


def backward(backbone: nn.Module, x: torch.Tensor) -> None:
    """Gradients of a sum that every number of every map is part of, with a weight of its own."""
    maps = backbone(x)
    sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in maps).backward()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_that_learns_is_used(kind):
    """So DistributedDataParallel need not look for unused ones."""
    backbone = build(kind)
    backward(backbone, image(2, 3, 32, 48))
    assert [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("kwargs", [{"out_indices": (0, 1)}, {"out_indices": (1,)}])
@pytest.mark.parametrize("kind", ["vmamba", "plainmamba_seg"])
def test_what_no_map_needs_does_not_learn(kind, kwargs):
    backbone = build(kind, **kwargs)
    backward(backbone, image(2, 3, 32, 48))
    assert [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("kind", kinds("vmamba", "vim_det", "plainmamba_adapter"))
def test_activation_checkpointing_changes_nothing(kind):
    x = image(2, 3, 32, 48)
    gradients = []
    for with_cp in (False, True):
        backbone = build(kind, with_cp=with_cp)
        backward(backbone, x)
        gradients.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("kind", kinds("vmamba", "spatialmamba", "vim_seg", "plainmamba_adapter"))
def test_frozen_stages(kind):
    backbone = build(kind, frozen_stages=2, with_cp=True, drop_path_rate=0.5).train()
    model = backbone.model
    parts = list(model.stages if hasattr(model, "stages") else model.blocks)
    frozen = [model.stem, *parts[:2]]
    assert not any(m.training for part in frozen for m in part.modules())
    assert all(m.training for part in parts[2:] for m in part.modules())
    before = {name: value.clone() for name, value in model.stem.state_dict().items()}
    backward(backbone, image(2, 3, 32, 48))
    assert all(p.grad is None for part in frozen for p in part.parameters())
    assert all(p.grad is not None for part in parts[2:] for p in part.parameters())
    assert getattr(model, "pos_embed", None) is None or model.pos_embed.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.stem.state_dict().items())
    assert not any(m.training for m in backbone.eval().modules())


def test_nothing_is_frozen_unless_asked():
    backbone = build("vmamba").train()
    assert all(p.requires_grad for p in backbone.parameters())
    assert all(m.training for m in backbone.modules())
    stem_alone = build("vmamba", frozen_stages=0)
    learns = {name for name, p in stem_alone.named_parameters() if not p.requires_grad}
    assert learns == {f"model.stem.{name}" for name, _ in stem_alone.model.stem.named_parameters()}


def test_drop_path_reaches_the_model():
    model = build("vmamba", drop_path_rate=0.3).model
    rates = [getattr(stage.blocks[-1].drop_path, "drop_prob", 0.0) for stage in model.stages]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("kind", kinds("vmamba", "plainmamba_adapter"))
def test_copies_are_apart(kind):
    backbone = build(kind).eval()
    twin = copy.deepcopy(backbone)
    x = image(1, 3, 32, 48)
    expected = backbone(x)
    assert all(torch.equal(a, b) for a, b in zip(twin(x), expected, strict=True))
    twin.load_state_dict(build(kind, seed=1).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), expected, strict=True))
    assert not torch.equal(twin(x)[0], expected[0])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (*kind.values, dtype) if not kind.marks else pytest.param(*kind.values, dtype, marks=kind.marks)
        for kind, dtype in zip(KINDS, itertools.cycle([torch.float16, torch.bfloat16]))
    ],
)
def test_autocast(kind, dtype):
    backbone = build(kind)
    x = image(2, 3, 32, 48)
    expected = backbone(x)
    with torch.autocast("cpu", dtype=dtype):
        maps = backbone(x)
        loss = sum(y.float().square().mean() for y in maps)
    loss.backward()
    for y, reference in zip(maps, expected, strict=True):
        assert (y - reference).abs().mean() < 0.1 * reference.std()
    assert all(p.grad.isfinite().all() for p in backbone.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", kinds("spatialmamba", "vim_seg", "plainmamba_seg", "plainmamba_adapter"))
def test_synchronised_norms_take_the_place_of_common_ones(kind):
    backbone = build(kind).eval()
    x = image(2, 3, 32, 48)
    expected = backbone(x)
    converted = convert_sync_batchnorm(backbone, "torch")
    converted.train()  # what would be lost is missed here
    assert all(torch.equal(a, b) for a, b in zip(converted.eval()(x), expected, strict=True))


def test_synchronised_norms_that_lose_an_activation():
    converted = convert_sync_batchnorm(build("efficientvmamba"), "torch")
    with pytest.raises(UserError, match=r"sync_bn replaced the norm 'stages\.2\.blocks\.0\.bn1'"):
        converted.train()


# -- Registration and mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["mmdet", "mmseg"])
def test_both_packages_find_the_backbones(package):
    registry = pytest.importorskip(f"{package}.registry", reason="needs the mm extra")
    assert registry.MODELS.build(SMALL["vmamba"]).channels == [16, 32, 64, 128]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("vmamba", {"model_name": "vmamba_tny"}, "unknown model 'vmamba_tny'.*did you mean vmamba_tiny"),
        ("vmamba", {"model_name": "resnet50"}, "unknown model 'resnet50'"),
        ("vmamba", {"model_name": "test_vim"}, "takes a HierarchicalBackbone, and 'test_vim' is a Vim"),
        ("vim_seg", {"model_name": "test_vmamba"}, "takes a Vim, and 'test_vmamba' is a VMamba"),
        ("vmamba", {"embed_dims": 96}, "cannot be built: .*'embed_dims'.*_delete_=True"),
        ("vmamba", {"frozen_stages": 5}, "frozen_stages is 5, but 'test_vmamba' has 4"),
        ("vmamba", {"out_indices": (2, 1)}, r"must rise from 0 to at most 3, got \(2, 1\)"),
        ("vmamba", {"out_indices": (0, 4)}, r"must rise from 0 to at most 3, got \(0, 4\)"),
        ("vmamba", {"out_indices": ()}, r"must rise from 0 to at most 3, got \(\)"),
        ("plainmamba_seg", {"out_indices": (0, 9)}, r"must rise from 0 to at most 3, got \(0, 9\)"),
        ("vim_seg", {"out_indices": (0, 1, 2)}, r"out_indices must be four .* got \(0, 1, 2\)"),
        ("vim_seg", {"out_indices": (0, 1, 2, 9)}, r"must rise from 0 to at most 3, got \(0, 1, 2, 9\)"),
        ("vim_seg", {"stride": 4}, "of stride 16 or 8, got one of 4"),
        ("vim_det", {"stride": 8}, "of stride 16, got one of 8"),
        ("vmamba", {"init_cfg": {"type": "Kaiming"}}, "expected dict.type='Pretrained'"),
        ("vmamba", {"init_cfg": [{"type": "Pretrained", "checkpoint": "x"}] * 2}, "expected dict.type='Pretrained'"),
        ("vmamba", {"num_classes": 5}, "has no classifier; give num_classes to the heads"),
    ],
)
def test_one_line_for_a_mistaken_config(kind, changes, message):
    with pytest.raises(UserError, match=message) as error:
        build(kind, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (1, 3, 0, 32), (3, 32, 32), (0, 3, 32, 32)])
def test_one_line_for_images_that_are_none(shape):
    with pytest.raises(UserError, match=r"images are of shape .*, but 'test_vmamba' takes \(batch, 3, height, width\)"):
        build("vmamba")(torch.zeros(shape))


def test_gray_images_with_a_model_for_them():
    assert len(build("vmamba", in_chans=1)(torch.zeros(1, 1, 32, 32))) == 4


@pytest.mark.parametrize("missing", ["mmengine", "mmcv"])
def test_one_line_for_a_missing_package(missing):
    adapter = (
        "from mmengine.registry import MODELS; MODELS.build(dict(type='PlainMambaAdapter', model_name='plainmamba_l1'))"
    )
    code = f"import sys; sys.modules['{missing}'] = None; import vmamba.mm; {adapter}"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{MissingPackage.__module__}.MissingPackage: {missing}")
    assert "pip install 'vmamba[mm]'" in last
