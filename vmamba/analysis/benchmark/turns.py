"""Lets models take turns, so that a disturbance, or a clock that drifts, hits all of them alike.

A model that fails, out of memory or while it is compiled, gives a result that says why; the others go on.
"""

import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from vmamba.analysis.benchmark.jobs import Job
from vmamba.analysis.benchmark.meters import Meter
from vmamba.analysis.benchmark.results import Failure, Figures, Result
from vmamba.analysis.benchmark.steps import Run, Step, make_step
from vmamba.errors import UserError

_WARM_UPS = 3
_WARM_UP_SECONDS = 5
_FEWEST_ROUNDS = 3
_MOST_CALLS = 200  # a turn
_LONGEST_REASON = 300

# torch.compile keeps what it compiled by the code of `forward`, which models share with others of their family.
_COMPILED_AT_A_TIME = 256

Announce = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        budget: Seconds of timed calls for each model and setting; what is slow still gets three rounds of one call.
        rounds: Turns of each model.
    """

    budget: float = 3.0
    rounds: int = 9

    def calls(self, call_ms: float) -> int:
        """Calls a turn."""
        return max(1, min(_MOST_CALLS, int(1e3 * self.budget / self.rounds / call_ms)))

    def turns(self, slowest_ms: float) -> int:
        """Rounds for a model whose turn cannot be shorter than one call of so many milliseconds."""
        return max(_FEWEST_ROUNDS, min(self.rounds, int(1e3 * self.budget / slowest_ms)))


@dataclass
class _Contestant:
    """A model that is ready, and its times so far."""

    job: Job
    step: Step
    run: Run
    peak_bytes: int
    first_call_s: float
    call_ms: float
    ms: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    def figures(self) -> Figures:
        median = statistics.median(self.ms)
        q1, _, q3 = statistics.quantiles(self.ms, n=4, method="inclusive")
        latencies = sorted(self.latencies)
        return Figures(
            images_per_s=1e3 * self.job.batch / median,
            ms=median,
            ms_q1=q1,
            ms_q3=q3,
            latency_ms=statistics.median(latencies),
            latency_p95_ms=latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))],
            peak_gib=self.peak_bytes / 2**30,
            first_call_s=self.first_call_s,
            params_m=self.step.params / 1e6,
        )


def measure(
    jobs: Sequence[Job], meter: Meter, effort: Effort, announce: Announce = lambda text: None
) -> Iterator[Result]:
    """Measures jobs of the same settings, in turns.

    All models are on the device at once. One that only fits alone is measured after the others.

    Args:
        jobs: What to measure.
        meter: The device.
        effort: How long.
        announce: Called with what is being done.

    Yields:
        A result for each job; failures as soon as they happen.

    Raises:
        UserError: if the device itself does not go on after a failure.
    """
    waiting = list(jobs)
    while waiting:
        ready: list[_Contestant] = []  # those of a round before are gone now
        too_large: list[Job] = []
        _make_room(waiting, meter)
        for job in waiting:
            announce(f"preparing {job.model} ({job.settings})")
            outcome = _attempt(job, meter)
            if isinstance(outcome, _Contestant):
                ready.append(outcome)
            elif ready and outcome.out_of_memory:
                too_large.append(job)
            else:
                yield Result(job, outcome)
            del outcome  # else it lives on beside the next model
        too_large += yield from _take_turns(ready, meter, effort, announce)
        waiting = too_large


def measure_largest_batch(
    job: Job, meter: Meter, effort: Effort, limit_bytes: int | None, announce: Announce = lambda text: None
) -> Iterator[Result]:
    """Measures a job at the most images a call that fit, within a sixteenth of the number.

    Args:
        job: What to measure; its batch does not matter.
        meter: The device.
        effort: How long.
        limit_bytes: Peak memory allowed; None for all there is.
        announce: Called with what is being done.

    Yields:
        The result; a failure if not even one image fits, or if the model fails for another reason.
    """

    def fits(batch: int) -> bool:
        trial = replace(job, batch=batch)
        announce(f"does batch {batch} fit? {job.model} ({trial.settings})")
        _make_room([trial], meter)
        outcome = _attempt(trial, meter)
        if isinstance(outcome, _Contestant):
            return limit_bytes is None or outcome.peak_bytes <= limit_bytes
        if not outcome.out_of_memory:
            raise UserError(f"at batch {batch}, {outcome.reason}")
        return False

    try:
        batch = search_largest(fits)
    except UserError as error:
        yield Result(job, explain(error), batch_found=True)
        return
    for result in measure([replace(job, batch=batch)], meter, effort, announce):
        yield replace(result, batch_found=True)


def search_largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, within a sixteenth, by doubling and halving.

    Raises:
        UserError: if 1 does not fit.
    """
    if not fits(1):
        raise UserError("not even one image fits into the memory; take a smaller --size or another --dtype")
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def _attempt(job: Job, meter: Meter) -> _Contestant | Failure:
    """The model, ready; or why it is not, after which all its memory is free again."""
    try:
        return _prepare(job, meter)
    except Exception as error:  # compilers and kernels raise what they like
        failure = explain(error)
    # Not before: the exception's traceback holds on to the model.
    _check(job, meter)
    return failure


def explain(error: Exception) -> Failure:
    """An exception in one line, with the one that was first where it is the last of several."""
    if isinstance(error, UserError):
        return Failure(str(error))
    causes = list(_causes(error))  # compilers wrap what they stumble over, an ended capture hides it
    reason = _in_short(error) if len(causes) == 1 else f"{_in_short(error)} (first {_in_short(causes[-1])})"
    if any(_is_out_of_memory(cause) for cause in causes):
        return Failure(f"out of memory: {reason}", out_of_memory=True)
    return Failure(reason)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: PyTorch's own, or one inside our operators, which lose the exception's type."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def _in_short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_LONGEST_REASON]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, and those it came from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _check(job: Job, meter: Meter) -> None:
    """After a failure: is the device still of use?

    Raises:
        UserError: It is not.
    """
    meter.release()
    broken = meter.broken()
    if broken:
        raise UserError(f"the GPU does not go on after {job.model} ({job.settings}): {broken}; start again without it")


def _prepare(job: Job, meter: Meter) -> _Contestant:
    meter.mark()
    step = make_step(job, meter.device)
    with meter.warming(job.graph):
        first_call_s = _seconds(step.run, meter)
        call_s = _warm_up(step.run, meter)
    run, peak_bytes = meter.peak(step, job.graph)
    call_s = min(call_s, _seconds(run, meter))
    return _Contestant(job, step, run, peak_bytes, first_call_s, 1e3 * call_s)


def _warm_up(run: Run, meter: Meter) -> float:
    """Seconds of the quickest of a few calls; fewer of them where they are slow."""
    calls: list[float] = []
    while len(calls) < _WARM_UPS and sum(calls) < _WARM_UP_SECONDS:
        calls.append(_seconds(run, meter))
    return min(calls)


def _seconds(run: Run, meter: Meter) -> float:
    meter.wait()
    start = time.perf_counter()
    run()
    meter.wait()
    return time.perf_counter() - start


def _take_turns(
    contestants: list[_Contestant], meter: Meter, effort: Effort, announce: Announce
) -> Generator[Result, None, list[Job]]:
    """Yields results; returns the jobs that ran out of memory beside the others.

    Those that fail leave the list, so that their memory is free.
    """
    retry: list[Job] = []
    rounds = {contestant.job: effort.turns(contestant.call_ms) for contestant in contestants}
    for number in range(max(rounds.values(), default=0)):
        company = len(contestants) > 1
        failures: dict[Job, Failure] = {}
        for index in range(len(contestants)):
            job = contestants[index].job
            if number < rounds[job]:
                announce(f"round {number + 1}: {job.model} ({job.settings})")
                failure = _take_turn(contestants[index], meter, effort)
                if failure is not None:
                    failures[job] = failure
        contestants[:] = [contestant for contestant in contestants if contestant.job not in failures]
        for job, failure in failures.items():
            _check(job, meter)
            if company and failure.out_of_memory:
                retry.append(job)
            else:
                yield Result(job, failure)
    for contestant in contestants:
        yield Result(contestant.job, contestant.figures())
    return retry


def _take_turn(contestant: _Contestant, meter: Meter, effort: Effort) -> Failure | None:
    try:
        contestant.run()  # what the others left in caches is not its own
        turn = meter.turn(contestant.run, effort.calls(contestant.call_ms))
    except Exception as error:
        return explain(error)
    contestant.ms.append(turn.ms)
    contestant.latencies += turn.latencies
    return None


def _make_room(jobs: Sequence[Job], meter: Meter) -> None:
    if any(job.compiled for job in jobs):
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = _COMPILED_AT_A_TIME
    meter.release()
