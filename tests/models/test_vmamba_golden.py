"""The published layouts and numbers of VMamba; see tests/golden/recipe.py."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.golden import recipe
from vmamba.models._checkpoint import check_fit
from vmamba.models.vmamba import PUBLISHED_TOP1, checkpoint_filter_fn

FILES = {path.stem: path for path in (Path(recipe.__file__).parent / "vmamba").glob("*.json")}
TOLERANCE = 1e-4


def golden(variant: str) -> dict:
    return json.loads(FILES[variant].read_text())


def weights(entries: list) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(recipe.weight(key, shape, dtype)) for key, shape, dtype in entries}


def test_every_release_has_a_golden_layout():
    assert set(FILES) == set(PUBLISHED_TOP1)


@pytest.mark.parametrize("variant", sorted(FILES))
def test_layout_maps_one_to_one(variant):
    data = golden(variant)
    model = timm.create_model(variant, device="meta")
    published = {key: torch.empty(shape, device="meta") for key, shape, _ in data["state_dict"]}

    converted = checkpoint_filter_fn({"model": published}, model)

    assert len(converted) == len(published)
    check_fit(converted, model)
    model.load_state_dict(converted, strict=True)
    assert sum(p.numel() for p in model.parameters()) == data["params"]


@pytest.mark.parametrize("variant", sorted(FILES))
def test_weight_decay_leaves_out_what_published_training_leaves_out(variant):
    data = golden(variant)
    model = timm.create_model(variant, device="meta")
    published = {key: torch.empty(shape, device="meta") for key, shape, _ in data["state_dict"]}
    own_names = dict(zip(published, checkpoint_filter_fn(published, model), strict=True))
    expected = {own_names[key] for key, value in published.items() if value.dim() == 1 or key.endswith(".bias")}

    undecayed = {
        name
        for name, p in model.named_parameters()
        if p.dim() <= 1 or name.endswith(".bias") or name in model.no_weight_decay()
    }

    assert undecayed == expected


@pytest.mark.parametrize("variant", [name for name in sorted(FILES) if "outputs" in golden(name)])
def test_outputs(variant):
    data = golden(variant)
    out_norms = weights(data["backbone_state_dict_extra"])
    model = timm.create_model(
        variant, pretrained=True, pretrained_cfg_overlay={"state_dict": {"model": weights(data["state_dict"])}}
    ).eval()
    x = torch.from_numpy(recipe.image(**data["input"]))

    with torch.no_grad():
        final, stages = model.forward_intermediates(x)
        outputs = {"logits": model.forward_head(final)}
    for i, stage in enumerate(stages):
        norm = out_norms[f"outnorm{i}.weight"], out_norms[f"outnorm{i}.bias"]
        feature = F.layer_norm(stage.permute(0, 2, 3, 1), norm[0].shape, *norm, eps=1e-5).permute(0, 3, 1, 2)
        outputs |= {f"stage{i}": stage, f"feat{i}": feature}

    assert outputs.keys() == data["outputs"].keys()
    errors = {name: recipe.mismatch(value, data["outputs"][name]) for name, value in outputs.items()}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("variant", sorted(FILES))
def test_every_norm_has_the_published_epsilon(variant):
    # Golden data cannot see the difference between 1e-5 and 1e-6.
    model = timm.create_model(variant, device="meta")
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
