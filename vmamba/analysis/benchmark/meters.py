"""How a call is timed, and its memory taken, on a CPU and on a GPU."""

import contextlib
import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from vmamba.analysis.benchmark.steps import Run, Step


@dataclass(frozen=True)
class Turn:
    """One model's turn.

    Attributes:
        ms: Milliseconds a call, of calls that follow each other without a pause.
        latencies: Milliseconds of single calls, from an idle device to the finished result.
    """

    ms: float
    latencies: list[float]


class Meter(Protocol):
    """Times calls on one device."""

    device: torch.device

    def mark(self) -> None:
        """Call before a model is built: what is allocated then is not the model's."""

    def warming(self, graph: bool) -> AbstractContextManager[object]:
        """Context of the calls before anything is measured."""
        ...

    def wait(self) -> None:
        """Until the device has done everything."""

    def peak(self, step: Step, graph: bool) -> tuple[Run, int]:
        """Most bytes allocated in a call, model and images included; with it what is to be timed."""
        ...

    def turn(self, run: Run, calls: int) -> Turn:
        """Times that many calls."""
        ...

    def release(self) -> None:
        """Gives memory that nobody holds back to the device."""

    def broken(self) -> str | None:
        """Why the device cannot go on after a failure, or None if it can."""
        ...


def make_meter(device: torch.device) -> Meter:
    """The meter for a device; a GPU without a number is the current one."""
    if device.type != "cuda":
        return CpuMeter(device)
    return CudaMeter(device if device.index is not None else torch.device("cuda", torch.cuda.current_device()))


class CpuMeter:
    """Wall-clock time; memory as PyTorch's allocator handed it out, seen by its profiler."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> None:
        pass

    def warming(self, graph: bool) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def wait(self) -> None:
        pass

    def peak(self, step: Step, graph: bool) -> tuple[Run, int]:
        resident = step.resident_bytes()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
            step.run()
        assert profiler.profiler is not None
        assert profiler.profiler.kineto_results is not None
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return step.run, resident + most

    def turn(self, run: Run, calls: int) -> Turn:
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return Turn(statistics.median(times), times)

    def release(self) -> None:
        gc.collect()

    def broken(self) -> str | None:
        return None


class CudaMeter:
    """CUDA events for what follows without a pause, wall-clock time for single calls; the caching allocator's peak."""

    _LATENCY_CALLS = 5  # a turn

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        # cuBLAS takes its workspace with the first product; it is nobody's in particular.
        product = torch.ones(64, 64, device=device)
        product @ product
        self.wait()
        self._before = 0

    def mark(self) -> None:
        self.release()
        self._before = torch.cuda.memory_allocated()

    @contextlib.contextmanager
    def _side_stream(self) -> Iterator[None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def warming(self, graph: bool) -> AbstractContextManager[object]:
        # What is captured must not have run on the default stream: autograd would sum gradients there.
        return self._side_stream() if graph else contextlib.nullcontext()

    def wait(self) -> None:
        torch.cuda.synchronize()

    def peak(self, step: Step, graph: bool) -> tuple[Run, int]:
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        run = _captured(step.run) if graph else step.run
        if not graph:
            run()
        self.wait()
        return run, torch.cuda.max_memory_allocated() - self._before

    def turn(self, run: Run, calls: int) -> Turn:
        self.wait()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        self.wait()
        latencies = []
        for _ in range(min(calls, self._LATENCY_CALLS)):
            begin = time.perf_counter()
            run()
            self.wait()
            latencies.append(1e3 * (time.perf_counter() - begin))
        return Turn(start.elapsed_time(end) / calls, latencies)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def broken(self) -> str | None:
        try:
            # A capture that failed leaves its stream as the current one, and may leave random numbers unusable.
            torch.cuda.set_stream(torch.cuda.default_stream())
            torch.rand(1, device=self.device)
            self.wait()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return None


def _captured(run: Run) -> Run:
    """The call, already warm, as a CUDA graph: its inputs and weights stay where they are, its results go where they
    went."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
