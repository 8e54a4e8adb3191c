"""The CUDA depthwise convolution against PyTorch's in float64, result and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.scan_cases import relative_error
from vmamba.layers import DepthwiseConv2d
from vmamba.ops import depthwise_conv
from vmamba.ops.depthwise_conv import by_torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

# channels, map, kernel, options
CASES = {
    "3x3": (96, (14, 14), (3, 3), {"padding": 1}),
    "3x3 silu": (96, (14, 15), (3, 3), {"padding": 1, "activation": "silu"}),
    "3x3 residual": (48, (9, 16), (3, 3), {"padding": 1, "residual": True}),
    "3x3 residual silu": (48, (9, 16), (3, 3), {"padding": 1, "residual": True, "activation": "silu"}),
    "3x3 valid": (20, (9, 8), (3, 3), {}),
    "3x3 stride 2": (64, (15, 14), (3, 3), {"stride": 2, "padding": 1}),
    "3x3 stride 2 silu": (64, (8, 21), (3, 3), {"stride": 2, "padding": 1, "activation": "silu"}),
    "3x3 stride 2, other padding": (32, (9, 9), (3, 3), {"stride": 2, "padding": (0, 1, 0, 1)}),
    "3x3 dilated": (24, (11, 12), (3, 3), {"padding": 3, "dilation": 3}),
    "3x3 dilated residual": (24, (11, 12), (3, 3), {"padding": 3, "dilation": 3, "residual": True}),
    "3x3 replicate": (24, (11, 12), (3, 3), {"padding": 5, "dilation": 5, "padding_mode": "replicate"}),
    "3x3 replicate, small": (32, (3, 1), (3, 3), {"padding": 5, "dilation": 5, "padding_mode": "replicate"}),
    "3x3 replicate silu": (10, (7, 7), (3, 3), {"padding": 1, "padding_mode": "replicate", "activation": "silu"}),
    "5x5": (36, (10, 13), (5, 5), {"padding": 2, "activation": "silu"}),
    "5x5 stride 2": (36, (10, 13), (5, 5), {"stride": 2, "padding": 2}),
    "7x7": (96, (14, 14), (7, 7), {"padding": 3}),
    "7x7 silu": (40, (9, 23), (7, 7), {"padding": 3, "activation": "silu"}),
    "7x7 on a point": (40, (1, 1), (7, 7), {"padding": 3, "activation": "silu"}),
    "7x7 stride 2": (96, (28, 28), (7, 7), {"stride": 2, "padding": 3}),
    "7x7 stride 2 silu": (64, (7, 7), (7, 7), {"stride": 2, "padding": 3, "activation": "silu"}),
    "7x7 stride 2, odd": (64, (31, 17), (7, 7), {"stride": 2, "padding": 3, "activation": "silu"}),
    "8x8": (16, (11, 12), (8, 8), {"padding": 4, "stride": (3, 2)}),
    "1x4 causal": (96, (1, 197), (1, 4), {"padding": (0, 0, 3, 0)}),
    "1x4 causal silu": (96, (2, 33), (1, 4), {"padding": (0, 0, 3, 0), "activation": "silu"}),
    "1x3 and 3x1": (12, (9, 10), (1, 3), {"padding": (0, 1), "stride": (2, 1)}),
    "4x1": (12, (19, 3), (4, 1), {"padding": (3, 0, 0, 0), "activation": "silu"}),
    "one channel": (1, (9, 10), (3, 3), {"padding": 1}),
    "four channels": (4, (40, 50), (3, 3), {"padding": 1, "activation": "silu"}),
    "odd channels": (37, (9, 10), (3, 3), {"padding": 1, "activation": "silu"}),
    "odd channels, stride 2": (37, (9, 10), (7, 7), {"stride": 2, "padding": 3}),
    "many blocks": (32, (64, 200), (3, 3), {"padding": 1, "activation": "silu"}),
    "both ways": (96, (1, 197), (1, 4), {"padding": (0, 0, 3, 0), "both": True, "activation": "silu"}),
    "both ways, odd channels": (7, (1, 30), (1, 4), {"padding": (0, 0, 3, 0), "both": True}),
    "both ways, square": (16, (6, 7), (3, 3), {"padding": (2, 0, 1, 1), "both": True, "activation": "silu"}),
}


def poison() -> None:
    """Fills the allocator's free memory with NaN, so that whatever a kernel does not write shows."""
    blocks = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)]
    blocks += [torch.full((n,), float("nan"), device="cuda") for n in (64, 1 << 10, 1 << 14, 1 << 17)]
    del blocks


def make(name: str, dtype: torch.dtype, batch: int = 3, weight_dtype: torch.dtype = torch.float32):
    """Leaves (x, weight, bias) and the options of a case."""
    channels, size, kernel, options = CASES[name]
    options = dict(options)
    directions = (2,) if options.pop("both", False) else ()
    generator = torch.Generator("cuda").manual_seed(len(name))

    def normal(*shape: int, of: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(of).requires_grad_()

    x = normal(batch, *size, channels, of=dtype)
    weight = normal(*directions, channels, 1, *kernel, of=weight_dtype)
    return (x, weight, normal(*directions, channels, of=weight_dtype)), options


def exact(leaves, options):
    """The result in float64, by PyTorch, and its leaves."""
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    return depthwise_conv(*doubles, **options), doubles


def check(leaves, options, grad_strides=False) -> None:
    poison()
    got = depthwise_conv(*leaves, **options)
    assert "eager_depthwise_conv" in got.grad_fn.name()
    assert (got if leaves[1].dim() == 4 else got.transpose(0, 1)).is_contiguous()  # directions lie apart
    want, doubles = exact(leaves, options)
    grad = torch.randn(*got.shape[:-1], 2 * got.shape[-1], device="cuda").to(got.dtype)
    grad = grad[..., : got.shape[-1]] if grad_strides else grad[..., : got.shape[-1]].contiguous()
    poison()
    found = torch.autograd.grad(got, leaves, grad, retain_graph=True)
    wanted = torch.autograd.grad(want, doubles, grad.double())
    assert relative_error(got, want) < TOLERANCE[got.dtype]
    for leaf, gradient, right, name in zip(leaves, found, wanted, ("x", "weight", "bias"), strict=True):
        assert gradient.dtype == leaf.dtype, name
        assert relative_error(gradient, right) < TOLERANCE[got.dtype], name
    poison()
    again = torch.autograd.grad(got, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "not deterministic"
    with torch.no_grad():
        assert torch.equal(depthwise_conv(*leaves, **options), got)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients(name, dtype):
    check(*make(name, dtype))


@pytest.mark.parametrize("name", ["3x3 silu", "7x7 stride 2", "odd channels", "both ways"])
def test_parameters_in_the_dtype_of_the_map(name):
    check(*make(name, torch.bfloat16, weight_dtype=torch.bfloat16))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", ["3x3 silu", "3x3 stride 2", "7x7", "3x3 replicate", "both ways"])
def test_slices_of_channels(name, offset):
    """Maps and gradients that are slices of wider ones are read where they lie, aligned or not."""
    (x, weight, bias), options = make(name, torch.bfloat16)
    channels = x.shape[-1]
    wide = torch.cat([x.detach()] * 2, dim=-1)
    part = wide[..., offset : offset + channels].detach().requires_grad_()
    assert not part.is_contiguous()
    check((part, weight, bias), options, grad_strides=True)


def test_other_layouts():
    (x, weight, bias), options = make("3x3 silu", torch.bfloat16)
    channels_first = x.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    check((channels_first, weight, bias), options)
    turned = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    check((turned, weight, bias), options)


def test_without_bias():
    (x, weight, _), options = make("3x3 silu", torch.bfloat16)
    got = depthwise_conv(x, weight, **options)
    want, doubles = exact((x, weight), options)
    assert relative_error(got, want) < TOLERANCE[torch.bfloat16]
    found = torch.autograd.grad(got.sum(), (x, weight))
    for gradient, right in zip(found, torch.autograd.grad(want.sum(), doubles), strict=True):
        assert relative_error(gradient, right) < TOLERANCE[torch.bfloat16]


def test_an_empty_batch():
    weight = torch.randn(8, 1, 3, 3, device="cuda", requires_grad=True)
    x = torch.randn(0, 5, 5, 8, device="cuda", requires_grad=True)
    y = depthwise_conv(x, weight, padding=1, activation="silu")
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize("name", ["3x3 silu", "3x3 residual", "7x7 stride 2", "both ways"])
def test_opcheck(name):
    leaves, options = make(name, torch.float32, batch=1)
    grad = torch.randn_like(depthwise_conv(*leaves, **options)).flatten(-3, -2)
    (x, *parameters), size = leaves, leaves[0].shape[1:3]
    x = x.detach().flatten(1, 2).requires_grad_()
    given = (
        [options.get("stride", 1)] * 2,
        [0, 0, 3, 0] if name == "both ways" else [options["padding"]] * 4,
        [1, 1],
        False,
        options.get("residual", False),
        options.get("activation") == "silu",
    )
    torch.library.opcheck(torch.ops.vmamba.depthwise_conv, (x, size, *parameters, *given))
    detached = [x.detach(), size, *(parameter.detach() for parameter in parameters), *given]
    torch.library.opcheck(torch.ops.vmamba.depthwise_conv_forward, detached)
    torch.library.opcheck(torch.ops.vmamba.depthwise_conv_backward, (grad, *detached))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        DepthwiseConv2d(32, residual=True), torch.nn.GELU(), DepthwiseConv2d(32, 7, 2, activation="silu")
    ).cuda()
    x = torch.randn(2, 13, 14, 32, device="cuda", requires_grad=True)
    want = model(x)
    wanted = torch.autograd.grad(want.square().mean(), (x, *model.parameters()))
    got = torch.compile(model, fullgraph=True, backend=backend)(x)
    found = torch.autograd.grad(got.square().mean(), (x, *model.parameters()))
    torch.testing.assert_close(got, want)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_as_pytorchs(dtype, residual):
    torch.manual_seed(0)
    conv = DepthwiseConv2d(24, activation="silu", residual=residual).cuda()
    x = torch.randn(2, 9, 10, 24, device="cuda", dtype=dtype, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        got = conv(x)
        want = by_torch(x, conv.weight, conv.bias, (1, 1), (1, 1, 1, 1), (1, 1), False, residual, True)
    assert got.dtype == want.dtype
    assert relative_error(got, want) < 1.5e-2
    for a, b in zip(torch.autograd.grad(got.sum(), (x, *conv.parameters())),
                    torch.autograd.grad(want.sum(), (x, *conv.parameters())), strict=True):  # fmt: skip
        assert a.dtype == b.dtype
        assert relative_error(a, b) < 2e-2


def test_cuda_graph():
    leaves, options = make("7x7 stride 2 silu", torch.bfloat16)
    grad = torch.randn_like(depthwise_conv(*leaves, **options))

    def step():
        out = depthwise_conv(*leaves, **options)
        # Detached: a graph kept alive would tie the capture below to this stream.
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    want = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for x in got:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_flops_are_those_of_a_convolution():
    (x, weight, bias), options = make("3x3 stride 2", torch.float32)

    @torch.no_grad()
    def count(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    ours = count(lambda: depthwise_conv(x, weight, bias, **options))
    assert ours == count(lambda: F.conv2d(x.permute(0, 3, 1, 2), weight, bias, 2, 1, groups=x.shape[-1]))


def test_kernels_of_many_taps_go_through_torch():
    x, weight = torch.randn(2, 12, 12, 8, device="cuda"), torch.randn(8, 1, 9, 9, device="cuda")
    want, _ = exact((x, weight), {"padding": 4})
    assert relative_error(depthwise_conv(x, weight, padding=4), want) < 1e-4
