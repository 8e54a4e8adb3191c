"""What is VMamba's own: sizes, precision, initialisation, stochastic depth."""

import math

import pytest
import timm
import torch
from torch import nn

from tests.models.common import image, seeded
from vmamba.layers import SelectiveSSM
from vmamba.models.vmamba import PUBLISHED_TOP1

SIZES = [(96, 130), (33, 47), (31, 5), (224, 32), (7, 4), (4, 4)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["test_vmamba", "test_vanilla_vmamba"])
def test_any_input_size(name, size):
    model = seeded(name)
    x = image(2, 3, *size)

    features = model.forward_intermediates(x, intermediates_only=True)

    height, width = ((-(-side // 4)) if name == "test_vmamba" else side // 4 for side in size)
    for feature in features:
        assert feature.shape[2:] == (height, width)
        assert feature.isfinite().all()
        height, width = -(-height // 2), -(-width // 2)
    assert model(x).isfinite().all()


def test_one_pixel():
    assert seeded("test_vmamba")(image(1, 3, 1, 1)).isfinite().all()


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vanilla_vmamba_tiny"])
def test_initialisation(name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    for key, module in model.named_modules():
        if isinstance(module, SelectiveSSM):
            steps = nn.functional.softplus(module.dt_bias)
            inner, rank = module.dt_weight.shape[1:]
            states = torch.arange(1.0, module.d_state + 1).log().expand_as(module.A_log)
            assert torch.equal(module.A_log, states)
            assert (module.D == 1).all()
            assert steps.min() > 0.99e-3
            assert steps.max() < 1.01e-1
            assert abs(steps.log().mean() - math.log(1e-2)) < 0.2  # log-uniform in [1e-3, 1e-1]
            assert 0.98 * rank**-0.5 < module.dt_weight.abs().max() <= rank**-0.5
            assert 0.98 * inner**-0.5 < module.x_proj.weight.abs().max() <= inner**-0.5
        elif isinstance(module, nn.Linear) and not key.endswith("x_proj"):
            assert abs(module.weight.std() - 0.02) < 1e-3
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_drop_path_rises_linearly_over_all_blocks():
    model = timm.create_model("vmamba_tiny_s1l8", drop_path_rate=0.2, device="meta")
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.2 * i / 13 for i in range(14)])
    model = timm.create_model("vmamba_tiny_s1l8", device="meta")
    assert not any(isinstance(module, timm.layers.DropPath) for module in model.modules())


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("vmamba_tiny", "vmamba_tiny_s1l8"),
        ("vmamba_small", "vmamba_small_s2l15"),
        ("vmamba_base", "vmamba_base_s2l15"),
    ],
)
def test_aliases(alias, name):
    aliased, model = timm.create_model(f"{alias}.in1k", device="meta"), timm.create_model(name, device="meta")
    assert {k: v.shape for k, v in aliased.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert aliased.default_cfg["url"] == model.default_cfg["url"]
    assert timm.get_pretrained_cfg(alias).url == model.default_cfg["url"]


def test_releases_are_all_configured():
    for name in PUBLISHED_TOP1:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.tag == "in1k"
        assert cfg.url.startswith("https://github.com/MzeroMiko/VMamba/releases/download/%23v")
        assert cfg.license == "mit"


def test_nano_trains_on_small_images():
    model = seeded("vmamba_nano_32").train()
    x, target = image(16, 3, 32, 32), torch.arange(16) % 10
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
