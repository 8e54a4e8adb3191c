"""A block of VMamba as one operator; in training forward and backward, as one node of autograd's graph.

Its layers are some twenty operators, each with a node of its own, and under autocast every cast of a weight is another.
In eager mode calling them takes the host longer than running them takes a GPU. Here the extension calls the same
kernels and products, one after the other, and autograd sees a single function. The gradients of the projections'
weights stay the float32 sums that they are, where autocast rounds them to 16 bits first.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba.ops import schema
from vmamba.ops.autocast import autocast_dtype
from vmamba.ops.autocast import has_16bit_kernel as _has_kernel
from vmamba.ops.eager import asks_for_gradients
from vmamba.ops.registration import LIBRARY, checkpoint_steps, refuse_derivative


class BlockWeights(NamedTuple):
    """The parameters of a block, in the order in which csrc/block.cpp takes them; all in float32.

    D channels of the map, E of the scan, K directions, N states, R ranks, H hidden channels of the MLP.
    """

    norm1_weight: Tensor  # (D)
    norm1_bias: Tensor  # (D)
    in_proj: Tensor  # (E, D)
    conv: Tensor  # (E, 1, kernel height, kernel width)
    x_proj: Tensor  # (K * (R + 2N), E)
    A_log: Tensor  # (K, E, N)
    D: Tensor  # (K, E)
    dt_weight: Tensor  # (K, E, R)
    dt_bias: Tensor  # (K, E)
    out_norm_weight: Tensor  # (E)
    out_norm_bias: Tensor  # (E)
    out_proj: Tensor  # (D, E)
    norm2_weight: Tensor  # (D)
    norm2_bias: Tensor  # (D)
    fc1_weight: Tensor  # (H, D)
    fc1_bias: Tensor  # (H)
    fc2_weight: Tensor  # (D, H)
    fc2_bias: Tensor  # (D)


class BlockSettings(NamedTuple):
    """What else a call of a block is made with.

    Attributes:
        route: int32 (K, positions).
        factors: By which the two branches of each image are multiplied, (batch, 1, 1) in ``dtype``, or None.
        eps: Of the first norm, of the scan's and of the second one.
        dtype: bfloat16 or float16, in which the block computes; states, statistics and the stream are wider.
        fused_mlp: Whether the MLP is one kernel.
    """

    route: Tensor
    factors: tuple[Tensor | None, Tensor | None]
    eps: tuple[float, float, float]
    dtype: torch.dtype
    fused_mlp: bool


def block(settings: BlockSettings, x: Tensor, branch: Tensor | None, weights: BlockWeights) -> tuple[Tensor, Tensor]:
    """A pre-norm block of an SS2D and an MLP, without its last addition, in eager mode.

    Args:
        settings: Beside tensors that have gradients.
        x: (batch, height, width, D), float32 or in the block's dtype.
        branch: Of the same shape, in the block's dtype: added to ``x`` first; None for nothing.
        weights: The parameters, contiguous.

    Returns:
        Two maps of the shape of ``x``, the stream, in its dtype, and the branch that is still to be added to it.
    """
    if asks_for_gradients(x, branch, *weights):
        return _Block.apply(settings, x, branch, *weights)
    out, total = _forward(settings, x, branch, weights, 0)
    return total, out


def _forward(
    settings: BlockSettings, x: Tensor, branch: Tensor | None, weights: Sequence[Tensor], steps: int
) -> list[Tensor]:
    return torch.ops.vmamba.block_forward(
        x, branch, weights, settings.route, *settings.factors, settings.eps, settings.dtype, steps, settings.fused_mlp
    )


def serves_block(x: Tensor, branch: Tensor | None) -> bool:
    """Whether :func:`block` has kernels for these maps: under autocast to 16 bits, the stream maybe in float32."""
    dtype = autocast_dtype(x)
    return (
        dtype is not None
        and _has_kernel(x)
        and x.dtype in (torch.float32, dtype)
        and (branch is None or branch.dtype == dtype)
    )


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, x, branch, *weights):
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.had_branch = settings, branch is not None
        ctx.steps = checkpoint_steps(x.device.type, BlockWeights(*weights).A_log.shape[-1])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            out, total, *kept = _forward(settings, x, branch, weights, ctx.steps)
        if branch is None:
            kept[0] = x  # the stream that the second branch is added to
        ctx.save_for_backward(total, *kept, *weights)
        return total, out

    @staticmethod
    def backward(ctx, grad_total, grad_branch):
        settings = ctx.settings
        total, *saved = ctx.saved_tensors
        # None where only one of the two results was used.
        grad_total = torch.zeros_like(total) if grad_total is None else grad_total
        grad_branch = torch.zeros_like(total, dtype=settings.dtype) if grad_branch is None else grad_branch
        kept, weights = [total, *saved[:-_WEIGHTS]], saved[-_WEIGHTS:]
        # Where a graph of the gradient is asked for, the operator has to be seen: it refuses a derivative of it.
        guard = nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd()
        with guard:
            gradients = torch.ops.vmamba.block_backward(
                grad_total,
                grad_branch,
                kept,
                weights,
                settings.route,
                *settings.factors,
                ctx.had_branch,
                ctx.steps,
            )
        of_weights, of_maps = gradients[:_WEIGHTS], gradients[_WEIGHTS:]
        return None, *(of_maps if ctx.had_branch else (*of_maps, None)), *of_weights


_WEIGHTS = len(BlockWeights._fields)

LIBRARY.define(f"block_forward{schema.BLOCK_FORWARD}")
LIBRARY.define(f"block_backward{schema.BLOCK_BACKWARD}")
refuse_derivative("block_forward", "vmamba's block_forward has no derivative; use vmamba.ops.block.block")
refuse_derivative("block_backward", "a block in training is differentiable once; drop create_graph")
