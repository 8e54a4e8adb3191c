"""Whole models on a GPU: images per second and peak memory of ours beside timm's peers, in one process, taking turns.

    python benchmarks/models.py                                     # VMamba-T and its peers, all modes
    python benchmarks/models.py --models vmamba_tiny vim_tiny_patch16_224 --modes eager --profile vmamba_tiny

Inference runs under inference_mode, training is forward, cross-entropy and backward without the optimiser; both under
bfloat16 autocast, weights in float32, TF32 on, images resident in channels_last memory. Medians over CUDA events.
"""

import argparse
import contextlib
import csv
import datetime
import gc
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from torch import nn

import vmamba

DEFAULT_MODELS = ("vmamba_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny", "mambaout_tiny")
MODES = ("eager", "compiled")
TASKS = ("inference", "training")

Run = Callable[[], object]


def make_run(name: str, task: str, mode: str, batch: int, size: int) -> tuple[Run, nn.Module]:
    """One step of a model, and the model."""
    sized = {"img_size": size} if size != 224 else {}
    model = timm.create_model(name, **sized).cuda().to(memory_format=torch.channels_last)
    model.train(task == "training")
    images = torch.randn(batch, 3, size, size, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device="cuda")
    forward = torch.compile(model, fullgraph=True, dynamic=False) if mode == "compiled" else model

    def infer() -> torch.Tensor:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            return forward(images)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return (step if task == "training" else infer), model


def milliseconds(run: Run, repeats: int) -> float:
    """One timing: ``repeats`` calls between two events, per call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


@contextlib.contextmanager
def clean_memory() -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    gc.collect()
    torch.cuda.empty_cache()


def compare(names: list[str], task: str, mode: str, batch: int, size: int, rounds: int) -> list[dict[str, object]]:
    """Times the models in turns; a row each."""
    runs, peaks = {}, {}
    for name in names:
        torch.compiler.reset()
        with clean_memory():
            run, _model = make_run(name, task, mode, batch, size)
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30
        runs[name] = run
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(milliseconds(run, repeats=5))
    rows = []
    for name in names:
        median = statistics.median(times[name])
        row = {
            "model": name, "task": task, "mode": mode, "batch": batch, "size": size, "ms": round(median, 3),
            "img_per_s": round(1e3 * batch / median), "peak_gib": round(peaks[name], 2),
        }  # fmt: skip
        print(
            f"{task:<10} {mode:<9} batch {batch:>3} at {size:>4}  {name:<32} {row['img_per_s']:>7} img/s  "
            f"{row['peak_gib']:>6} GiB",
            flush=True,
        )
        rows.append(row)
    return rows


def profile(name: str, task: str, mode: str, batch: int, size: int) -> None:
    """Prints where one model's GPU time goes, by kernel."""
    run, _ = make_run(name, task, mode, batch, size)
    for _ in range(3):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    print(f"--- {name}, {task}, {mode}")
    print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=24, max_name_column_width=70))


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """Writes what there is so far: a run that is cut short leaves its finished comparisons."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def settings() -> dict[str, object]:
    """What the numbers depend on."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vmamba": vmamba.__version__,
        "dtype": "bfloat16 autocast",
        "tf32": True,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(DEFAULT_MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--batch", type=int, nargs="+", default=[128])
    parser.add_argument("--size", type=int, nargs="+", default=[224])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", nargs="+", metavar="MODEL", default=[], help="print these models' kernels instead")
    parser.add_argument("--csv", type=Path, default=Path("results/models.csv"))
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    facts = settings()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))

    points = [(t, m, b, s) for m in args.modes for t in args.tasks for b in args.batch for s in args.size]
    if args.profile:
        for name in args.profile:
            for point in points:
                profile(name, *point)
        return
    rows: list[dict[str, object]] = []
    for point in points:
        rows += compare(args.models, *point, args.rounds)
        write(args.csv, [{**row, **facts} for row in rows])
    print(f"written to {args.csv}")


if __name__ == "__main__":
    main()
