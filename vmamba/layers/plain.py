"""Whether a module may be computed without being called."""

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module


def is_plain(module: Any, cls: type[nn.Module]) -> bool:
    """Whether calling ``module`` is running the ``forward`` of ``cls``: nobody overrides or watches it.

    Where it is, parts of several modules can be computed in one pass, and nobody can tell. Hooks, wrappers and tracers
    that rely on hooks find what they would find without that.
    """
    if type(module).forward is not cls.forward or "forward" in vars(module):  # graphs and offloading put theirs there
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
