"""What is Spatial-Mamba's own: its published numbers, and states that are fused before they are observed."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.golden import recipe
from tests.models.common import image, seeded
from tests.models.golden import TOLERANCE, golden, mismatches, placeholders, undecayed, variants, weights
from vmamba.layers import SelectiveSSM
from vmamba.models.spatialmamba import (
    DILATIONS,
    PUBLISHED_TOP1,
    StateFusion,
    StructureAwareSSM,
    checkpoint_filter_fn,
)
from vmamba.ops import selective_scan_reference

FAMILY = "spatialmamba"
SMALL = "test_spatialmamba"


def record_branches(model: nn.Module) -> dict[str, torch.Tensor]:
    """A dictionary that the next forward pass fills with every tensor that golden files record by module."""
    outputs: dict[str, torch.Tensor] = {}

    def record(name: str, module: nn.Module, first: bool = False) -> None:
        def hook(module: nn.Module, inputs: tuple, y: torch.Tensor) -> None:
            outputs[name] = y.permute(0, 3, 1, 2) if first else y

        module.register_forward_hook(hook)

    record("patch_embed", model.stem)
    for i, stage in enumerate(model.stages):
        record(f"stage{i}", stage)
        if i:
            record(f"layers.{i - 1}.downsample", stage.downsample)
        for j in (0, len(stage.blocks) - 1):
            block, name = stage.blocks[j], f"layers.{i}.blocks.{j}"
            fusion = block.mixer.ssm.fusion
            fusion.register_forward_pre_hook(
                lambda module, inputs, name=name: outputs.update({f"{name}.states": inputs[0].permute(0, 3, 1, 2)})
            )
            record(f"{name}.fused", fusion, first=True)
            record(f"{name}.ssm", block.mixer.ssm)
            record(f"{name}.self_attention", block.mixer)
            record(f"{name}.mlp", block.mlp)
    return outputs


def test_outputs():
    data = golden(FAMILY, "spatialmamba_tiny")
    out_norms = weights(data["backbone_extra_state_dict"])
    model = timm.create_model(
        data["variant"], pretrained=True, pretrained_cfg_overlay={"state_dict": {"model": weights(data["state_dict"])}}
    ).eval()
    outputs = record_branches(model)

    with torch.no_grad():
        final, stages = model.forward_intermediates(torch.from_numpy(recipe.image(**data["input"])))
        outputs["pooled"] = model.forward_head(final, pre_logits=True)
        outputs["logits"] = model.forward_head(final)
    for i, stage in enumerate(stages):
        norm = out_norms[f"outnorm{i}.weight"], out_norms[f"outnorm{i}.bias"]
        feature = F.layer_norm(stage.permute(0, 2, 3, 1), norm[0].shape, *norm, eps=1e-5)
        outputs[f"feat{i}"] = feature.permute(0, 3, 1, 2)

    errors = mismatches(outputs, data["outputs"])
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("variant", variants(FAMILY))
def test_weight_decay_leaves_out_what_published_training_leaves_out(variant):
    model = timm.create_model(variant, device="meta")
    published = placeholders(golden(FAMILY, variant)["state_dict"])
    exempt = {key: value for key, value in published.items() if value.dim() == 1 or key.endswith(".bias")}
    own = checkpoint_filter_fn(exempt, model).keys() & dict(model.named_parameters()).keys()
    assert undecayed(model) == own


@pytest.mark.parametrize("variant", variants(FAMILY))
def test_every_norm_has_the_published_epsilon(variant):
    model = timm.create_model(variant, device="meta")
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)]
    assert {m.eps for m in norms} == {1e-5}
    assert {m.momentum for m in norms if isinstance(m, nn.BatchNorm2d)} == {0.1}
    assert sum(isinstance(m, nn.BatchNorm2d) for m in norms) == 8


def test_a_kernel_that_is_missing_is_reported():
    published = placeholders(golden(FAMILY, "spatialmamba_tiny")["state_dict"])
    del published["layers.0.blocks.0.self_attention.state_fusion.kernel_3_2"]
    with pytest.raises(RuntimeError, match=r"unexpected \(stages\.0\.blocks\.0\.mixer\.ssm\.fusion\.kernels_1\)"):
        timm.create_model(
            "spatialmamba_tiny", pretrained=True, pretrained_cfg_overlay={"state_dict": published}, device="meta"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The mixer
# ---------------------------------------------------------------------------------------------------------------------


def random_fusion(dim: int) -> StateFusion:
    torch.manual_seed(0)
    fusion = StateFusion(dim)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter)
    return fusion


@pytest.mark.parametrize("size", [(9, 12), (6, 5), (3, 2), (1, 1)])
def test_fusion_samples_inside_the_border(size):
    fusion, states = random_fusion(4), image(2, *size, 4)
    expected = torch.zeros_like(states)
    rows, columns = (torch.arange(n) for n in size)
    for i, dilation in enumerate(DILATIONS):
        for p in (-1, 0, 1):
            for q in (-1, 0, 1):
                row = (rows + dilation * p).clamp(0, size[0] - 1)
                column = (columns + dilation * q).clamp(0, size[1] - 1)
                weight = fusion.alpha[i] * fusion.kernels[:, i, p + 1, q + 1]
                expected += weight * states[:, row][:, :, column]
    torch.testing.assert_close(fusion(states), expected, rtol=1e-4, atol=1e-5)


def test_fusion_is_one_kernel_of_eleven():
    """As published evaluation computes it."""
    fusion, states = random_fusion(4), image(2, 9, 12, 4)
    dense = torch.zeros(4, 1, 11, 11)
    for i, dilation in enumerate(DILATIONS):
        taps = slice(5 - dilation, 6 + dilation, dilation)
        dense[:, 0, taps, taps] += fusion.alpha[i] * fusion.kernels[:, i]
    padded = F.pad(states.permute(0, 3, 1, 2), (5, 5, 5, 5), mode="replicate")
    expected = F.conv2d(padded, dense, groups=4).permute(0, 2, 3, 1)
    torch.testing.assert_close(fusion(states), expected, rtol=1e-4, atol=1e-5)


def test_fusion_follows_its_weights():
    """Published evaluation merges the kernels once, and later changes do not reach it."""
    fusion, states = random_fusion(4).eval(), image(1, 5, 5, 4)
    with torch.no_grad():
        before = fusion(states)
        fusion.kernels.mul_(3)
        torch.testing.assert_close(fusion(states), 3 * before)


def test_fusion_stays_in_float32_under_autocast():
    fusion, states = random_fusion(4), 1e6 * image(1, 5, 5, 4)
    expected = fusion(states)
    with torch.autocast("cpu", dtype=torch.float16):
        fused = fusion(states)
    assert fused.dtype == torch.float32
    assert torch.equal(fused, expected)
    assert fusion.half()(states).isfinite().all()


def test_scan_is_observed_after_the_fusion():
    torch.manual_seed(0)
    ssm = StructureAwareSSM(8, rank=2)
    for parameter in ssm.parameters():
        nn.init.normal_(parameter, std=0.5)
    u = image(2, 5, 7, 8)

    sequence = u.flatten(1, 2)
    dt, B, C = F.linear(sequence, ssm.x_proj.weight).split([2, 1, 1], -1)
    # The states are what an ordinary scan gives with C = 1 and no skip.
    states = selective_scan_reference(
        sequence,
        dt[:, :, None],
        -ssm.A_log.exp(),
        B[:, :, None],
        torch.ones_like(C)[:, :, None],
        dt_weight=ssm.dt_weight,
        dt_bias=ssm.dt_bias,
        route=torch.arange(35, dtype=torch.int32)[None],
    )
    expected = C * ssm.fusion(states.unflatten(1, (5, 7))).flatten(1, 2) + ssm.D * sequence

    torch.testing.assert_close(ssm(u).flatten(1, 2), expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_scan():
    torch.manual_seed(0)
    ssm = StructureAwareSSM(3, rank=2)
    for parameter in ssm.parameters():
        nn.init.normal_(parameter, std=0.5)
    u = image(1, 3, 4, 3).requires_grad_()
    y = ssm(u)
    direction = image(*y.shape, seed=2)
    grads = torch.autograd.grad((y * direction).sum(), [u, *ssm.parameters()])
    step = 1e-2
    for tensor, grad in zip([u, *ssm.parameters()], grads, strict=True):
        way = image(*tensor.shape, seed=3)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(sign * step * way)
                values.append((ssm(u).double() * direction).sum())
                tensor.sub_(sign * step * way)
        numeric = (values[0] - values[1]) / (2 * step)
        assert numeric.item() == pytest.approx((grad.double() * way).sum().item(), rel=2e-2, abs=2e-2)


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 130), (33, 47), (17, 19), (1, 1)])
def test_map_sizes(size):
    height, width = (-(-side // 4) for side in size)
    for feature in seeded(SMALL).forward_intermediates(image(1, 3, *size), intermediates_only=True):
        assert feature.shape[2:] == (height, width)
        assert feature.isfinite().all()
        height, width = -(-height // 2), -(-width // 2)


def test_initialisation():
    torch.manual_seed(0)
    model = timm.create_model("spatialmamba_tiny", depths=(1, 1, 1, 1))
    for key, module in model.named_modules():
        if isinstance(module, SelectiveSSM):
            assert not module.A_log.any()
            assert (module.D == 1).all()
            assert module.x_proj.weight.abs().max() <= module.x_proj.in_features**-0.5
        elif isinstance(module, StateFusion):
            assert (module.kernels == 1).all()
            assert (module.alpha == 1).all()
        elif isinstance(module, nn.Linear) and not key.endswith("x_proj"):
            assert abs(module.weight.std() - 0.02) < 2e-3
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_positional_convolutions_are_not_dropped():
    block = seeded(SMALL, drop_path_rate=0.5).stages[3].blocks[0].train()
    block.drop_path.drop_prob = 1.0
    x = image(1, 4, 4, 128)
    torch.testing.assert_close(block(x), block.cpe2(block.cpe1(x)))


def test_drop_path_rises_linearly_over_all_blocks():
    model = timm.create_model("spatialmamba_tiny", drop_path_rate=0.2, device="meta")
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.2 * i / 17 for i in range(18)])


def test_releases_are_all_configured():
    for name in PUBLISHED_TOP1:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.tag == "in1k"
        assert cfg.url.startswith("https://drive.google.com/file/d/1")
        assert cfg.license == "apache-2.0"
