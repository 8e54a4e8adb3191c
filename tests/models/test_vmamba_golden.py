"""The published numbers of VMamba, and what of its recipe shows in the model."""

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.golden import recipe
from tests.models.golden import TOLERANCE, golden, mismatches, placeholders, undecayed, variants, weights
from vmamba.models.vmamba import checkpoint_filter_fn

VARIANTS = variants("vmamba")


@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_decay_leaves_out_what_published_training_leaves_out(variant):
    model = timm.create_model(variant, device="meta")
    published = placeholders(golden("vmamba", variant)["state_dict"])
    own_names = dict(zip(published, checkpoint_filter_fn(published, model), strict=True))
    expected = {own_names[key] for key, value in published.items() if value.dim() == 1 or key.endswith(".bias")}

    assert undecayed(model) == expected


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "outputs" in golden("vmamba", name)])
def test_outputs(variant):
    data = golden("vmamba", variant)
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

    errors = mismatches(outputs, data["outputs"])
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_norm_has_the_published_epsilon(variant):
    # Golden data cannot see the difference between 1e-5 and 1e-6.
    model = timm.create_model(variant, device="meta")
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
