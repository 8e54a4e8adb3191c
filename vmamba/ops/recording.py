"""What scans were called with, kept for whoever wants to look inside a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScanCall:
    """The arguments of one call of :func:`vmamba.ops.selective_scan`, with its shapes, cut from autograd's graph."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor | None
    D: Tensor | None
    dt_weight: Tensor | None
    dt_bias: Tensor | None
    route: Tensor
    param_route: Tensor | None
    reset: Tensor | None
    dt_softplus: bool
    result: str


_RECORDS: list[list[ScanCall]] = []
"""One list for each :func:`record_scans` that is open."""


@contextmanager
def record_scans() -> Iterator[list[ScanCall]]:
    """Within it, every call of :func:`vmamba.ops.selective_scan` in this process adds itself to the list it gives.

    Example::

        with torch.no_grad(), record_scans() as calls:
            model(images)

    A compiled model runs without the calls that could be seen: record the model it was made from. The tensors are those
    of the model, not copies.
    """
    calls: list[ScanCall] = []
    _RECORDS.append(calls)
    try:
        yield calls
    finally:
        _RECORDS[:] = [record for record in _RECORDS if record is not calls]


def is_recording() -> bool:
    """Whether anyone listens; to torch.compile, nobody does."""
    return not torch.compiler.is_compiling() and len(_RECORDS) > 0


def note(*arguments: Tensor | bool | str | None) -> None:
    """Adds a call, given by the fields of :class:`ScanCall` in their order, to all open lists."""
    call = ScanCall(*(x.detach() if isinstance(x, Tensor) else x for x in arguments))  # type: ignore[arg-type]
    for record in _RECORDS:
        record.append(call)
