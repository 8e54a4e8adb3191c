"""Two benchmark files side by side, if they may be compared."""

from dataclasses import fields
from pathlib import Path

from vmamba.analysis.benchmark.environment import CODE_FACTS
from vmamba.analysis.benchmark.jobs import Job
from vmamba.analysis.benchmark.results import Environment, Figures, Measured, differences, measured, rate, read
from vmamba.errors import UserError


def compare(first: Path, second: Path) -> str:
    """A table of what both files measured, with the ratio of their speeds.

    A ratio is marked with a tilde where the quartiles of both overlap: it may be chance.

    Raises:
        UserError: Other hardware, versions or settings; only this package's own code may differ.
    """
    (environment_a, results_a), (environment_b, results_b) = read(first), read(second)
    differing = differences(environment_a, environment_b, ignored=CODE_FACTS)
    if differing:
        raise UserError(
            f"{first} and {second} cannot be compared, only vmamba itself may differ: {'; '.join(differing)}"
        )
    of_a = dict(measured(results_a))
    pairs = [(job, of_a[job], figures) for job, figures in measured(results_b) if job in of_a]
    if not pairs:
        why = _why_nothing_in_common(measured(results_a), measured(results_b))
        raise UserError(f"{first} and {second} cannot be compared: {why}")
    lines = [_code(first, environment_a), _code(second, environment_b), ""]
    lines.append("| model | settings | images/s | then | ratio | peak GiB | then |")
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    lines += [_line(*pair) for pair in pairs]
    left_out = len(results_a) + len(results_b) - 2 * len(pairs)
    if left_out:
        lines += ["", f"left out: {left_out} results that only one of them has"]
    return "\n".join(lines)


def _code(path: Path, environment: Environment) -> str:
    facts = [str(environment.get(key, "")) for key in ("vmamba", "commit", "date")]
    return f"{path}: {', '.join(fact for fact in facts if fact)}"


def _line(job: Job, a: Figures, b: Figures) -> str:
    may_be_chance = a.ms_q1 <= b.ms_q3 and b.ms_q1 <= a.ms_q3
    return (
        f"| {job.model} | {job.settings} | {rate(a.images_per_s)} | {rate(b.images_per_s)} | "
        f"{'~' if may_be_chance else ''}{b.images_per_s / a.images_per_s:.2f} | {a.peak_gib:.2f} | {b.peak_gib:.2f} |"
    )


def _why_nothing_in_common(a: list[Measured], b: list[Measured]) -> str:
    for field in fields(Job):
        of_a, of_b = ({str(getattr(job, field.name)) for job, _ in side} for side in (a, b))
        if not of_a & of_b:
            return f"{field.name} is {', '.join(sorted(of_a))} in one and {', '.join(sorted(of_b))} in the other"
    return "no model was measured under the same settings in both"
