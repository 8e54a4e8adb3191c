"""What is Vim's own: its published numbers, sequence, streams, directions, resizes and starting weights."""

import argparse
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.golden import recipe
from tests.models.common import image, seeded
from tests.models.golden import TOLERANCE, golden, mismatches, undecayed, variants, weights
from vmamba.analysis.flops import count
from vmamba.layers import SelectiveSSM
from vmamba.models._checkpoint import CheckpointError
from vmamba.models.vim import (
    PUBLISHED_TOP1,
    BidirectionalConv,
    PatchEmbed,
    Vim,
    VimMixer,
    checkpoint_filter_fn,
    class_index,
    init_legacy,
    init_symmetric,
    resize_rows_as_published,
    rotation,
)
from vmamba.ops import selective_scan, selective_scan_reference

FAMILY = "vim"
SMALL = ["test_vim", "test_vim_rope"]


def needs_gpu(reason: str):
    return pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)


DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu("there is no GPU")])]


# -- Published numbers ------------------------------------------------------------------------------------------------


def streams_of(model: nn.Module, blocks: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A dictionary that the next forward pass fills with both streams behind the given blocks."""
    found: dict[str, torch.Tensor] = {}

    def keep(index: int):
        def hook(module, inputs, output):
            found.update({f"hidden{index}": output.hidden, f"residual{index}": output.residual})

        return hook

    for index in blocks:
        model.blocks[index].register_forward_hook(keep(index))
    return found


@pytest.mark.parametrize("variant", ["vim_tiny_patch16_224", "vim_tiny_rope_patch16_224"])
def test_outputs(variant):
    data = golden(FAMILY, variant)
    model = timm.create_model(
        variant, pretrained=True, pretrained_cfg_overlay={"state_dict": {"model": weights(data["state_dict"])}}
    ).eval()
    outputs = streams_of(model, (0, 11, 23))

    with torch.no_grad():
        final = model.forward_features(torch.from_numpy(recipe.image(**data["input"])))
        outputs |= {
            "tokens": outputs["residual0"],
            "norm_f": final,
            "pre_logits": model.forward_head(final, pre_logits=True),
            "logits": model.forward_head(final),
        }

    errors = mismatches(outputs, data["outputs"])
    assert max(errors.values()) < TOLERANCE, errors


def test_published_resize():
    data = golden(FAMILY, "vim_tiny_patch16_stride8_224")
    for case in data["pos_embed_resize"]:
        rows = torch.from_numpy(recipe.weight(case["key"], case["shape"]))
        resized = resize_rows_as_published(rows, *case["grid_to"], extra=case["extra_tokens"])
        assert recipe.mismatch(resized, case["output"]) < TOLERANCE


@pytest.mark.parametrize("variant", variants(FAMILY))
def test_weight_decay_leaves_out_what_published_training_leaves_out(variant):
    model = timm.create_model(variant, device="meta")
    decayed = [
        (key, shape)
        for key, shape, _ in golden(FAMILY, variant)["state_dict"]
        if len(shape) > 1
        and not key.endswith(".bias")
        and key.partition(".")[0] not in ("pos_embed", "cls_token", "rope")
    ]
    kept_out = undecayed(model)
    own = {name: p for name, p in model.named_parameters() if name not in kept_out}
    assert sum(p.numel() for p in own.values()) == sum(math.prod(shape) for _, shape in decayed)
    assert {"A_log", "conv.weight"} <= {name.rpartition("mixer.")[2].removeprefix("ssm.") for name in own}


@pytest.mark.parametrize("variant", variants(FAMILY))
def test_every_norm_has_the_published_epsilon(variant):
    model = timm.create_model(variant, device="meta")
    assert {m.eps for m in model.modules() if isinstance(m, nn.RMSNorm | nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize(
    ("variant", "gmacs", "scan_gflops"),
    [
        ("vim_tiny_patch16_224", 1.293, 0.534),
        ("vim_tiny_patch16_stride8_224", 4.790, 1.978),
        ("vim_small_patch16_224", 4.851, 1.068),
        ("vim_small_patch16_stride8_224", 17.976, 3.956),
        ("vim_base_patch16_224", 18.766, 2.135),
    ],
)
def test_cost(variant, gmacs, scan_gflops):
    """Nothing is published; the figures are those of the formulas, linear layers and scans apart."""
    model = timm.create_model(variant, device="meta")
    positions = 24 * ((27**2 if "stride8" in variant else 14**2) + 1)
    inner, rank = model.blocks[0].mixer.ssm.dt_weight.shape[1:]
    scan = positions * 2 * inner * (9 * 16 + 3)
    assert scan == pytest.approx(scan_gflops * 1e9, rel=1e-3)
    # The operator counts one operation per skip, not three; the convolutions have seven taps, of which four count.
    expected = scan - positions * 2 * inner * 2 + 2 * (gmacs * 1e9 + positions * 2 * inner * 3)
    assert count(model).flops == pytest.approx(expected, rel=1e-3)
    assert rank == math.ceil(model.embed_dim / 16)


def test_every_release_is_configured():
    for name in PUBLISHED_TOP1:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.tag == "in1k"
        assert cfg.url.startswith("https://huggingface.co/hustvl/Vim-")
        assert (cfg.license, cfg.crop_pct, cfg.mean[0]) == ("apache-2.0", 0.875, 0.485)


# -- Checkpoints ------------------------------------------------------------------------------------------------------


def published(variant: str = "vim_tiny_patch16_224") -> dict[str, torch.Tensor]:
    """A layout of depth 2, filled by the recipe."""
    entries = golden(FAMILY, variant)["state_dict"]
    return weights(
        [entry for entry in entries if not entry[0].startswith("layers.") or int(entry[0].split(".")[1]) < 2]
    )


def shallow(**kwargs) -> Vim:
    return timm.create_model("vim_tiny_patch16_224", depth=2, **kwargs).eval()


def test_the_weights_are_taken_and_not_their_average(tmp_path):
    content = published()
    averaged = {key: value + 1 for key, value in content.items()}
    file = {"model": content, "model_ema": averaged, "optimizer": {}, "args": argparse.Namespace(lr=1e-3), "epoch": 9}
    torch.save(file, tmp_path / "vim.pth")
    torch.save({"model_ema": content}, tmp_path / "average.pth")
    expected = checkpoint_filter_fn(content, shallow())
    for source in ({"file": str(tmp_path / "vim.pth")}, {"file": str(tmp_path / "average.pth")}, {"state_dict": file}):
        found = shallow(pretrained=True, pretrained_cfg_overlay=source).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in found)


def test_directions_are_joined_forwards_first():
    content = published()
    own = checkpoint_filter_fn(content, shallow())
    ssm, layer = "blocks.1.mixer.ssm", "layers.1.mixer"
    assert torch.equal(own[f"{ssm}.A_log"][1], content[f"{layer}.A_b_log"])
    assert torch.equal(own[f"{ssm}.x_proj.weight"][:44], content[f"{layer}.x_proj.weight"])
    assert torch.equal(own["blocks.1.mixer.conv.weight"][1], content[f"{layer}.conv1d_b.weight"][:, 0])


def test_one_direction_alone_does_not_fit():
    content = {key: value for key, value in published().items() if "A_b_log" not in key}
    with pytest.raises(CheckpointError, match=r"2 missing \(blocks\.0\.mixer\.ssm\.A_log"):
        shallow(pretrained=True, pretrained_cfg_overlay={"state_dict": content})


def test_class_row_is_the_middle_one():
    content = published()
    own = checkpoint_filter_fn(content, shallow())
    rows = content["pos_embed"]
    assert torch.equal(own["cls_pos_embed"], rows[:, 98:99])
    assert torch.equal(own["pos_embed"].flatten(1, 2), torch.cat([rows[:, :98], rows[:, 99:]], 1))
    legacy = timm.create_model("vim_tiny_rope_patch16_224", depth=2)
    own = checkpoint_filter_fn(published("vim_tiny_rope_patch16_224"), legacy)
    assert torch.equal(own["cls_pos_embed"], rows[:, :1])


@pytest.mark.parametrize("size", [(224, 320), (96, 130)])
def test_checkpoint_of_another_size(size):
    """Resized on loading, or by the model for each image: the same."""
    overlay = {"state_dict": published()}
    x = image(1, 3, *size)
    resized = shallow(pretrained=True, pretrained_cfg_overlay=overlay, img_size=size)
    assert resized.pos_embed.shape[1:3] == (size[0] // 16, size[1] // 16)
    torch.testing.assert_close(resized(x), shallow(pretrained=True, pretrained_cfg_overlay=overlay)(x))
    # Our own layout knows its grid, so that a checkpoint which is not square can be resized as well.
    again = shallow(pretrained=True, pretrained_cfg_overlay={"state_dict": resized.state_dict()}, img_size=size)
    assert torch.equal(again.pos_embed, resized.pos_embed)


def test_published_resize_starts_the_fine_tuning():
    content = published()
    rows = resize_rows_as_published(content["pos_embed"], 27, 27)
    for stride_8 in (True, False):
        model = shallow(stride=8, published_resize=stride_8)
        own = checkpoint_filter_fn(content, model)
        model.load_state_dict(own, strict=True)
        assert torch.equal(own["cls_pos_embed"], rows[:, 364:365]) == stride_8
        assert torch.equal(own["cls_pos_embed"], content["pos_embed"][:, 98:99]) != stride_8


def test_published_resize_without_class_token():
    content = published()
    own = checkpoint_filter_fn(content, shallow(class_token="none", published_resize=True))
    assert torch.equal(own["pos_embed"].flatten(1, 2), content["pos_embed"][:, 1:])


def test_model_without_class_token_takes_a_checkpoint_that_has_one():
    dense = shallow(
        class_token="none", pretrained=True, pretrained_cfg_overlay={"state_dict": published()}, num_classes=0
    )
    model = shallow(pretrained=True, pretrained_cfg_overlay={"state_dict": published()})
    assert dense.global_pool == "avg"
    assert torch.equal(dense.pos_embed, model.pos_embed)
    assert not [name for name in dense.state_dict() if "cls" in name]
    dense.load_state_dict(checkpoint_filter_fn(model.state_dict() | {}, dense), strict=False)


def test_position_embedding_that_is_no_square():
    content = published()
    content["pos_embed"] = content["pos_embed"][:, :-1]
    with pytest.raises(CheckpointError, match="195 rows, which form no square"):
        shallow(pretrained=True, pretrained_cfg_overlay={"state_dict": content})


# -- Sequence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "grid"), [((224, 224), (27, 27)), ((23, 16), (1, 1)), ((40, 97), (4, 11))])
def test_patches_that_overlap(size, grid):
    stem = PatchEmbed(3, 8, patch_size=16, stride=8)
    assert stem.grid_size(*size) == grid
    assert stem(image(1, 3, *size)).shape == (1, *grid, 8)


def test_image_smaller_than_a_patch():
    with pytest.raises(ValueError, match="smaller than one patch"):
        shallow(img_size=(15, 224))


@pytest.mark.parametrize(("patches", "place", "index"), [(196, "middle", 98), (195, "middle", 97), (196, "first", 0)])
def test_class_token_stands_in_its_place(patches, place, index):
    assert class_index(patches, place) == index
    model = seeded("test_vim", class_token=place)
    height, width = (14, 14) if patches == 196 else (13, 15)
    x = torch.arange(float(patches)).view(1, height, width, 1).expand(-1, -1, -1, 16)
    tokens = model.enter(x).hidden
    assert torch.equal(tokens[:, index], (model.cls_token + model.cls_pos_embed)[0])
    assert torch.equal(torch.cat([tokens[:, :index], tokens[:, index + 1 :]], 1), x.flatten(1, 2))


def test_pools():
    x = image(2, 3, 20, 36)
    model = seeded("test_vim", num_classes=0)
    tokens = model.forward_features(x)
    patches = torch.cat([tokens[:, :22], tokens[:, 23:]], 1)
    assert torch.equal(model(x), tokens[:, 22])
    for pool, expected in (("avg", patches.mean(1)), ("max", patches.amax(1)), ("", tokens)):
        model.reset_classifier(0, pool)
        torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="global_pool must be one of 'avg', 'max', ''"):
        seeded("test_vim", class_token="none", global_pool="token")


def test_set_input_size_changes_no_output():
    model = seeded("test_vim")
    x = image(1, 3, 36, 52)
    expected = model(x)
    model.set_input_size((36, 52))
    assert model.pos_embed.shape == (1, 9, 13, 16)
    assert torch.equal(model(x), expected)


# -- Blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 30])
@pytest.mark.parametrize("device", DEVICES)
def test_convolutions_are_causal_in_their_direction(length, device):
    conv = BidirectionalConv(6, device=device)
    x = torch.randn(2, length, 6, device=device)

    def causal(x, weight, bias):
        return F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=3, groups=6)[..., :length].transpose(1, 2)

    forwards = causal(x, conv.weight[0], conv.bias[0])
    backwards = causal(x.flip(1), conv.weight[1], conv.bias[1]).flip(1)
    y = conv(x)
    torch.testing.assert_close(y, F.silu(torch.stack([forwards, backwards], 1)))
    assert y.stride(-1) == 1  # as the scan needs it


@pytest.mark.parametrize("average", [True, False])
def test_mixer_is_two_mambas_back_to_back(average):
    torch.manual_seed(0)
    mixer = VimMixer(16, d_state=4, average=average)
    x = torch.randn(2, 13, 16)
    values, gate = mixer.in_proj(x).chunk(2, -1)

    def direction(values, gate, k):
        u = F.conv1d(values.mT, mixer.conv.weight[k].unsqueeze(1), mixer.conv.bias[k], padding=3, groups=32)[
            ..., :13
        ].mT
        u = F.silu(u)
        ssm = mixer.ssm
        dt, B, C = F.linear(u, ssm.x_proj.weight[k * 9 : k * 9 + 9]).split([1, 4, 4], -1)
        dt = F.linear(dt, ssm.dt_weight[k], ssm.dt_bias[k])
        y = selective_scan_reference(
            u, dt.unsqueeze(2), -ssm.A_log[k : k + 1].exp(), B.unsqueeze(2), C.unsqueeze(2), ssm.D[k : k + 1],
            route=torch.arange(13).unsqueeze(0),
        )  # fmt: skip
        return y * F.silu(gate)

    y = direction(values, gate, 0) + direction(values.flip(1), gate.flip(1), 1).flip(1)
    expected = mixer.out_proj(y / 2 if average else y)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)


def test_rotation():
    height, width, dim = 3, 5, 16
    sine, cosine = rotation(height, width, dim, 7, "cpu")
    assert (sine[7] == 0).all() and (cosine[7] == 1).all()
    sine, cosine = (torch.cat([table[:7], table[8:]]) for table in (sine, cosine))
    for row in range(height):
        for column in range(width):
            for j in range(dim // 4):
                frequency = 10000 ** (-2 * j / (dim / 2))
                for half, coordinate in enumerate((row / height * 14, column / width * 14)):
                    for channel in (half * dim // 2 + 2 * j, half * dim // 2 + 2 * j + 1):
                        found = sine[row * width + column, channel], cosine[row * width + column, channel]
                        angle = coordinate * frequency
                        assert found == pytest.approx((math.sin(angle), math.cos(angle)), abs=1e-5)


def test_turning_the_sum_is_turning_both_streams():
    model = seeded("test_vim_rope")
    found = streams_of(model, (1, 2))
    tokens = model.enter(model.embed(image(1, 3, 24, 20)))
    model.blocks(tokens)
    sine, cosine = tokens.rotation

    def turned(x):
        pairs = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * cosine + pairs * sine

    torch.testing.assert_close(turned(found["hidden1"]) + turned(found["residual1"]), found["residual2"])


@pytest.mark.parametrize("name", SMALL)
def test_streams_are_read_behind_any_block(name):
    model = seeded(name)
    x = image(2, 3, 20, 36)
    found = streams_of(model, (1, 3))

    def maps(feature, **kwargs):
        return model.forward_intermediates(
            x, indices=[1, 3], feature=feature, output_fmt="NLC", intermediates_only=True, **kwargs
        )

    both = maps("sum"), maps("hidden"), maps("residual")
    index = class_index(45, model.class_token)
    for block, total, hidden, residual in zip((1, 3), *both, strict=True):
        assert torch.equal(total, hidden + residual)
        expected = found[f"residual{block}"]
        assert torch.equal(residual, torch.cat([expected[:, :index], expected[:, index + 1 :]], 1))
    mixed = maps(["residual", "sum"])
    assert torch.equal(mixed[0], both[2][0]) and torch.equal(mixed[1], both[0][1])
    assert torch.equal(maps("sum", norm=True)[1], model.norm(both[0][1]))
    with pytest.raises(ValueError, match="one for each of 2 indices, got 3"):
        maps(["sum"] * 3)
    with pytest.raises(ValueError, match="feature must be one of sum, hidden, residual, got 'output'"):
        maps("output")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_stays_float32(name, dtype):
    x = image(2, 3, 32, 32)
    expected = seeded(name)(x)
    model = seeded(name)
    found = streams_of(model, (1, 3))
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
    halved = seeded(name).to(dtype)
    found_halved = streams_of(halved, (1, 3))
    z = halved(x.to(dtype))
    for streams, result in ((found, y), (found_halved, z)):
        assert {key: value.dtype for key, value in streams.items()} == {
            f"{kind}{block}": torch.float32 if kind == "residual" else dtype
            for kind in ("hidden", "residual")
            for block in (1, 3)
        }
        assert result.dtype == dtype
        assert (result - expected).abs().max() < 0.1 * expected.std()


def test_values_that_float16_would_not_hold_without_the_residual():
    model = seeded("test_vim")
    model.load_state_dict(
        {key: value * (1e6 if key == "cls_token" else 1) for key, value in model.state_dict().items()}
    )
    with torch.autocast("cpu", dtype=torch.float16):
        assert model(image(1, 3, 32, 32)).isfinite().all()


# -- Training ---------------------------------------------------------------------------------------------------------


def test_drop_path_rises_linearly_over_the_outputs_of_the_blocks():
    model = timm.create_model("vim_tiny_patch16_224", drop_path_rate=0.2, device="meta")
    dropping = [block.drop_path for block in model.blocks[1:]] + [model.drop_path]
    assert isinstance(model.blocks[0].drop_path, nn.Identity)
    assert [getattr(drop, "drop_prob", 0.0) for drop in dropping] == pytest.approx([0.2 * i / 23 for i in range(24)])


def uniform(x: torch.Tensor, bound: float) -> bool:
    return 0.98 * bound < x.abs().max() <= bound and abs(x.std() / bound - 3**-0.5) < 0.02


@pytest.mark.parametrize("init_fn", [None, init_symmetric])
def test_initialisation(init_fn):
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny_patch16_224", depth=4, **({"init_fn": init_fn} if init_fn else {}))
    assert abs(model.stem.conv.weight.std() - 768**-0.5 / 0.8796) < 1e-3
    assert not model.stem.conv.bias.any()
    assert all(abs(p.std() - 0.02) < 2e-3 for p in (model.pos_embed, model.cls_token, model.head.fc.weight))
    assert not model.head.fc.bias.any()
    for block in model.blocks:
        mixer, ssm = block.mixer, block.mixer.ssm
        assert uniform(mixer.in_proj.weight, 192**-0.5)
        assert uniform(ssm.x_proj.weight, 384**-0.5)
        assert uniform(mixer.conv.weight, 0.5)
        assert uniform(ssm.dt_weight, 12**-0.5)
        assert uniform(mixer.out_proj.weight, 384**-0.5 / 2)  # the square root of four blocks
        steps = F.softplus(ssm.dt_bias)
        assert 0.99e-3 < steps[0].min() < steps[0].max() < 1.01e-1
        assert bool(ssm.dt_bias[1].any()) == (init_fn is init_symmetric)
        assert torch.equal(ssm.A_log, torch.arange(1.0, 17).log().expand(2, 384, -1))
        assert (ssm.D == 1).all() and (block.norm.weight == 1).all()


def test_initialisation_of_the_first_release():
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny_rope_patch16_224", depth=4)
    assert model.init_fn is init_legacy
    assert uniform(model.stem.conv.weight, 768**-0.5)
    assert not model.cls_token.any()
    for block in model.blocks:
        mixer, ssm = block.mixer, block.mixer.ssm
        normal = (mixer.in_proj.weight, ssm.x_proj.weight, ssm.dt_weight, model.head.fc.weight)
        assert all(abs(p.std() - 0.02) < 1e-3 for p in normal)
        assert not ssm.dt_bias.any()
        assert uniform(mixer.out_proj.weight, 384**-0.5 / 2)


def test_nano_trains_on_small_images():
    model = seeded("vim_nano_32").train()
    x, target = image(16, 3, 32, 32), torch.arange(16) % 10
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


# -- The packages Vim was written on ----------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu("mamba-ssm and causal-conv1d run on a GPU only")
def test_scan_agrees_with_mamba_ssm():
    interface = pytest.importorskip("mamba_ssm.ops.selective_scan_interface")
    ssm = SelectiveSSM(64, 4, 16, device="cuda")
    u, z = torch.randn(2, 2, 197, 64, device="cuda")
    dt, B, C = (x[:, :, 0] for x in ssm.project(u))
    A = -ssm.A_log.exp()
    expected = interface.selective_scan_fn(
        u.mT, (dt @ ssm.dt_weight[0].T).mT, A[0], B.mT, C.mT, ssm.D[0], z=z.mT, delta_bias=ssm.dt_bias[0],
        delta_softplus=True,
    )  # fmt: skip
    y = selective_scan(
        u, dt.unsqueeze(2), A, B.unsqueeze(2), C.unsqueeze(2), ssm.D, dt_weight=ssm.dt_weight, dt_bias=ssm.dt_bias
    )
    torch.testing.assert_close(y * F.silu(z), expected.mT, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@needs_gpu("mamba-ssm and causal-conv1d run on a GPU only")
def test_convolution_agrees_with_causal_conv1d():
    package = pytest.importorskip("causal_conv1d")
    conv = BidirectionalConv(64, device="cuda")
    x = torch.randn(2, 197, 64, device="cuda")
    u = conv(x)
    for k, directed in enumerate((x, x.flip(1))):
        y = package.causal_conv1d_fn(directed.mT.contiguous(), conv.weight[k], conv.bias[k], activation="silu").mT
        torch.testing.assert_close(u[:, k], y.flip(1) if k else y, rtol=1e-3, atol=1e-4)
