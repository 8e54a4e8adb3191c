"""Differentiable operators for eager mode, without the wrapping of torch.library, which costs more than a small kernel.

What torch.library registers is for graphs: there the wrapping is traced away.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def asks_for_gradients(*tensors: Tensor | None) -> bool:
    """Whether what is computed from these tensors now will have to be differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def differentiable(op: Any, setup_context: Callable, backward: Callable, outputs: int = 1) -> Callable:
    """An operator's kernel, with its derivative, as a function to call in eager mode.

    Args:
        op: The operator, one of ``torch.ops``, or a function of its name around it; it may make views.
        setup_context: As :func:`torch.library.register_autograd` takes it.
        backward: Likewise; calls operators that say themselves that they have no derivative. The gradient of an output
            that nothing depended on is None here, where torch.library gives zeros.
        outputs: How many of the outputs, the first ones, have gradients.

    Returns:
        A function of the operator's positional arguments. Its ``grad_fn`` bears the operator's name.
    """

    # setup_context is called, not overridden: PyTorch would look up the signature of `forward` at every call.
    def forward(ctx, *inputs):
        # Else zeros would be allocated and written for every output without a gradient.
        ctx.set_materialize_grads(False)
        # Views of results made here are results themselves, not to be told from what an operator returns.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            output = op(*inputs)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[outputs:])
        setup_context(ctx, inputs, output)
        return output

    def backward_once(ctx, *grads):
        if torch.is_grad_enabled():  # a graph of the gradient is asked for: let the operators refuse a derivative of it
            return backward(ctx, *grads)
        with torch._C._AutoDispatchBelowAutograd():
            return backward(ctx, *grads)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_once)}
    function: Any = type(f"eager_{op.__name__}", (torch.autograd.Function,), methods)
    return function.apply
