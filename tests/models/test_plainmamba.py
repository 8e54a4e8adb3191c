"""What is PlainMamba's own: its published numbers, snakes, recurrence, stem and starting weights."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.golden import recipe
from tests.models.common import image, seeded
from tests.models.golden import TOLERANCE, golden, mismatches, placeholders, undecayed, variants, weights
from vmamba.models.plainmamba import (
    PUBLISHED_TOP1,
    ConvPatchStem,
    ConvTailBlock,
    SnakeMixer,
    arriving_moves,
    checkpoint_filter_fn,
)
from vmamba.ops import get_route

FAMILY = "plainmamba"
SMALL = "test_plainmamba"


def test_outputs():
    data = golden(FAMILY, "plainmamba_l1")
    # As the authors' framework writes files, with weights that its averaging keeps beside the others.
    published = weights(data["state_dict"]) | {"ema_backbone_pos_embed": torch.zeros(1, 196, 192)}
    model = timm.create_model(
        data["variant"],
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": {"meta": {}, "state_dict": published, "optimizer": {}}},
    ).eval()
    x = torch.from_numpy(recipe.image(**data["input"]))

    with torch.no_grad():
        final, (first, second) = model.forward_intermediates(x, indices=[0, 1], output_fmt="NLC")
        outputs = {
            "logits": model.forward_head(final),
            "feat0": final.permute(0, 3, 1, 2),
            "stem": model.stem(x).flatten(1, 2),
            "layer0": first,
            "layer1": second,
        }

    errors = mismatches(outputs, data["outputs"])
    assert max(errors.values()) < TOLERANCE, errors


def test_intermediates_are_what_the_blocks_return():
    model, x = seeded(SMALL), image(1, 3, 64, 48)
    expected = []
    hooks = [block.register_forward_hook(lambda block, inputs, y: expected.append(y)) for block in model.blocks]
    final = model.forward_features(x)
    for hook in hooks:
        hook.remove()
    found, (second, fourth) = model.forward_intermediates(x, indices=[3, 1], output_fmt="NHWC")
    (third,) = model.forward_intermediates(x, indices=[2], stop_early=True, output_fmt="NHWC", intermediates_only=True)
    pairs = (found, final), (second, expected[1]), (third, expected[2]), (fourth, expected[3])
    assert all(torch.equal(a, b) for a, b in pairs)


def published_names(variant: str) -> tuple[nn.Module, dict[str, str]]:
    """A model, and its published parameter names by our own."""
    model = timm.create_model(variant, device="meta")
    published = placeholders(golden(FAMILY, variant)["state_dict"])
    own = checkpoint_filter_fn(published, model)
    return model, dict(zip(own, published, strict=True))


@pytest.mark.parametrize("variant", variants(FAMILY))
def test_weight_decay_leaves_out_what_published_training_leaves_out(variant):
    model, names = published_names(variant)
    kept_out = (".bias", "pos_embed", "A_log", ".D", "direction_Bs", "norm.weight", "ln1.weight")
    batch_norms = ("stem.1.weight", "convs.1.weight", "convs.4.weight", "dw.1.weight")
    expected = {
        own
        for own, published in names.items()
        if own in dict(model.named_parameters()) and published.endswith(kept_out + batch_norms)
    }
    assert undecayed(model) == expected


@pytest.mark.parametrize("variant", variants(FAMILY))
def test_every_norm_has_the_published_epsilon(variant):
    model = timm.create_model(variant, device="meta")
    epsilons = {name: m.eps for name, m in model.named_modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)}
    assert epsilons.pop("norm") == 1e-6
    assert set(epsilons.values()) == {1e-5}
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def positions(text: str, width: int) -> list[int]:
    """Positions of row-column pairs: '00 01' to [0, 1]."""
    return [int(row) * width + int(column) for row, column in text.split()]


@pytest.mark.parametrize(
    ("size", "routes", "moves"),
    [
        (
            (3, 4),
            [
                "00 01 02 03 13 12 11 10 20 21 22 23",
                "23 22 21 20 10 11 12 13 03 02 01 00",
                "00 10 20 21 11 01 02 12 22 23 13 03",
                "03 13 23 22 12 02 01 11 21 20 10 00",
            ],
            [
                "0 1 1 1 4 2 2 2 4 1 1 1",
                "0 2 2 2 3 1 1 1 3 2 2 2",
                "0 4 4 1 3 3 1 4 4 1 3 3",
                "0 4 4 2 3 3 2 4 4 2 3 3",
            ],
        ),
        (
            (2, 3),
            ["00 01 02 12 11 10", "10 11 12 02 01 00", "00 10 11 01 02 12", "12 02 01 11 10 00"],
            ["0 1 1 4 2 2", "0 1 1 3 2 2", "0 4 1 3 1 4", "0 3 2 4 2 3"],
        ),
        ((1, 3), ["00 01 02", "02 01 00", "00 01 02", "02 01 00"], ["0 1 1", "0 2 2", "0 1 1", "0 2 2"]),
        ((3, 1), ["00 10 20", "20 10 00", "00 10 20", "20 10 00"], ["0 4 4", "0 3 3", "0 4 4", "0 3 3"]),
        ((1, 1), ["00"] * 4, ["0"] * 4),
    ],
)
def test_snakes_by_hand(size, routes, moves):
    assert get_route("snake", *size).tolist() == [positions(route, size[1]) for route in routes]
    assert arriving_moves(*size).tolist() == [[int(move) for move in line.split()] for line in moves]


@pytest.mark.parametrize("size", [(3, 4), (4, 3), (2, 2), (1, 5)])
def test_recurrence_as_published(size):
    torch.manual_seed(0)
    mixer = SnakeMixer(8, d_state=3).double()
    ssm = mixer.ssm
    nn.init.normal_(ssm.dt_bias)
    nn.init.normal_(mixer.direction_B)
    height, width = size
    u = image(2, height, width, 16).double()
    flat = u.flatten(1, 2)
    dt, B, C = (x.squeeze(2) for x in ssm.project(flat))
    # The bias stands once in the projection and once in the scan; step t takes all three from raster position t.
    delta = F.softplus(F.linear(dt, ssm.dt_weight[0].double(), ssm.dt_bias[0].double()) + ssm.dt_bias[0].double())
    A = -ssm.A_log[0].double().exp()
    expected = torch.zeros_like(flat)
    for route, moves in zip(get_route("snake", *size), arriving_moves(*size), strict=True):
        state = torch.zeros(2, 16, 3, dtype=torch.float64)
        for t, (position, move) in enumerate(zip(route.tolist(), moves.tolist(), strict=True)):
            step = delta[:, t, :, None]
            gain = (B[:, t] + mixer.direction_B[move])[:, None] * flat[:, position, :, None]
            state = (step * A).exp() * state + step * gain
            expected[:, position] += (state * C[:, t, None]).sum(-1) + ssm.D[0].double() * flat[:, position]

    y = mixer.float().scan(u.float())

    torch.testing.assert_close(y, expected.unflatten(1, size).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "grid"), [((224, 224), (14, 14)), ((232, 200), (15, 13)), ((1, 17), (1, 2))])
def test_stem_pads_the_half_resolution_map(size, grid):
    torch.manual_seed(0)
    stem = ConvPatchStem(3, 8, convs=2).eval()
    x = image(1, 3, *size)
    half = stem.convs(x)
    padded = torch.zeros(1, 64, 8 * grid[0], 8 * grid[1])
    padded[:, :, : half.shape[2], : half.shape[3]] = half

    assert stem.grid_size(*size) == grid
    torch.testing.assert_close(stem(x), stem.proj(padded).permute(0, 2, 3, 1))
    assert half.shape[2:] == (math.ceil(size[0] / 2), math.ceil(size[1] / 2))


def test_only_l1_has_a_convolution_behind_its_first_block():
    models = {name: timm.create_model(name, device="meta") for name in PUBLISHED_TOP1}
    tails = {name: [isinstance(block, ConvTailBlock) for block in model.blocks] for name, model in models.items()}
    assert tails == {
        "plainmamba_l1": [True] + 23 * [False],
        "plainmamba_l2": 24 * [False],
        "plainmamba_l3": 36 * [False],
    }


def test_initialisation():
    torch.manual_seed(0)
    model = timm.create_model("plainmamba_l1")
    for key, module in model.named_modules():
        if isinstance(module, SnakeMixer):
            assert torch.equal(module.ssm.A_log, torch.arange(1.0, 17).log().expand_as(module.ssm.A_log))
            assert (module.ssm.D == 1).all()
            assert not module.ssm.dt_bias.any()
            assert module.ssm.dt_weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.direction_B.std().item() == pytest.approx(0.02, rel=0.3)
        elif isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01 if key == "head.fc" else 0.02, rel=0.05)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)


def test_drop_path_rises_linearly_over_all_blocks():
    model = timm.create_model("plainmamba_l1", drop_path_rate=0.2, device="meta")
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.2 * i / 23 for i in range(24)])


def test_weights_for_another_size_of_image():
    own = seeded(SMALL).state_dict()
    loading = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": own}}
    larger = timm.create_model(SMALL, img_size=(32, 50), **loading).eval()
    assert larger.pos_embed.shape == (1, 8, 13, 16)
    x = image(1, 3, 32, 50)
    torch.testing.assert_close(larger(x), timm.create_model(SMALL, **loading).eval()(x))


def test_float16_autocast_is_finite():
    model = seeded(SMALL)
    with torch.autocast("cpu", dtype=torch.float16):
        assert model(image(1, 3, 64, 64)).isfinite().all()


def test_releases_are_all_configured():
    for name in PUBLISHED_TOP1:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.tag == "in1k"
        assert cfg.url.endswith(f"/PlainMamba/resolve/main/{name.rpartition('_')[2]}.pth")
        assert cfg.license == "apache-2.0"
