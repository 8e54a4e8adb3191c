"""PyTorch in the place of kernels, so that what surrounds them runs on a CPU."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def standing_in(module: str, **operators: Callable) -> Iterator[None]:
    """Registers functions as the CPU's kernels of this package's operators, which ``vmamba.ops.MODULE`` then uses."""
    has_them = sys.modules[f"vmamba.ops.{module}"]  # the package may have a function of that name
    with pytest.MonkeyPatch.context() as patch, torch.library._scoped_library("vmamba", "IMPL") as library:
        patch.setattr(has_them, "_has_kernel", lambda *args: True)
        for name, function in operators.items():
            library.impl(name, function, "CPU")
        yield
