"""What came out of a benchmark: rows, and the files that keep them."""

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vmamba.analysis.benchmark.jobs import LARGEST, Job
from vmamba.errors import UserError
from vmamba.files import write_text

FORMAT = "vmamba-benchmark-1"

PICTURES = ("-accuracy.png", "-resolution.png")
"""How the names of the pictures end that are drawn of results."""

Environment = dict[str, Any]


@dataclass(frozen=True)
class Figures:
    """What a measurement gives.

    Attributes:
        images_per_s: Of the median time of calls that follow each other without a pause.
        ms: That median, over rounds.
        ms_q1: Its lower quartile.
        ms_q3: Its upper quartile.
        latency_ms: Median time of single calls, from an idle device to the finished result.
        latency_p95_ms: Its 95th percentile.
        peak_gib: Most memory allocated in a call, with model and images.
        first_call_s: Seconds of the first call, compilation included.
        params_m: Parameters in millions.
    """

    images_per_s: float
    ms: float
    ms_q1: float
    ms_q3: float
    latency_ms: float
    latency_p95_ms: float
    peak_gib: float
    first_call_s: float
    params_m: float

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, in percent of the median."""
        return 50 * (self.ms_q3 - self.ms_q1) / self.ms


@dataclass(frozen=True)
class Failure:
    """Why there are no figures, in one line, and whether that was for lack of memory."""

    reason: str
    out_of_memory: bool = False


@dataclass(frozen=True)
class Result:
    """What became of a job.

    Attributes:
        job: As it was measured.
        outcome: The figures, or why there are none.
        batch_found: Whether its batch was found as the largest that fits.
    """

    job: Job
    outcome: Figures | Failure
    batch_found: bool = False

    @property
    def asked(self) -> Job:
        """The job as it was asked for."""
        return replace(self.job, batch=LARGEST) if self.batch_found else self.job

    def row(self) -> dict[str, Any]:
        """Settings, figures and error, flat; what does not apply is None."""
        figures = dict.fromkeys(_FIGURES)
        error = ""
        if isinstance(self.outcome, Figures):
            figures = {key: float(f"{value:.6g}") for key, value in asdict(self.outcome).items()}
        else:
            error = self.outcome.reason
        return {**asdict(self.job), "batch_found": self.batch_found, **figures, "error": error}

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> "Result":
        """The inverse of :meth:`row`."""
        job = Job(**{field.name: row[field.name] for field in fields(Job)})
        outcome = Failure(row["error"]) if row["error"] else Figures(**{key: row[key] for key in _FIGURES})
        return cls(job, outcome, row.get("batch_found", False))  # which older files do not say


_FIGURES = tuple(field.name for field in fields(Figures))

Measured = tuple[Job, Figures]


def measured(results: Iterable[Result]) -> list[Measured]:
    """The jobs that succeeded, with their figures."""
    return [(result.job, result.outcome) for result in results if isinstance(result.outcome, Figures)]


class Book:
    """The results of a benchmark, kept in step with its files: STEM.json, .csv and .md.

    Args:
        stem: Path of the files, without their suffix.
        environment: Hardware, versions and settings that hold for all results.
        add: Whether to go on with files that are there.

    Raises:
        UserError: The files are there already, or were measured in another environment.
    """

    def __init__(self, stem: Path, environment: Environment, add: bool = False) -> None:
        self.stem = stem
        self.environment = environment
        self.results: list[Result] = []
        if self.json_path.exists():
            if not add:
                raise UserError(f"{self.json_path} exists; choose another --output, or go on with it by --add")
            there, self.results = read(self.json_path)
            differing = differences(there, environment)
            if differing:
                raise UserError(f"cannot add to {self.json_path}, measured under other conditions: {differing[0]}")
            self.environment = there
            return
        foreign = next((path for path in self.paths if path.exists()), None)
        if foreign is not None:
            raise UserError(f"{foreign} exists, and belongs to no {self.json_path.name}; choose another --output")

    @property
    def json_path(self) -> Path:
        return self._path(".json")

    @property
    def paths(self) -> list[Path]:
        """All files that a benchmark of this name writes."""
        return [self._path(end) for end in (".json", ".csv", ".md", *PICTURES)]

    def _path(self, end: str) -> Path:
        return self.stem.with_name(self.stem.name + end)

    def has(self, job: Job) -> bool:
        """Whether there are figures of the job."""
        return any(job == result.asked for result in self.results if isinstance(result.outcome, Figures))

    def add(self, result: Result) -> None:
        """Keeps a result, in place of an earlier one of the same job, and writes all files."""
        self.results = [other for other in self.results if other.asked != result.asked] + [result]
        rows = [result.row() for result in self.results]
        content = {"format": FORMAT, "environment": self.environment, "results": rows}
        write_text(self.json_path, json.dumps(content, indent=1) + "\n")
        write_text(self._path(".csv"), _as_csv({**row, **self.environment} for row in rows))
        write_text(self._path(".md"), as_markdown(self.results, self.environment))


def read(path: Path) -> tuple[Environment, list[Result]]:
    """Environment and results of a JSON file.

    Raises:
        UserError: There is no such file, or it is of another kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format '{content['format']}'")
        return content["environment"], [Result.of_row(row) for row in content["results"]]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, UnicodeError) as error:
        raise UserError(f"{path} is no JSON file of vmamba benchmark ({type(error).__name__}: {error})") from error


def differences(a: Environment, b: Environment, ignored: Iterable[str] = ("date",)) -> list[str]:
    """What differs between two environments, for a reader."""
    keys = [key for key in {**a, **b} if key not in set(ignored)]
    return [
        f"{key} {a.get(key, 'not stated')} and {b.get(key, 'not stated')}" for key in keys if a.get(key) != b.get(key)
    ]


def as_markdown(results: list[Result], environment: Environment) -> str:
    """A table for each setting, under the environment."""
    lines = [", ".join(f"{key} {value}" for key, value in environment.items() if value not in (None, "")), ""]
    by_settings: dict[str, list[Result]] = {}
    for result in results:
        by_settings.setdefault(result.job.settings, []).append(result)
    for settings, group in by_settings.items():
        lines += [f"**{settings}**", ""]
        lines.append("| model | params (M) | images/s | ± | latency ms (p95) | peak GiB | first call s |")
        lines.append("| --- | --- | --- | --- | --- | --- | --- |")
        lines += [_markdown_row(result) for result in group]
        lines.append("")
    return "\n".join(lines)


def _markdown_row(result: Result) -> str:
    figures = result.outcome
    if isinstance(figures, Failure):
        return f"| {result.job.model} | | {figures.reason.replace('|', '/')} | | | | |"
    return (
        f"| {result.job.model} | {figures.params_m:.1f} | {rate(figures.images_per_s)} | {figures.spread:.1f} % | "
        f"{figures.latency_ms:.2f} ({figures.latency_p95_ms:.2f}) | {figures.peak_gib:.2f} | "
        f"{figures.first_call_s:.1f} |"
    )


def rate(value: float) -> str:
    """Images per second with as many digits as they deserve."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _as_csv(rows: Iterable[dict[str, Any]]) -> str:
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
