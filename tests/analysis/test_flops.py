"""The FLOP counts against the published tables, and against other counters."""

import math

import pytest
import timm
import torch

from tests.models.common import seeded
from vmamba.analysis.flops import Cost, count, fvcore_handlers, published_flops

# GFLOPs at 224x224, to the last digit that the authors' counter prints.
PUBLISHED = {
    "vanilla_vmamba_tiny": "5.62689504",
    "vanilla_vmamba_small": "11.231522784",
    "vanilla_vmamba_base": "18.020115136",
    "vmamba_tiny_s2l5": "4.85774208",
    "vmamba_small_s2l15": "8.71577472",
    "vmamba_base_s2l15": "15.358944256",
    "vmamba_tiny_s1l8": "4.905609984",
    "vmamba_small_s1l20": "8.612211456",
    "vmamba_base_s1l20": "15.220859904",
}
# At other sizes the tables at hand are rounded, and exact where the authors' counter rounds (1e-4 of vanilla's total).
OTHER_SIZES = [
    ("vanilla_vmamba_tiny", 384, 16.535),
    ("vanilla_vmamba_base", 1024, 376.553),
    ("vmamba_tiny_s2l5", 640, 39.650),
    ("vmamba_tiny_s1l8", 512, 25.626),
    ("vmamba_base_s1l20", 768, 178.912),
]


# GFLOPs at 224x224 by the authors' rule, where their tables and logs show no more digits than these.
ROUNDED = {
    "efficientvmamba_tiny": "0.806",
    "efficientvmamba_small": "1.343",
    "efficientvmamba_base": "3.997",
    "plainmamba_l1": "3.021",
    "plainmamba_l2": "8.089",
    "plainmamba_l3": "14.453",
    "msvmamba_nano": "0.883",
    "msvmamba_micro": "1.532",
    "msvmamba_tiny": "4.613",
    "msvmambav3_tiny": "5.134",  # the README says 5.0, which no variant of its configuration gives
    "msvmambav3_small": "8.772",
    "msvmambav3_base": "16.283",
    "spatialmamba_tiny": "4.468",
    "spatialmamba_small": "7.117",
    "spatialmamba_base": "15.801",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    assert str(published_flops(timm.create_model(name, device="meta")) / 1e9) == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_totals(name):
    assert f"{published_flops(timm.create_model(name, device='meta')) / 1e9:.3f}" == ROUNDED[name]


@pytest.mark.parametrize(("name", "size", "expected"), OTHER_SIZES)
def test_other_sizes(name, size, expected):
    assert published_flops(timm.create_model(name, device="meta"), size) / 1e9 == pytest.approx(expected, rel=1e-4)


def test_fvcore_agrees_with_the_published_rule():
    fvcore = pytest.importorskip("fvcore.nn")
    model = seeded("test_vmamba")
    counter = fvcore.FlopCountAnalysis(model, torch.randn(1, 3, 64, 96)).set_op_handle(**fvcore_handlers())
    counter.set_op_handle("aten::mean", lambda inputs, _: math.prod(inputs[0].type().sizes()))
    counter.unsupported_ops_warnings(False)
    assert counter.total() == published_flops(model, (64, 96))


def test_count_by_hand():
    model = seeded("test_vmamba", depths=(1,), num_classes=0)
    positions, dim, rank = 16 * 16, 16, 1
    stem = 2 * (32 * 32 * 8 * 27 + positions * 16 * 72)
    mixer = 2 * positions * (2 * dim * dim + 9 * dim + 4 * dim * (rank + 2))
    scan = positions * 4 * dim * (9 + 1 + 2 * rank)
    mlp = 2 * positions * 8 * dim * dim
    total = stem + mixer + scan + mlp
    assert count(model, 64) == Cost(params=sum(p.numel() for p in model.parameters()), macs=total // 2, flops=total)


def test_count_serves_any_model_and_leaves_it_as_it_was():
    model = timm.create_model("resnet18").train()
    cost = count(model, (3, 224, 224))
    assert cost.params == 11_689_512
    assert cost.macs == pytest.approx(1.814e9, rel=1e-3)
    assert model.training
    assert next(model.parameters()).device.type == "cpu"


def test_unknown_rule():
    with pytest.raises(ValueError, match="no published rule is known for ResNet"):
        published_flops(timm.create_model("resnet18"))
