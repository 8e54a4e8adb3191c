"""Costs taken apart, two counters against each other, and the table of all models against the one that is kept."""

import csv
import math
from pathlib import Path

import pytest
import timm
import torch

from tests.models.common import seeded
from vmamba.analysis.cost_table import EXCEPTIONS, CostRow, as_csv, cost_row, published_models
from vmamba.analysis.flops import count
from vmamba.analysis.module_costs import break_down

TABLE = Path(__file__).parents[2] / "results" / "flops.csv"

# One of each family and kind of block; the rest are marked slow.
FAST = ("vmamba_tiny_s1l8", "vanilla_vmamba_tiny", "efficientvmamba_tiny", "msvmamba_nano", "vim_tiny_patch16_224")


def kept() -> dict[str, dict[str, str]]:
    with open(TABLE, newline="", encoding="utf-8") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def as_text(row: CostRow) -> dict[str, str]:
    return next(csv.DictReader(as_csv([row]).splitlines()))


def test_parts_add_up():
    model = seeded("test_vmamba")
    parts = {cost.name: cost for cost in break_down(model, 64).modules}
    cost = count(model, 64)
    whole = parts.pop("")
    assert (whole.params, whole.flops) == (cost.params, cost.flops)
    assert next(iter(parts)) == "stem"
    top = [part for part in parts.values() if part.depth == 1]
    assert sum(part.flops for part in top) == cost.flops
    assert sum(part.params for part in top) == cost.params
    stages = [part for part in parts.values() if part.name.startswith("stages.")]
    assert len(stages) == 4
    assert sum(part.flops for part in stages) == parts["stages"].flops
    assert max(part.depth for part in parts.values()) == 2


def test_a_part_by_hand():
    model = seeded("test_vmamba", depths=(1,), num_classes=0)
    parts = {cost.name: cost for cost in break_down(model, 64, depth=5).modules}
    positions, dim = 16 * 16, 16
    mixer = 2 * positions * (2 * dim * dim + 9 * dim + 4 * dim * 3) + positions * 4 * dim * (9 + 1 + 2)
    assert parts["stages.0.blocks.0.mixer"].flops == mixer
    assert parts["stem.conv2"].params == 72 * 16 + 16
    operators = break_down(model, 64).operators
    assert operators["selective_scan_forward"] == positions * 4 * dim * (9 + 1 + 2)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("test_vmamba", {"layer_norm"}),
        ("test_vanilla_vmamba", {"layer_norm"}),
        ("test_vim", set()),
        ("test_plainmamba", {"layer_norm", "batch_norm"}),
        ("test_efficientvmamba", {"layer_norm", "batch_norm"}),
        ("test_msvmamba", {"layer_norm", "upsample_bilinear2d"}),
        ("test_msvmambav3", {"layer_norm", "upsample_nearest2d"}),
        ("test_spatialmamba", {"layer_norm", "batch_norm"}),
        ("test_vit", {"layer_norm"}),
    ],
)
def test_fvcore_and_torch_agree(name, others):
    pytest.importorskip("fvcore.nn", reason="needs fvcore")
    from vmamba.analysis.fvcore_count import count_by_fvcore

    model = timm.create_model(name).train()
    size = 64 if name != "test_vit" else 160
    counted = count_by_fvcore(model, size)
    assert counted.flops == count(model, size).flops
    assert counted.scan_flops == break_down(model, size).operators.get("selective_scan_forward", 0)
    assert set(counted.others) == others
    assert model.training


def check(name: str) -> None:
    """A model's row is what is kept, both counters agree on it, and so does the published figure."""
    row = cost_row(published_models()[name])
    stored = kept()[name]
    assert stored["fvcore_flops"] == stored["flops"]
    assert {**as_text(row), "fvcore_flops": stored["fvcore_flops"]} == stored
    if row.published_g is None:
        assert row.authors_rule is None
        assert "no figure is published" in row.note
        return
    digits = len(str(row.published_g).partition(".")[2])
    rounded = math.isclose(round(row.authors_rule / 1e9, digits), row.published_g)
    assert rounded != (name in EXCEPTIONS)


@pytest.mark.parametrize("name", FAST)
def test_a_row(name):
    check(name)


@pytest.mark.slow
def test_all_rows():
    assert list(kept()) == list(reversed(published_models()))
    for name in published_models():
        if name not in FAST:
            check(name)


def test_other_channels_and_shapes():
    with torch.device("meta"):
        model = timm.create_model("test_vmamba", in_chans=5)
    wide = break_down(model, (5, 32, 96))
    assert wide.modules[0].flops == wide.flops == count(model, (5, 32, 96)).flops
    assert wide.flops != count(model, (5, 64, 96)).flops
