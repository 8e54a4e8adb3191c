"""Depthwise convolution of channels-last maps, with what stands around it in these models: bias, residual, SiLU.

PyTorch runs a depthwise convolution, the addition of its bias, and SiLU as kernels of their own, under torch.compile
too, each of which reads and writes the whole map; cuDNN's gradients of it are slower still. The kernel here reads the
map once and writes the result; its backward keeps nothing but its inputs. Elsewhere (CPU, float64, kernels of more than
64 taps) PyTorch's is used.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmamba.ops import extension, schema
from vmamba.ops.autocast import autocast_dtype
from vmamba.ops.eager import asks_for_gradients, differentiable
from vmamba.ops.positions import by_position, channels_first, channels_last
from vmamba.ops.registration import LIBRARY, refuse_derivative

Activation = Literal["silu"]
PaddingMode = Literal["zeros", "replicate"]
Pair = int | tuple[int, ...]

_MOST_TAPS = 64  # kMostTaps in csrc/cuda/depthwise_conv.h


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: Pair = 1,
    activation: Activation | None = None,
    residual: bool = False,
    padding_mode: PaddingMode = "zeros",
) -> Tensor:
    """Convolves each channel of a map with a kernel of its own; sums are in float32 (float64 for float64).

    Under autocast the map is cast as for any convolution, unless ``residual`` keeps it. The kernel reads the parameters
    in the dtype they have.

    Args:
        x: (batch, height, width, channels).
        weight: (channels, 1, kernel height, kernel width), or (2, channels, 1, kernel height, kernel width) for both
            directions: the second kernel convolves the map turned by 180 degrees, and its result is turned back. Both
            must keep the map's size, in unit steps.
        bias: (channels), or (2, channels).
        stride: Positions of the map per position of the result, one number or one per axis.
        padding: Positions added around the map: one number, one per axis, or (top, bottom, left, right).
        dilation: Positions from one tap to the next, one number or one per axis.
        activation: ``"silu"``, applied to the result.
        residual: Whether to add ``x`` to the convolution, which then must keep the map's size.
        padding_mode: Whether the map is continued by ``"zeros"`` or by its border's values (``"replicate"``).

    Returns:
        (batch, out height, out width, channels), or (batch, 2, out height, out width, channels), in the dtype of ``x``;
        under autocast in autocast's, but for a residual in the wider of the two. In memory, both directions' maps need
        not lie in this order.

    Raises:
        ValueError: for an activation or a padding mode of another name, or for both directions with a convolution that
            does not keep the map's size, or with more than padding by zeros around them.
    """
    if activation not in (None, *get_args(Activation)):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    if padding_mode not in get_args(PaddingMode):
        raise ValueError(f"padding_mode must be 'zeros' or 'replicate', got {padding_mode!r}")
    geometry = _pair(stride), _sides(padding), _pair(dilation)
    if weight.dim() == 5:
        _check_both_ways(weight, *geometry, plain=padding_mode == "zeros" and not residual)
    options = padding_mode == "replicate", residual, activation == "silu"
    if not _has_kernel(x, weight, geometry[0], padding_mode):
        return by_torch(x, weight, bias, *geometry, *options)
    dtype = autocast_dtype(x)
    if dtype is not None and not (residual and x.dtype == torch.float32):
        x = x.to(dtype)
    if bias is not None and bias.dtype != weight.dtype:
        bias = bias.to(weight.dtype)
    inputs = (x, weight, bias)
    if asks_for_gradients(*inputs):
        conv = _graph_conv if torch.compiler.is_compiling() else _eager_conv
        return conv(*inputs, *geometry, *options)
    return depthwise_conv_forward(*inputs, *geometry, *options)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _sides(padding: int | tuple[int, ...]) -> tuple[int, int, int, int]:
    if isinstance(padding, int):
        return padding, padding, padding, padding
    if len(padding) == 2:
        return padding[0], padding[0], padding[1], padding[1]
    return padding[0], padding[1], padding[2], padding[3]


def _check_both_ways(weight: Tensor, stride, padding, dilation, plain: bool) -> None:
    height, width = weight.shape[-2:]
    keeps_size = padding[0] + padding[1] == height - 1 and padding[2] + padding[3] == width - 1
    if not (plain and keeps_size and stride == (1, 1) and dilation == (1, 1)):
        raise ValueError(
            f"both directions of a {height}x{width} kernel need padding that sums to {height - 1} and {width - 1} by "
            f"zeros, unit stride and dilation, and no residual; got stride {stride}, padding {padding}, dilation "
            f"{dilation}"
        )


def _has_kernel(x: Tensor, weight: Tensor, stride: tuple[int, int], padding_mode: PaddingMode) -> bool:
    return (
        x.is_cuda
        and _BUILT
        and x.dtype in extension.KERNEL_DTYPES
        and weight.dtype in extension.KERNEL_DTYPES
        and weight.shape[-1] * weight.shape[-2] <= _MOST_TAPS
        and (padding_mode == "zeros" or stride == (1, 1))
        and not torch.jit.is_tracing()  # which should show what others can read
    )


# ---------------------------------------------------------------------------------------------------------------------
# By PyTorch
# ---------------------------------------------------------------------------------------------------------------------


def by_torch(x, weight, bias, stride, padding, dilation, replicate, residual, silu) -> Tensor:
    """:func:`depthwise_conv` by PyTorch's operators, of the arguments that the kernels take."""
    if weight.dim() == 5:
        y = _both_ways(x, weight, bias, padding)
    else:
        y = _one_way(x, weight, bias, stride, padding, dilation, replicate)
    y = by_position(torch.add, x, y) if residual else y
    return by_position(F.silu, y) if silu else y


def _one_way(x, weight, bias, stride, padding, dilation, replicate) -> Tensor:
    top, bottom, left, right = padding
    if replicate:
        x, padding = _replicate_border(x, padding), (0, 0, 0, 0)
    elif top != bottom or left != right:
        x, padding = F.pad(x, (0, 0, left, right, top, bottom)), (0, 0, 0, 0)
    if autocast_dtype(x) is None:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return channels_last(F.conv2d(channels_first(x), weight, bias, stride, padding[::2], dilation, x.shape[-1]))


def _both_ways(x, weight, bias, padding) -> Tensor:
    """Both directions as one symmetric convolution, twice as wide.

    Some of its taps are zero, but it reads and writes the map as it lies, where two convolutions with one-sided padding
    would copy it.
    """
    one_row = x.shape[1] == 1 and weight.shape[-2] == 1
    if one_row and not x.is_cuda:  # oneDNN is far slower with a map of one row than of one column, cuDNN is not
        y = _both_ways(x.transpose(1, 2), weight.transpose(3, 4), bias, (*padding[2:], *padding[:2]))
        return y.transpose(2, 3)
    top, bottom, left, right = padding
    reach = max(top, bottom), max(left, right)
    first, second = F.pad(weight, (reach[1] - left, reach[1] - right, reach[0] - top, reach[0] - bottom)).unbind()
    kernel = torch.cat([first, second.flip(2, 3)])
    y = _one_way(
        torch.cat([x, x], dim=-1),
        kernel,
        None if bias is None else bias.flatten(),
        (1, 1),
        (reach[0], reach[0], reach[1], reach[1]),
        (1, 1),
        False,
    )
    return y.unflatten(-1, (2, x.shape[-1])).movedim(3, 1)


def _replicate_border(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """A map (batch, height, width, channels), continued on each side by its border.

    What ``F.pad`` calls replicate; that one's gradient is not deterministic on CUDA, and it leaves channels first.
    """
    for dim, before, after in ((1, *padding[:2]), (2, *padding[2:])):
        first, last = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
        x = torch.cat([*[first] * before, x, *[last] * after], dim)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Registration
# ---------------------------------------------------------------------------------------------------------------------


# The operators take and give flattened maps, (batch, height * width, channels), for the reason :func:`by_position` has;
# the size comes beside them. With both directions the result is (batch, 2, out height * out width, channels), in memory
# one direction's maps after the other's.


def _flattened(op, x, weight, bias, stride, padding, dilation, *options) -> Tensor:
    """An operator's result for a map, as a map."""
    size = x.shape[1:3]
    y = op(x.flatten(1, 2), size, weight, bias, stride, padding, dilation, *options)
    return y.unflatten(-2, _out_sizes(size, weight, stride, padding, dilation))


def _graph_conv(*inputs) -> Tensor:
    return _flattened(torch.ops.vmamba.depthwise_conv, *inputs)


def depthwise_conv_forward(*inputs) -> Tensor:
    """The kernel's result for a map, without a derivative."""
    return _flattened(torch.ops.vmamba.depthwise_conv_forward, *inputs)


def _out_sizes(size, weight, stride, padding, dilation) -> tuple[int, int]:
    rows = _out_size(size[0], padding[0], padding[1], weight.shape[-2], stride[0], dilation[0])
    return rows, _out_size(size[1], padding[2], padding[3], weight.shape[-1], stride[1], dilation[1])


def _out_size(size: int, before: int, after: int, kernel: int, stride: int, dilation: int) -> int:
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def _fake(x, size, weight, bias, stride, padding, dilation, replicate, residual, silu) -> Tensor:
    batch, _, channels = x.shape
    rows, columns = _out_sizes(size, weight, stride, padding, dilation)
    if weight.dim() == 4:
        return x.new_empty((batch, rows * columns, channels))
    return x.new_empty((2, batch, rows * columns, channels)).transpose(0, 1)


def _fake_backward(grad, x, size, weight, bias, *_):
    def like(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)

    return like(x), like(weight), weight.new_empty(0) if bias is None else like(bias)


def _setup_context(ctx, inputs, output):
    x, ctx.size, weight, bias, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    dx, *others = _gradients(grad, x, ctx.size, weight, bias, *ctx.settings)
    return dx, None, *others


def _setup_eager_context(ctx, inputs, output):
    x, weight, bias, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward_eager(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    size = x.shape[1:3]
    dx, *others = _gradients(grad.flatten(-3, -2), x.flatten(1, 2), size, weight, bias, *ctx.settings)
    return dx.unflatten(1, size), *others


def _gradients(grad, x, size, weight, bias, *settings) -> tuple[Tensor | None, ...]:
    """Of flattened maps, the weight, the bias if there is one, and the settings, which have none."""
    dx, dweight, dbias = torch.ops.vmamba.depthwise_conv_backward(grad, x, size, weight, bias, *settings)
    return dx, dweight, None if bias is None else dbias, *(None,) * len(settings)


def _flops(x_shape, size, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """Two per tap and element of the result, as for any convolution."""
    return 2 * weight_shape[-1] * weight_shape[-2] * out_shape.numel()


def _backward_flops(grad_shape, x_shape, size, weight_shape, *args, **kwargs) -> int:
    """Twice the forward, as for every product."""
    return 4 * weight_shape[-1] * weight_shape[-2] * grad_shape.numel()


def _register() -> None:
    for op in ("depthwise_conv", "depthwise_conv_forward"):
        LIBRARY.define(f"{op}{schema.DEPTHWISE_CONV}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"vmamba::{op}", _fake, lib=LIBRARY)
        register_flop_formula(getattr(torch.ops.vmamba, op))(_flops)
    LIBRARY.define(f"depthwise_conv_backward{schema.DEPTHWISE_CONV_BACKWARD}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake("vmamba::depthwise_conv_backward", _fake_backward, lib=LIBRARY)
    register_flop_formula(torch.ops.vmamba.depthwise_conv_backward)(_backward_flops)
    torch.library.register_autograd("vmamba::depthwise_conv", _backward, setup_context=_setup_context, lib=LIBRARY)
    refuse_derivative(
        "depthwise_conv_backward", "vmamba's depthwise_conv is differentiable once; use torch.nn.functional.conv2d"
    )


_register()
# Where views are not recorded, and cost little.
_eager_conv = differentiable(depthwise_conv_forward, _setup_eager_context, _backward_eager)
_BUILT = torch._C._dispatch_has_kernel_for_dispatch_key("vmamba::depthwise_conv_forward", "CUDA")
