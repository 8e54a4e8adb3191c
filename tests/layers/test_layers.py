"""The shared layers, each against a plain formulation."""

import pytest
import torch
import torch.nn.functional as F

from vmamba.layers import Conv2dNHWC, ConvDownsample, ConvStem, PatchMerging, PatchStem, ScanNorm, SelectiveSSM, dt_rank
from vmamba.layers.conv import conv_by_patches
from vmamba.ops import get_route, selective_scan_reference


@pytest.mark.parametrize("groups", [1, 6])
def test_conv_nhwc(groups):
    conv = Conv2dNHWC(6, 12, kernel_size=3, stride=2, padding=1, groups=groups)
    x = torch.randn(2, 7, 9, 6)
    expected = F.conv2d(x.permute(0, 3, 1, 2).contiguous(), conv.weight, conv.bias, 2, 1, 1, groups)
    y = conv(x)
    torch.testing.assert_close(y, expected.permute(0, 2, 3, 1))
    assert y.is_contiguous()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding"),
    [
        (3, (3, 3), (2, 2), (1, 1)),
        (1, (4, 4), (4, 4), (0, 0)),
        (4, (16, 16), (8, 8), (0, 0)),
        (3, (3, 5), (2, 1), (1, 2)),
    ],
)
def test_conv_by_patches(channels, kernel, stride, padding, memory_format):
    x = torch.randn(2, channels, 33, 26, dtype=torch.float64).to(memory_format=memory_format)
    weight, bias = torch.randn(7, channels, *kernel, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    parameters = weight.requires_grad_(), bias.requires_grad_()
    expected = F.conv2d(x, weight, bias, stride, padding)
    y = conv_by_patches(x.permute(0, 2, 3, 1), weight, bias, stride, padding).permute(0, 3, 1, 2)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, parameters, grad), torch.autograd.grad(expected, parameters, grad)
    )


def test_scan_norm_survives_what_float16_cannot_hold():
    norm = ScanNorm(8).half()
    y = 1e6 * torch.randn(3, 8)
    normed = norm(y, torch.float16)
    assert normed.dtype == torch.float16
    torch.testing.assert_close(normed.float(), F.layer_norm(y, (8,)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(8, 8), (7, 6), (5, 9), (1, 1)])
def test_patch_merging_concatenates_column_by_column(size):
    merge = PatchMerging(3, 5)
    x = torch.randn(2, *size, 3)
    padded = F.pad(x, (0, 0, 0, size[1] % 2, 0, size[0] % 2))
    phases = [padded[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    expected = F.linear(F.layer_norm(torch.cat(phases, -1), (12,)), merge.reduction.weight)
    torch.testing.assert_close(merge(x), expected)


@pytest.mark.parametrize(("size", "expected"), [((8, 8), (4, 4)), ((7, 5), (4, 3)), ((1, 1), (1, 1))])
def test_conv_downsample_rounds_up(size, expected):
    assert ConvDownsample(4, 6)(torch.randn(1, *size, 4)).shape == (1, *expected, 6)


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        (PatchStem(3, 8), (2, 8, 7, 8)),
        (ConvStem(3, 8), (2, 9, 8, 8)),
        (ConvStem(3, 8, strides=(2, 1)), (2, 17, 15, 8)),
    ],
)
def test_stems(stem, expected):
    y = stem(torch.randn(2, 3, 34, 30))
    assert y.shape == expected
    assert y.is_contiguous()
    torch.testing.assert_close(y.mean(-1), torch.zeros(expected[:-1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dim", "rank"), [(96, 6), (100, 7), (16, 1), (8, 1)])
def test_dt_rank(dim, rank):
    assert dt_rank(dim) == rank


def test_ssm_is_a_scan_per_direction():
    torch.manual_seed(0)
    ssm = SelectiveSSM(8, rank=2, d_state=3, directions=4)
    torch.nn.init.normal_(ssm.A_log)
    torch.nn.init.normal_(ssm.D)
    u, route = torch.randn(2, 20, 8), get_route("cross", 5, 4)

    expected = torch.zeros(2, 20, 8)
    for k, weight in enumerate(ssm.x_proj.weight.split(2 + 2 * 3)):
        dt, B, C = (x[:, :, None] for x in F.linear(u, weight).split([2, 3, 3], -1))
        own = {"dt_weight": ssm.dt_weight[k : k + 1], "dt_bias": ssm.dt_bias[k : k + 1], "route": route[k : k + 1]}
        expected += selective_scan_reference(u, dt, -ssm.A_log[k : k + 1].exp(), B, C, ssm.D[k : k + 1], **own)

    torch.testing.assert_close(ssm(u, route), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "scanned"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_scan_is_summed_up_in_what_cannot_overflow(dtype, scanned, training):
    ssm = SelectiveSSM(8, rank=2, directions=2)
    u, route = torch.randn(1, 6, 8, dtype=dtype), get_route("bidirectional", 1, 6)
    with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        assert ssm(u, route).dtype == scanned


def test_ssm_on_meta_and_in_another_dtype():
    ssm = SelectiveSSM(8, rank=2, directions=4, device="meta", dtype=torch.bfloat16)
    assert ssm.x_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for name, p in ssm.named_parameters() if name != "x_proj.weight"} == {torch.float32}
