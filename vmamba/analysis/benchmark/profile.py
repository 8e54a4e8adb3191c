"""Where the time of a call goes, by operator or kernel."""

import torch

from vmamba.analysis.benchmark.jobs import Job
from vmamba.analysis.benchmark.meters import Meter
from vmamba.analysis.benchmark.steps import make_step

_NAME_WIDTH = 90
_CALLS = 3


def dearest_operators(job: Job, meter: Meter, count: int) -> str:
    """A table of the kernels (on a CPU, operators) that take most time, in milliseconds a call.

    CUDA graphs are profiled as what they were captured from.

    Args:
        job: What to profile; built anew.
        meter: Its device.
        count: Rows.
    """
    step = make_step(job, meter.device)
    for _ in range(_CALLS):
        step.run()
    meter.wait()
    on_gpu = meter.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(_CALLS):
            step.run()
        meter.wait()

    def milliseconds(event) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / _CALLS

    events = sorted(profiler.key_averages(), key=milliseconds, reverse=True)
    lines = [f"    {milliseconds(e):9.3f} ms  x{e.count / _CALLS:<6g} {e.key[:_NAME_WIDTH]}" for e in events[:count]]
    return "\n".join([f"  of {sum(map(milliseconds, events)):.3f} ms a call:", *lines])
