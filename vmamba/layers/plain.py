"""Whether a module may be computed without being called."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import nn
from torch.nn.modules import module as torch_module


def is_plain(module: Any, cls: type[nn.Module]) -> bool:
    """Whether ``module`` is a ``cls``, not of a subclass, which may change what ``forward`` calls, and unwatched.

    Where modules are, parts of several can be computed in one pass, and nobody can tell. Hooks, wrappers and tracers
    that rely on hooks find what they would find without that.
    """
    return type(module) is cls and is_unwatched(module)


def is_unwatched(module: Any) -> bool:
    """Whether calling ``module`` is running the ``forward`` of its class, and nothing else."""
    if "forward" in vars(module):  # graphs and offloading put theirs there
        return False
    try:
        return not (
            module._compiled_call_impl
            or module._forward_pre_hooks
            or module._forward_hooks
            or module._backward_pre_hooks
            or module._backward_hooks
            or torch_module._has_any_global_hook()
        )
    except AttributeError:  # a PyTorch that keeps its hooks elsewhere
        return False


def is_plain_linear(layer: Any) -> bool:
    """Whether ``layer`` is a linear layer that is plain, and so is its weight: quantised ones are of other classes."""
    return is_plain(layer, nn.Linear) and type(layer.weight) is nn.Parameter


def drops_nothing(drop_path: Any) -> bool:
    """Whether stochastic depth is a plain module that leaves the map as it is."""
    if is_plain(drop_path, DropPath):
        return not (drop_path.training and drop_path.drop_prob)
    return is_plain(drop_path, nn.Identity)


def names_calls(x: Any) -> bool:
    """Whether a graph is being made that says which module was called for what: by torch.fx, trace or export.

    Args:
        x: What the modules in question are to be called with.
    """
    if torch.compiler.is_dynamo_compiling():
        return False  # there is_exporting() is always true
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting()
