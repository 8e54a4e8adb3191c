"""What is MSVMamba's own: its published numbers, its two resolutions, its generations."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.golden import recipe
from tests.models.common import image, seeded
from tests.models.golden import TOLERANCE, golden, mismatches, placeholders, undecayed, variants, weights
from vmamba.layers import SelectiveSSM
from vmamba.models.msvmamba import (
    PUBLISHED_TOP1,
    ConvFFN,
    PassNormedScan,
    SqueezeExcite,
    SumNormedScan,
    _sum_passes,
    checkpoint_filter_fn,
)
from vmamba.ops import get_route, selective_scan_reference

FAMILY = "msvmamba"
FIRST, THIRD = "test_msvmamba", "test_msvmambav3"


@pytest.mark.parametrize("variant", ["msvmamba_nano", "msvmambav3_tiny"])
def test_outputs(variant):
    data = golden(FAMILY, variant)
    out_norms = weights(data["backbone_extra"])
    model = timm.create_model(
        variant, pretrained=True, pretrained_cfg_overlay={"state_dict": {"model_ema": weights(data["state_dict"])}}
    ).eval()
    outputs = {}

    def record(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda module, inputs, y: outputs.update({name: y.permute(0, 3, 1, 2)}))

    record("stem", model.stem)
    record("mixer0", model.stages[0].blocks[0].mixer)
    record("block0", model.stages[0].blocks[0])
    with torch.no_grad():
        final, stages = model.forward_intermediates(torch.from_numpy(recipe.image(**data["input"])))
        outputs["logits"] = model.forward_head(final)
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
    exempt = {key: value for key, value in published.items() if value.dim() == 1 or key.endswith(".bias")}
    assert undecayed(model) == checkpoint_filter_fn(exempt, model).keys()


@pytest.mark.parametrize("variant", variants(FAMILY))
def test_every_norm_has_the_published_epsilon(variant):
    model = timm.create_model(variant, device="meta")
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize(("name", "first"), [(FIRST, "low"), (THIRD, "full")])
def test_each_scan_gets_its_published_parameters(name, first):
    """A wrong order would load without a word: all shapes agree."""
    model = seeded(name)
    sets = torch.arange(2.0)
    published = {
        "layers.0.blocks.0.op.x_proj_weight": sets.view(2, 1, 1).expand(2, 3, 16),
        "layers.0.blocks.0.op.dt_projs_weight": sets.view(2, 1, 1).expand(2, 16, 1),
        "layers.0.blocks.0.op.dt_projs_bias": sets.view(2, 1).expand(2, 16),
        "layers.0.blocks.0.op.A_logs": sets.repeat_interleave(16).view(32, 1),
        "layers.0.blocks.0.op.Ds": sets.repeat_interleave(16),
    }
    own = checkpoint_filter_fn(published, model)
    assert len(own) == 10
    for key, value in own.items():
        assert key.startswith("stages.0.blocks.0.mixer.scan.")
        assert (value == (0 if f".{first}." in key else 1)).all()


def test_generations_do_not_load_each_other():
    published = placeholders(golden(FAMILY, "msvmamba_tiny")["state_dict"])
    with pytest.raises(RuntimeError, match=r"missing \(stem\.conv2\.weight"):
        timm.create_model(
            "msvmambav3_tiny", pretrained=True, pretrained_cfg_overlay={"state_dict": published}, device="meta"
        )


def test_kernels_of_one_pixel_load_as_linear_layers():
    model = timm.create_model("msvmambav3_small", device="meta")
    published = placeholders(golden(FAMILY, "msvmambav3_small")["state_dict"])
    kernels = {
        key: value[..., None, None] if key.endswith(("in_proj.weight", "out_proj.weight")) else value
        for key, value in published.items()
    }
    own = checkpoint_filter_fn(published, model)
    assert {key: value.shape for key, value in checkpoint_filter_fn(kernels, model).items()} == {
        key: value.shape for key, value in own.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# The mixer
# ---------------------------------------------------------------------------------------------------------------------


def test_route_by_hand():
    # Positions of a grid of two rows: 0 1 2
    #                                  3 4 5
    passes = get_route("three_passes", 2, 3).unflatten(1, (3, 6))
    assert passes.tolist() == [[[5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5], [5, 2, 4, 1, 3, 0]]]


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 6), (7, 1), (1, 1)])
def test_passes_are_summed_where_they_were(size):
    length = size[0] * size[1]
    route = get_route("three_passes", *size)[0].long()
    steps = image(2, 3 * length, 8)
    expected = torch.zeros(2, length, 8).index_add(1, route, steps)
    torch.testing.assert_close(_sum_passes(steps, size).flatten(1, 2), expected)


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (7, 3), (1, 1)])
@pytest.mark.parametrize("scan_layer", [PassNormedScan, SumNormedScan])
def test_scan_is_that_of_the_paper(scan_layer, size):
    """Against a formulation that permutes maps, one direction at a time, in channels-first layout."""
    torch.manual_seed(0)
    module = scan_layer(16, rank=2)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = image(2, *size, 16)
    first = x.permute(0, 3, 1, 2)
    full = F.silu(F.conv2d(first, module.full.conv.weight, module.full.conv.bias, 1, 1, 1, 16))
    low = F.silu(F.conv2d(first, module.low.conv.weight, module.low.conv.bias, 2, 3, 1, 16))
    rows, columns = low.shape[2:]

    def scan(ssm: SelectiveSSM, sequence: torch.Tensor) -> torch.Tensor:
        u = sequence.transpose(1, 2)
        dt, B, C = (part[:, :, None] for part in F.linear(u, ssm.x_proj.weight).split([2, 1, 1], -1))
        route = torch.arange(u.shape[1], dtype=torch.int32)[None]
        own = {"dt_weight": ssm.dt_weight, "dt_bias": ssm.dt_bias, "route": route}
        return selective_scan_reference(u, dt, -ssm.A_log.exp(), B, C, ssm.D, **own).transpose(1, 2)

    def norm(y: torch.Tensor) -> torch.Tensor:
        moved = y.movedim(1, -1)
        return F.layer_norm(moved, (16,), module.out_norm.weight, module.out_norm.bias).movedim(-1, 1)

    upright = low.transpose(2, 3)
    sequence = torch.cat([low.flatten(2).flip(-1), upright.flatten(2), upright.flatten(2).flip(-1)], dim=-1)
    whole = scan(module.full.ssm, full.flatten(2)).unflatten(2, size)
    one, two, three = scan(module.low.ssm, sequence).chunk(3, dim=-1)
    passes = [
        one.flip(-1).unflatten(2, (rows, columns)),
        two.unflatten(2, (columns, rows)).transpose(2, 3),
        three.flip(-1).unflatten(2, (columns, rows)).transpose(2, 3),
    ]
    if scan_layer is PassNormedScan:
        expected = norm(whole) + F.interpolate(sum(norm(y) for y in passes), size=size, mode="bilinear")
    else:
        nearest = [torch.arange(n) * m // n for n, m in zip(size, (rows, columns), strict=True)]
        expected = norm(whole + sum(passes)[:, :, nearest[0]][..., nearest[1]])

    torch.testing.assert_close(module(x), expected.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


def test_squeeze_excite():
    torch.manual_seed(0)
    module = SqueezeExcite(32)
    x = image(2, 5, 3, 32)
    gate = torch.sigmoid(torch.relu(x.mean((1, 2)) @ module.reduce.weight.T) @ module.expand.weight.T)
    torch.testing.assert_close(module(x), x * gate[:, None, None])


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 130), (33, 47), (31, 5), (7, 4), (4, 4)])
@pytest.mark.parametrize("name", [FIRST, THIRD])
def test_map_sizes(name, size):
    height, width = ((-(-side // 4)) if name == THIRD else side // 4 for side in size)
    for feature in seeded(name).forward_intermediates(image(1, 3, *size), intermediates_only=True):
        assert feature.shape[2:] == (height, width)
        height, width = -(-height // 2), -(-width // 2)


def test_one_pixel():
    assert seeded(THIRD)(image(1, 3, 1, 1)).isfinite().all()


@pytest.mark.parametrize("name", ["msvmamba_nano", "msvmambav3_tiny"])
def test_initialisation(name):
    torch.manual_seed(0)
    model = timm.create_model(name, depths=(1, 1, 1, 1))
    for key, module in model.named_modules():
        if isinstance(module, SelectiveSSM):
            assert not module.A_log.any()
            assert (module.D == 1).all()
        elif isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and ".mlp." in key):
            bound = module.weight[0].numel() ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert 0.5 * bound < module.bias.abs().max() <= bound
        elif isinstance(module, nn.Linear) and not key.endswith("x_proj"):
            assert abs(module.weight.std() - 0.02) < 2e-3
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_third_generation_normalises_what_its_mlp_returns():
    block = seeded(THIRD).stages[0].blocks[0]
    assert isinstance(block.mlp, ConvFFN)
    nn.init.zeros_(block.norm2.weight)
    nn.init.zeros_(block.norm2.bias)
    x = image(1, 6, 6, 16)
    torch.testing.assert_close(block(x), x + block.mixer(block.norm1(x)))


def test_drop_path_rises_linearly_over_all_blocks():
    model = timm.create_model("msvmamba_tiny", drop_path_rate=0.2, device="meta")
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.2 * i / 13 for i in range(14)])


def test_gates():
    for name in PUBLISHED_TOP1:
        mixer = timm.create_model(name, device="meta").stages[0].blocks[0].mixer
        gated = mixer.in_proj.out_features == 2 * mixer.out_proj.in_features
        assert gated == (name == "msvmambav3_base" or not name.startswith("msvmambav3"))


def test_releases_are_all_configured():
    for name in PUBLISHED_TOP1:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.tag == "in1k"
        if name.startswith("msvmambav3"):
            assert cfg.url.endswith(f"/{name}_224.pth")
            assert cfg.license == "mit"
        else:
            assert cfg.url.startswith("https://drive.google.com/drive/folders/")
            assert cfg.license == "none stated"
