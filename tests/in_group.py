"""Runs a script, or after -m a module, in one process of a group; no model trained in the group may outlive it.

Such a model destroys the group while it holds Python's lock, and waits then for ever, one time in many, for a thread
that wants the lock. So this looks for the model, and does not wait for the time.
"""

import gc
import runpy
import sys

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def destroy_and_look() -> None:
    alive = sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
    destroy()
    if alive:
        sys.exit(f"{alive} DistributedDataParallel outlived the group of processes")


destroy, dist.destroy_process_group = dist.destroy_process_group, destroy_and_look

if sys.argv[1] == "-m":
    sys.argv[:] = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv[:] = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
