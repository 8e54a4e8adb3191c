"""What is EfficientVMamba's own: its published numbers, its routes, its blocks."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.golden import recipe
from tests.models.common import image, seeded
from tests.models.golden import TOLERANCE, golden, mismatches, placeholders, undecayed, variants, weights
from vmamba.layers import SelectiveSSM
from vmamba.models.efficientvmamba import PUBLISHED_TOP1, ChannelGate, checkpoint_filter_fn
from vmamba.ops import get_route

FAMILY = "efficientvmamba"
SMALL = "test_efficientvmamba"


def test_outputs():
    data = golden(FAMILY, "efficientvmamba_tiny")
    out_norms = weights(data["extra_state_dict"])
    # The published loader takes a twofold prefix off: an average of weights kept around a distributed model.
    nested = {f"module.module.{key}": value for key, value in weights(data["state_dict"]).items()}
    model = timm.create_model(
        data["variant"], pretrained=True, pretrained_cfg_overlay={"state_dict": {"state_dict": nested}}
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


@pytest.mark.parametrize("variant", variants(FAMILY))
def test_weight_decay_leaves_out_what_published_training_leaves_out(variant):
    model = timm.create_model(variant, device="meta")
    published = placeholders(golden(FAMILY, variant)["state_dict"])
    own_names = dict(zip(published, checkpoint_filter_fn(published, model), strict=True))
    expected = {own_names[key] for key, value in published.items() if value.dim() == 1 or key.endswith(".bias")}
    assert undecayed(model) == expected & dict(model.named_parameters()).keys()


@pytest.mark.parametrize("variant", variants(FAMILY))
def test_every_norm_has_the_published_epsilon(variant):
    model = timm.create_model(variant, device="meta")
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)]
    assert {m.eps for m in norms} == {1e-5}
    assert {m.momentum for m in norms if isinstance(m, nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "ema_model"])
def test_wrappers(wrapper):
    data = golden(FAMILY, "efficientvmamba_small")
    model = timm.create_model("efficientvmamba_small", device="meta")
    published = placeholders(data["state_dict"])
    nested = {f"module.module.{key}": value for key, value in published.items()}
    expected = checkpoint_filter_fn(published, model)
    assert checkpoint_filter_fn({wrapper: nested, "epoch": 299}, model).keys() == expected.keys()


def test_names_of_the_code_it_grew_from():
    model = timm.create_model("efficientvmamba_small", device="meta")
    published = placeholders(golden(FAMILY, "efficientvmamba_small")["state_dict"])
    older = {}
    for key, value in published.items():
        key = key.replace("patch_embed.0", "patch_embed.proj").replace("patch_embed.2", "patch_embed.norm")
        key = key.replace(".op.", ".self_attention.").removeprefix("classifier.")
        if key.startswith(("layers.0.blocks", "layers.1.blocks")) and key.split(".")[4] == "norm":
            key = key.replace(".norm.", ".ln_1.")
        older[key] = value
    assert older.keys() != published.keys()
    assert checkpoint_filter_fn(older, model).keys() == checkpoint_filter_fn(published, model).keys()


def test_a_model_of_another_width_is_refused():
    published = placeholders(golden(FAMILY, "efficientvmamba_small")["state_dict"])
    with pytest.raises(RuntimeError, match=r"stem\.conv\.weight is \(64, 3, 4, 4\), expected \(96, 3, 4, 4\)"):
        timm.create_model(
            "efficientvmamba_base",
            depths=(2, 2, 4, 2),
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": published},
            device="meta",
        )


def test_route_by_hand():
    # (row, column) of a 3 x 5 grid; None where an odd side cuts a cell.
    expected = [
        [(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)],
        [(1, 0), None, (1, 2), None, (1, 4), None],
        [(0, 1), (0, 3), None, (2, 1), (2, 3), None],
        [(1, 1), None, (1, 3), None, None, None],
    ]
    route = get_route("atrous", 3, 5)
    assert route.tolist() == [[-1 if at is None else 5 * at[0] + at[1] for at in line] for line in expected]


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1), (4, 6), (5, 5), (9, 14)])
def test_route_visits_every_position_once(size):
    route = get_route("atrous", *size)
    assert route.shape == (4, math.ceil(size[0] / 2) * math.ceil(size[1] / 2))
    assert route[route >= 0].sort().values.tolist() == list(range(size[0] * size[1]))


@pytest.mark.parametrize("size", [(5, 7), (4, 7), (5, 6), (1, 3)])
def test_odd_maps_scan_as_if_padded_with_zeros(size):
    torch.manual_seed(0)
    ssm = SelectiveSSM(8, rank=2, d_state=4, directions=4)
    height, width = size
    even = 2 * math.ceil(height / 2), 2 * math.ceil(width / 2)
    u = image(2, height, width, 8)
    padded = F.pad(u, (0, 0, 0, even[1] - width, 0, even[0] - height))

    y = ssm(u.flatten(1, 2), get_route("atrous", *size)).unflatten(1, size)
    expected = ssm(padded.flatten(1, 2), get_route("atrous", *even)).unflatten(1, even)

    torch.testing.assert_close(y, expected[:, :height, :width])


def test_gate_normalises_what_it_averages_and_not_what_it_scales():
    torch.manual_seed(0)
    gate = ChannelGate(16)
    x = image(2, 5, 3, 16)
    scale = gate.expand(F.gelu(gate.reduce(F.layer_norm(x, (16,)).mean((1, 2))))).sigmoid()
    torch.testing.assert_close(gate(x), x * scale[:, None, None])


def test_initialisation():
    torch.manual_seed(0)
    model = timm.create_model("efficientvmamba_tiny")
    for key, module in model.named_modules():
        if isinstance(module, SelectiveSSM):
            assert torch.equal(module.A_log, torch.arange(1.0, 17).log().expand_as(module.A_log))
            assert (module.D == 1).all()
        elif isinstance(module, nn.Linear) and not key.endswith("x_proj"):
            assert module.weight.abs().max() < 0.12
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_drop_path_rises_linearly_over_all_blocks():
    model = timm.create_model("efficientvmamba_base", drop_path_rate=0.1, device="meta")
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i / 14 for i in range(15)])


def test_batch_norms_are_in_the_blocks_of_both_kinds():
    model = seeded(SMALL)
    per_stage = [sum(isinstance(m, nn.BatchNorm2d) for m in stage.modules()) for stage in model.stages]
    assert per_stage == [1, 1, 3, 3]


def test_releases_are_all_configured():
    for name in PUBLISHED_TOP1:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.tag == "in1k"
        size = name.rpartition("_")[2]
        assert cfg.url.endswith(f"/efficient_vmamba_{size}.ckpt")
        assert f"EfficientVMamba-{size.capitalize()}/" in cfg.url
        assert cfg.license == "apache-2.0"
