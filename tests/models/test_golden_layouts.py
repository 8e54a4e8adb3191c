"""Every published layout of every family, against the model it is for."""

import importlib

import pytest
import timm
from torch import nn

from tests.models.golden import FOLDER, golden, placeholders, variants
from vmamba.models._checkpoint import check_fit

FAMILIES = sorted(path.name for path in FOLDER.iterdir() if list(path.glob("*.json")))
LAYOUTS = [(family, variant) for family in FAMILIES for variant in variants(family)]


def converted(family: str, variant: str) -> tuple[nn.Module, dict, dict]:
    """A model, the published layout and the layout its filter makes of it; tables that are computed left out."""
    module = importlib.import_module(f"vmamba.models.{family}")
    model = timm.create_model(variant, device="meta")
    data = golden(family, variant)
    published = placeholders(data["state_dict"])
    own = module.checkpoint_filter_fn({"model": published}, model)
    return model, {key: x for key, x in published.items() if key not in data.get("computed", ())}, own


@pytest.mark.parametrize("family", FAMILIES)
def test_every_release_has_a_golden_layout(family):
    module = importlib.import_module(f"vmamba.models.{family}")
    assert set(variants(family)) >= set(module.PUBLISHED_TOP1)


@pytest.mark.parametrize(("family", "variant"), LAYOUTS)
def test_layout_maps_one_to_one(family, variant):
    model, published, own = converted(family, variant)
    # One-to-one in numbers: a published tensor may hold the parameters of several modules, and each gets its part.
    assert sum(value.numel() for value in own.values()) == sum(value.numel() for value in published.values())
    check_fit(own, model)
    model.load_state_dict(own, strict=True)
    assert sum(p.numel() for p in model.parameters()) == golden(family, variant)["params"]


@pytest.mark.parametrize("family", FAMILIES)
def test_own_layout_passes_unchanged(family):
    model, _, own = converted(family, variants(family)[0])
    module = importlib.import_module(f"vmamba.models.{family}")
    again = module.checkpoint_filter_fn({"state_dict": own}, model)
    assert again.keys() == own.keys()
    assert all(again[key] is own[key] for key in own)
