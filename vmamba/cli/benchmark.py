"""`vmamba benchmark`."""

import datetime
import logging
import sys
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vmamba.analysis.benchmark.jobs import DTYPES, LARGEST, MODES, TASKS, Job, Sweep
from vmamba.cli.option_types import positive_integer
from vmamba.cli.output_files import check_outputs
from vmamba.errors import UserError, nearest

if TYPE_CHECKING:
    from vmamba.analysis.benchmark.meters import Meter
    from vmamba.analysis.benchmark.results import Book, Result

_logger = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """Models, settings to sweep, how to measure, where to write."""
    parser.epilog = "options with an s at the end of their metavar take several values: --size 224,512 --batch 1,128"
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names, or patterns such as 'vmamba_*'")
    parser.add_argument(
        "--peers", type=_names, default=[], metavar="NAMES", help="timm's, such as swin_tiny,convnext_tiny"
    )
    sweep = parser.add_argument_group("settings (all combinations are measured)")
    sweep.add_argument("--task", type=_some_of(TASKS), default=["inference"], metavar="TASKS", help=_choices(TASKS))
    sweep.add_argument("--mode", type=_some_of(MODES), default=["eager"], metavar="MODES", help=_choices(MODES))
    sweep.add_argument(
        "--dtype",
        type=_some_of(tuple(DTYPES)),
        metavar="DTYPES",
        help="; ".join(f"{name}: {meaning}" for name, meaning in DTYPES.items()) + " (default: amp-bf16; CPU float32)",
    )
    sweep.add_argument("--batch", type=_integers, metavar="NS", help="images a call (default: 128; CPU 1)")
    sweep.add_argument("--size", type=_integers, default=[224], metavar="NS", help="side of the images (default: 224)")
    sweep.add_argument("--in-chans", type=positive_integer, default=3, metavar="N", help="channels (default: 3)")
    sweep.add_argument(
        "--channels-last", action=BooleanOptionalAction, default=True, help="memory layout (default: channels last)"
    )
    sweep.add_argument(
        "--optimizer",
        choices=("none", "adamw"),
        default="none",
        help="training with the optimiser's step (default: none)",
    )
    sweep.add_argument("--find-batch", action="store_true", help="take the largest batch that fits, alone, per model")
    sweep.add_argument("--memory-limit", type=float, metavar="GIB", help="memory that --find-batch may use")
    run = parser.add_argument_group("run")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    run.add_argument("--threads", type=positive_integer, metavar="N", help="CPU threads (default: PyTorch's)")
    run.add_argument(
        "--budget", type=float, default=3.0, metavar="S", help="seconds of timed calls a figure (default: 3)"
    )
    run.add_argument("--rounds", type=positive_integer, default=9, metavar="N", help="turns of each model (default: 9)")
    run.add_argument("--profile", type=positive_integer, metavar="N", help="also print the N dearest operators of each")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--output",
        type=Path,
        metavar="STEM",
        help="writes STEM.json, .csv, .md and pictures (default: runs/benchmark-TIME)",
    )
    files.add_argument("--add", action="store_true", help="go on with these files, leaving out what they have")
    files.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar="JSON",
        help="print two files side by side; refused where settings differ",
    )


def run(args: Namespace) -> None:
    """Measure, or compare what was measured."""
    from vmamba.cli.output import on_terminal

    if args.compare:
        from vmamba.analysis.benchmark.comparison import compare

        if args.models or args.peers:
            raise UserError("--compare reads two files and measures nothing; leave the models out")
        print(compare(*args.compare))
        return
    with on_terminal():
        _measure(args)


def _measure(args: Namespace) -> None:
    import torch

    from vmamba.analysis.benchmark import environment
    from vmamba.analysis.benchmark.meters import make_meter
    from vmamba.analysis.benchmark.results import Book
    from vmamba.training.distributed import join

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with join(args.device) as process:
        sweep = _sweep(args, process.device.type)
        facts = environment.describe(process.device)
        stem = args.output or Path("runs") / f"benchmark-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        book = Book(stem, facts, args.add)
        check_outputs(book.paths, overwrite=True)  # those that are there are the book's own
        _logger.info(", ".join(f"{key} {value}" for key, value in facts.items() if value not in (None, "")))
        meter = make_meter(process.device)
        new = _fill(book, sweep, meter, args)
        if args.profile:
            _print_profiles(new, meter, args.profile)
        _report(book, new)


def _sweep(args: Namespace, device: str) -> Sweep:
    from vmamba.analysis.benchmark.peers import resolve

    names = [name for typed in (*args.models, *args.peers) for name in resolve(typed)]
    if not names:
        raise UserError("which models? give names, such as vmamba_tiny --peers swin_tiny,convnext_tiny")
    on_gpu = device == "cuda"
    if not on_gpu and any(mode.endswith("graph") for mode in args.mode):
        raise UserError(f"--mode graph replays CUDA graphs, which device '{device}' has not; use eager or compiled")
    if args.find_batch and not on_gpu and args.memory_limit is None:
        raise UserError("--find-batch on a CPU needs --memory-limit GIB: its memory ends without a clear error")
    return Sweep(
        list(dict.fromkeys(names)),
        args.task,
        args.mode,
        args.dtype or ["amp-bf16" if on_gpu else "float32"],
        [LARGEST] if args.find_batch else args.batch or [128 if on_gpu else 1],
        args.size,
        args.in_chans,
        args.channels_last,
        args.optimizer,
    )


def _fill(book: "Book", sweep: Sweep, meter: "Meter", args: Namespace) -> "list[Result]":
    """Measures what the book has not; returns that."""
    from tqdm import tqdm

    cells = [[job for job in cell if not book.has(job)] for cell in sweep.cells()]
    total = sum(map(len, cells))
    known = sum(map(len, sweep.cells())) - total
    if known:
        _logger.info(f"{known} results are there already")
    new = []
    with tqdm(total=total, leave=False, disable=not sys.stderr.isatty(), unit="result") as bar:
        try:
            for result in _results(cells, meter, args, bar.set_postfix_str):
                book.add(result)
                new.append(result)
                bar.clear()
                _logger.info(_line(result))
                bar.update()
        except KeyboardInterrupt:
            bar.close()
            _logger.info(f"stopped; {len(book.results)} results are in {book.json_path}; go on with --output and --add")
            raise
    return new


def _results(
    cells: Sequence[Sequence[Job]], meter: "Meter", args: Namespace, announce: Callable[[str], None]
) -> "Iterator[Result]":
    """What becomes of the jobs of each cell, in turns; with --find-batch each alone, as it fills the memory."""
    from vmamba.analysis.benchmark.turns import Effort, measure, measure_largest_batch

    effort = Effort(args.budget, args.rounds)
    limit = None if args.memory_limit is None else int(args.memory_limit * 2**30)
    for cell in cells:
        if args.find_batch:
            for job in cell:
                yield from measure_largest_batch(job, meter, effort, limit, announce)
        else:
            yield from measure(cell, meter, effort, announce)


def _print_profiles(results: "list[Result]", meter: "Meter", count: int) -> None:
    from vmamba.analysis.benchmark.profile import dearest_operators
    from vmamba.analysis.benchmark.results import measured

    for job, _ in measured(results):
        _logger.info(f"{job.model} ({job.settings})\n{dearest_operators(job, meter, count)}")


def _line(result: "Result") -> str:
    from vmamba.analysis.benchmark.results import Failure, rate

    head = f"{result.job.model:<30} {result.job.settings:<48}"
    figures = result.outcome
    if isinstance(figures, Failure):
        return f"{head} failed: {figures.reason}"
    return (
        f"{head} {rate(figures.images_per_s):>8} img/s ±{figures.spread:.1f} %  latency {figures.latency_ms:.2f} ms  "
        f"{figures.peak_gib:.2f} GiB  first call {figures.first_call_s:.1f} s"
    )


def _report(book: "Book", new: "list[Result]") -> None:
    from vmamba.analysis.benchmark.plots import draw
    from vmamba.analysis.benchmark.results import measured

    if book.results:
        pictures = draw(book.results, book.environment, book.stem)
        _logger.info(f"wrote  {book.stem}.json, .csv, .md{''.join(f', {path.name}' for path in pictures)}")
    failed = len(new) - len(measured(new))
    if failed:
        raise UserError(f"{failed} of {len(new)} measurements failed; their rows say why, the others stand")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _integers(text: str) -> list[int]:
    try:
        return [positive_integer(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"'{text}' is not a list of positive whole numbers such as 1,8,128") from None


def _some_of(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = _names(text)
        odd = next((name for name in names if name not in known), None)
        if odd is not None or not names:
            raise ArgumentTypeError(f"'{odd or text}' is none of {', '.join(known)}{nearest(odd or text, known)}")
        return names

    return parse


def _choices(names: tuple[str, ...]) -> str:
    return f"{', '.join(names)} (default: {names[0]})"
