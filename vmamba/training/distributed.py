"""One training process among several, as torchrun starts them."""

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so

from vmamba.errors import UserError


@dataclass(frozen=True)
class Process:
    """Where this process stands.

    Args:
        device: What it computes on.
        rank: Its number.
        world: How many there are.
    """

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in all of them."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, value: Any) -> Any:
        """What the first process has, in all of them."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def join(device: str = "auto") -> Iterator[Process]:
    """Join the group that torchrun describes in the environment; alone without one.

    The processes talk through NCCL on GPUs and gloo on CPUs. At the end nothing may refer to a model that was trained
    in the group; see :func:`leave`.

    Args:
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``. In a group, each process takes the
            GPU of its local rank.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # timm would look for a group in SLURM's variables as well, which an interactive allocation sets for nothing.
        yield Process(torch.device(device))
        return
    info = init_distributed_device_so(device)
    try:
        yield Process(torch.device(info["device"]), info["global_rank"], info["world_size"])
    finally:
        leave()


def leave() -> None:
    """Leave the group.

    A DistributedDataParallel that is still there would become the group's last owner. When it goes, it waits for gloo's
    thread with Python's lock in hand, and that thread may want the lock to drop the tensors of its last message.
    """
    gc.collect()
    dist.destroy_process_group()


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"unknown device '{device}'; use auto, cpu, cuda or cuda:N") from error
    if kind != "cuda":
        return
    if not torch.cuda.is_available():
        raise UserError(f"device '{device}' asked for, but torch {torch.__version__} sees no CUDA GPU")
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_processes > torch.cuda.device_count():
        raise UserError(f"{local_processes} processes, but only {torch.cuda.device_count()} GPU(s) here")
