"""One process of a group that torchrun started, on GPUs or on CPUs."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from mmengine.config import Config

from vmamba.errors import UserError
from vmamba.training.distributed import leave


@contextlib.contextmanager
def joined(settings: Config) -> Iterator[None]:
    """Tell MMEngine's runner about the group; alone without one.

    On GPUs the runner joins it by itself. Without any it would still ask for them, so there it is joined here.

    Args:
        settings: The runner's configuration; changed in place.

    Raises:
        UserError: There are fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        settings.launcher = "none"
        yield
        return
    settings.launcher = "pytorch"
    if torch.cuda.is_available():
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if processes > torch.cuda.device_count():
            raise UserError(f"{processes} processes, but only {torch.cuda.device_count()} GPU(s) here")
    else:
        dist.init_process_group("gloo")
        settings.model_wrapper_cfg = {
            "type": "MMDistributedDataParallel",
            "device_ids": None,
            "find_unused_parameters": settings.get("find_unused_parameters", False),
        }
    try:
        yield
    finally:
        if dist.is_initialized():
            leave()
