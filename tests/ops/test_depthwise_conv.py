"""The depthwise convolution as PyTorch computes it where there is no kernel, and the operators' shapes and FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.standing_in import standing_in
from vmamba.layers import DepthwiseConv2d
from vmamba.ops import depthwise_conv


def plain(x, weight, bias=None, *args):
    """F.conv2d of channels-last maps."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, *args, groups=x.shape[-1]).permute(0, 2, 3, 1)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 7, 9, 6), torch.randn(6, 1, 3, 3), torch.randn(6)


def test_is_conv2d(inputs):
    x, weight, bias = inputs
    assert torch.equal(depthwise_conv(x, weight, bias, 2, 1), plain(x, weight, bias, 2, 1))
    assert torch.equal(depthwise_conv(x, weight, stride=(1, 2), dilation=2), plain(x, weight, None, (1, 2), 0, 2))
    assert torch.equal(depthwise_conv(x, weight, padding=1, activation="silu"), F.silu(plain(x, weight, None, 1, 1)))
    assert torch.equal(depthwise_conv(x, weight, padding=1, residual=True), x + plain(x, weight, None, 1, 1))


def test_padding_by_sides(inputs):
    x, weight, bias = inputs
    padded = F.pad(x, (0, 0, 4, 3, 1, 2))
    torch.testing.assert_close(depthwise_conv(x, weight, bias, padding=(1, 2, 4, 3)), plain(padded, weight, bias))


def test_replicated_border(inputs):
    x, weight, bias = inputs
    padded = F.pad(x.permute(0, 3, 1, 2), (2, 2, 2, 2), mode="replicate").permute(0, 2, 3, 1)
    got = depthwise_conv(x, weight, bias, padding=2, dilation=2, padding_mode="replicate")
    torch.testing.assert_close(got, plain(padded, weight, bias, 1, 0, 2))


@pytest.mark.parametrize(
    ("kernel", "padding"), [((1, 4), (0, 0, 3, 0)), ((1, 4), (0, 0, 1, 2)), ((2, 3), (1, 0, 1, 1))]
)
def test_both_ways_is_a_convolution_and_one_of_the_turned_map(kernel, padding):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5 if kernel[0] > 1 else 1, 9, 6), torch.randn(2, 6, 1, *kernel), torch.randn(2, 6)
    got = depthwise_conv(x, weight, bias, padding=padding, activation="silu")
    forwards = depthwise_conv(x, weight[0], bias[0], padding=padding, activation="silu")
    backwards = depthwise_conv(x.flip(1, 2), weight[1], bias[1], padding=padding, activation="silu").flip(1, 2)
    torch.testing.assert_close(got, torch.stack([forwards, backwards], dim=1))


@pytest.mark.parametrize(
    "wrong", [{"activation": "relu"}, {"padding_mode": "reflect"}, {"padding": 1, "both": True}, {"both": True}]
)
def test_what_is_refused(inputs, wrong):
    x, weight, bias = inputs
    both = wrong.pop("both", False)
    weight, bias = (torch.stack([weight] * 2), torch.stack([bias] * 2)) if both else (weight, bias)
    stride = 2 if both and "padding" in wrong else 1
    with pytest.raises(ValueError, match=r"must be|need padding"):
        depthwise_conv(x, weight, bias, stride, **wrong)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_module_is_torchs(stride):
    torch.manual_seed(0)
    ours, theirs = DepthwiseConv2d(6, 5, stride), torch.nn.Conv2d(6, 6, 5, stride, 2, groups=6)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 9, 6)
    assert torch.equal(ours(x), theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@pytest.mark.parametrize("residual", [False, True])
def test_autocast(inputs, residual):
    x, weight, bias = inputs
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv(x, weight, bias, padding=1, residual=residual)
    assert y.dtype == (torch.float32 if residual else torch.bfloat16)


@pytest.fixture
def kernels():
    """The operators on the CPU, by PyTorch's, as far as a plain convolution goes: what surrounds the CUDA kernels."""

    def views(x, size, weight, stride, padding, dilation):
        settings = stride, padding[::2], dilation, False, [0, 0], weight.shape[0]
        return x.transpose(1, 2).unflatten(2, size), weight, settings

    def convolved(x, size, weight, bias, stride, padding, dilation, *_):
        x, weight, settings = views(x, size, weight, stride, padding, dilation)
        return torch.convolution(x, weight, bias, *settings).flatten(2).transpose(1, 2).contiguous()

    def gradients(grad, x, size, weight, bias, stride, padding, dilation, *_):
        x, weight, settings = views(x, size, weight, stride, padding, dilation)
        rows = (size[0] + 2 * padding[0] - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1
        grad = grad.transpose(1, 2).unflatten(2, (rows, -1))
        dx, *others = torch.ops.aten.convolution_backward(grad, x, weight, bias.shape, *settings, [True, True, True])
        return dx.flatten(2).transpose(1, 2).contiguous(), *others

    with standing_in(
        "depthwise_conv",
        depthwise_conv=convolved,
        depthwise_conv_forward=convolved,
        depthwise_conv_backward=gradients,
    ):
        yield


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_operators_take_and_give_maps_flattened(inputs, compiled):
    x, weight, bias = (t.requires_grad_() for t in inputs)
    wide = torch.cat([x.detach()] * 2, dim=-1)
    conv = torch.compile(depthwise_conv, backend="aot_eager", fullgraph=True) if compiled else depthwise_conv
    for map_ in (x, wide[..., 1:7].requires_grad_(), x.detach().transpose(1, 2).requires_grad_()):
        got = conv(map_, weight, bias, (2, 1), (1, 0))
        want = plain(map_, weight, bias, (2, 1), (1, 0))
        assert compiled or got.grad_fn.name() == "eager_depthwise_conv_forwardBackward"
        torch.testing.assert_close(got, want)
        found, wanted = (torch.autograd.grad(y.square().sum(), (map_, weight, bias)) for y in (got, want))
        torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        assert torch.equal(conv(x, weight, bias, (2, 1), (1, 0)), conv(x.detach(), weight, bias, (2, 1), (1, 0)))


@pytest.mark.usefixtures("kernels")
def test_a_result_of_the_operator_can_be_changed_in_place(inputs):
    x, weight, bias = (t.requires_grad_() for t in inputs)
    got, want = (F.relu(conv(x, weight, bias), inplace=True) for conv in (depthwise_conv, plain))
    found, wanted = (torch.autograd.grad(y.sum(), (x, weight, bias)) for y in (got, want))
    torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("kernels")
def test_the_operator_has_no_second_derivative(inputs):
    x, weight, bias = (t.requires_grad_() for t in inputs)
    (gradient,) = torch.autograd.grad(depthwise_conv(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


SETTINGS = [
    ((6, 1, 3, 3), [2, 1], [1, 2, 0, 4], [1, 2]),
    ((2, 6, 1, 1, 4), [1, 1], [0, 0, 3, 0], [1, 1]),
]


@pytest.mark.parametrize(("weight_shape", "stride", "padding", "dilation"), SETTINGS)
def test_operators_without_a_kernel_know_their_shapes(weight_shape, stride, padding, dilation):
    with FlopCounterMode(display=False) as counter:
        x = torch.empty(2, 7 * 9, 6, device="meta", requires_grad=True)
        weight = torch.empty(weight_shape, device="meta", requires_grad=True)
        bias = torch.empty((*weight_shape[:-4], 6), device="meta", requires_grad=True)
        y = torch.ops.vmamba.depthwise_conv(x, [7, 9], weight, bias, stride, padding, dilation, False, False, True)
        forward_flops = counter.get_total_flops()
        grads = torch.autograd.grad(y.sum(), (x, weight, bias))
    padded = F.pad(torch.empty(2, 7, 9, 6), (0, 0, *padding[2:], *padding[:2]))
    one = plain(padded, torch.empty(weight_shape[-4:]), None, stride, 0, dilation)
    assert y.shape == (2, *((2,) if len(weight_shape) == 5 else ()), one.shape[1] * one.shape[2], 6)
    assert forward_flops == 2 * y.numel() * weight_shape[-1] * weight_shape[-2]
    assert counter.get_total_flops() == 3 * forward_flops
    assert [g.shape for g in grads] == [x.shape, weight.shape, bias.shape]
