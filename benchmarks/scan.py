"""Times the selective scan on a GPU: the SS2D core (x_proj, scan, merge) of VMamba's stages, and larger maps.

    python benchmarks/scan.py                        # the table, and a CSV under results/
    python benchmarks/scan.py --only "T stage 1" --profile
    python benchmarks/scan.py --sweep                # T stage 1 for images of 224 to 2048, batch 1 and 32; also a plot

Inputs are random and resident, timings are medians over CUDA events after warm-up. "target" is what the kernels are
built to reach on an H200, "published" what the authors' CUDA extension took there. Where mamba-ssm is installed, its
scan is timed on the same inputs, permuted and merged around it as it needs, and its result is compared with ours.
"""

import argparse
import csv
import datetime
import gc
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_timing import captured, milliseconds
from mamba_ssm_peer import MambaSsm
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vmamba.ops import get_route, selective_scan
from vmamba.ops.projected_scan import projected_scan, serves_projected_scan


@dataclass(frozen=True)
class Case:
    """One SS2D core: sizes, and milliseconds (forward, forward + backward) to compare with."""

    name: str
    batch: int
    channels: int
    height: int
    width: int
    states: int
    rank: int
    published: tuple[float | None, float | None]
    target: tuple[float | None, float | None]


CASES = (
    Case("T stage 1", 128, 96, 56, 56, 1, 6, (3.20, 8.89), (0.40, 1.5)),
    Case("T stage 2", 128, 192, 28, 28, 1, 12, (1.41, 4.29), (0.25, None)),
    Case("T stage 3", 128, 384, 14, 14, 1, 24, (0.79, 2.81), (0.15, None)),
    Case("T stage 4", 128, 768, 7, 7, 1, 48, (0.77, 2.50), (0.10, None)),
    Case("vanilla stage 1", 128, 192, 56, 56, 16, 6, (15.7, 64.4), (3.0, 11.0)),
    Case("detection", 2, 96, 200, 272, 1, 6, (0.90, 2.59), (None, 0.6)),
)

SWEEP_SIZES = (224, 512, 1024, 2048)
SWEEP_BATCHES = (1, 32)
SWEEP = tuple(
    Case(f"{size} x {size}, batch {batch}", batch, 96, size // 4, size // 4, 1, 6, (None, None), (None, None))
    for batch in SWEEP_BATCHES
    for size in SWEEP_SIZES
)
"""The first stage of VMamba-T for images of other sizes."""

WITH_MAMBA_SSM = importlib.util.find_spec("mamba_ssm") is not None


class Core:
    """x_proj, scan and merge with random weights."""

    def __init__(self, case: Case, dtype: torch.dtype, out_dtype: torch.dtype):
        directions, device = 4, "cuda"
        self.case, self.out_dtype = case, out_dtype
        features = case.rank + 2 * case.states
        self.x = torch.randn(case.batch, case.height * case.width, case.channels, device=device, dtype=dtype)
        projection = torch.randn(directions * features, case.channels, device=device, dtype=dtype)
        self.projection = torch.nn.Parameter(projection / case.channels**0.5)
        self.A = -torch.arange(1, case.states + 1, device=device).float().repeat(directions, case.channels, 1)
        self.D = torch.ones(directions, case.channels, device=device)
        self.dt_weight = torch.randn(directions, case.channels, case.rank, device=device) * case.rank**-0.5
        self.dt_bias = torch.empty(directions, case.channels, device=device).uniform_(-7, -2)
        self.route = get_route("cross", case.height, case.width, device)
        self.leaves = (self.x, self.projection, self.A, self.D, self.dt_weight, self.dt_bias)
        self.grad = torch.randn_like(self.x, dtype=out_dtype)

    def project(self):
        return torch.nn.functional.linear(self.x, self.projection).unflatten(-1, (4, -1))

    def parameters(self):
        """dt, B and C."""
        case = self.case
        return self.project().split([case.rank, case.states, case.states], dim=-1)

    def forward(self):
        """As a model calls it: in training, projection and scan as one where that is served."""
        parameters = (self.A, self.D, self.dt_weight, self.dt_bias, self.route)
        if serves_projected_scan(self.x, self.projection, self.dt_weight, self.route, "merged"):
            return projected_scan(self.x, self.projection, *parameters, "merged", self.out_dtype)
        dt, B, C = self.parameters()
        return selective_scan(
            self.x, dt, self.A, B, C, self.D,
            dt_weight=self.dt_weight, dt_bias=self.dt_bias, route=self.route, out_dtype=self.out_dtype,
        )  # fmt: skip

    def forward_backward(self):
        return torch.autograd.grad(self.forward(), self.leaves, self.grad)

    def require_grad(self, wanted: bool):
        for leaf in self.leaves:
            leaf.requires_grad_(wanted)


def profile(function, title: str) -> None:
    """Prints the milliseconds of each kernel of one call."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(5):
            function()
        torch.cuda.synchronize()
    print(f"  {title}:")
    for event in sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)[:12]:
        each = event.self_device_time_total / 5e3
        if each >= 0.001:
            print(f"    {each:7.4f} ms  x{event.count // 5}  {event.key[:110]}")


def measure(case: Case, dtype: torch.dtype, out_dtype: torch.dtype, with_profile: bool) -> dict:
    gc.collect()
    torch.cuda.empty_cache()
    core = Core(case, dtype, out_dtype)
    row = {"case": case.name, "dtype": str(dtype)[6:], "out_dtype": str(out_dtype)[6:], "batch": case.batch}
    row["positions"] = case.height * case.width
    core.require_grad(False)
    with torch.no_grad():
        row["projection"] = milliseconds(captured(core.project))
        row["forward"] = milliseconds(captured(core.forward))
        row["forward eager"] = milliseconds(core.forward)
        row["forward peak MiB"] = peak_mib(core.forward)
        if with_profile:
            profile(core.forward, "forward")
    core.require_grad(True)
    row["peak MiB"] = peak_mib(core.forward_backward)
    row["forward+backward"] = milliseconds(captured(core.forward_backward))
    row["forward+backward eager"] = milliseconds(core.forward_backward)
    if with_profile:
        profile(core.forward_backward, "forward + backward")
    if WITH_MAMBA_SSM:
        row.update(measure_mamba_ssm(core))
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}


def measure_mamba_ssm(core: Core) -> dict:
    """Its times, and how far its result is from ours relative to the largest value; None where memory runs out."""
    peer = MambaSsm(core)
    try:
        with torch.no_grad():
            ours, theirs = core.forward().float(), peer.forward().float()
            error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
            forward = milliseconds(peer.forward)
        both = milliseconds(peer.forward_backward)
    except torch.OutOfMemoryError:
        return {"mamba-ssm forward": None, "mamba-ssm forward+backward": None, "mamba-ssm difference": None}
    return {"mamba-ssm forward": forward, "mamba-ssm forward+backward": both, "mamba-ssm difference": error}


def peak_mib(function) -> float:
    """Most memory allocated in a call, beside what was allocated before."""
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def print_table(rows: list[dict], cases: list[Case]) -> None:
    print(f"{'case':22} {'x_proj':>7} {'fwd':>8} {'target':>7} {'fwd+bwd':>8} {'target':>7}  published fwd, fwd+bwd"
          "   eager fwd, fwd+bwd  peak MiB")  # fmt: skip
    by_name = {case.name: case for case in cases}
    for row in rows:
        case = by_name[row["case"]]
        goals = [f"{t:7.2f}" if t else f"{'-':>7}" for t in case.target]
        published = [f"{t:9.2f}" if t else f"{'-':>9}" for t in case.published]
        print(
            f"{case.name:22} {row['projection']:7.3f} {row['forward']:8.3f} {goals[0]} "
            f"{row['forward+backward']:8.3f} {goals[1]}  {published[0]} {published[1]}      "
            f"{row['forward eager']:9.3f} {row['forward+backward eager']:9.3f} {row['peak MiB']:9.0f}"
        )
        if row.get("mamba-ssm forward") is not None:
            print(
                f"{'  mamba-ssm, eager':22} {'':7} {row['mamba-ssm forward']:8.3f} {'':7} "
                f"{row['mamba-ssm forward+backward']:8.3f}   differs by {row['mamba-ssm difference']:.1e}"
            )


def draw_sweep(rows: list[dict], title: str, path: Path) -> None:
    """Time and memory over the number of positions; dashed, what grows in proportion from the smallest."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    labels = {"forward": "forward (ms)", "forward+backward": "forward + backward (ms)", "peak MiB": "peak (MiB)"}
    for axes, (key, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        for batch in sorted({row["batch"] for row in rows}):
            points = [(row["positions"], row[key]) for row in rows if row["batch"] == batch]
            (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=f"batch {batch}")
            first, value = points[0]
            axes.plot(
                [x for x, _ in points], [value * x / first for x, _ in points], "--", color=line.get_color(), alpha=0.5
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("positions of the map")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=120)


def write(path: Path, rows: list[dict]) -> None:
    """Writes what there is so far: a run that is cut short leaves its finished cases."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="sizes of images instead of the stages")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--out-dtype",
        choices=["bfloat16", "float16", "float32"],
        help="default: what the models ask for, bfloat16 for bfloat16, else float32",
    )
    parser.add_argument("--profile", action="store_true", help="print the time of each kernel too")
    parser.add_argument("--csv", type=Path, help="where to write; default: results/scan_<gpu>_<date>.csv")
    args = parser.parse_args()
    args.out_dtype = args.out_dtype or ("bfloat16" if args.dtype == "bfloat16" else "float32")
    torch.backends.cuda.matmul.allow_tf32 = True
    gpu, today = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    title = f"{gpu}, torch {torch.__version__}, {args.dtype} in, {args.out_dtype} out, TF32 on, CUDA graphs, {today}"
    print(title)
    fixed = {"gpu": gpu, "torch": torch.__version__, "date": today}
    kind = "scan_sweep" if args.sweep else "scan"
    path = args.csv or Path(__file__).parent.parent / "results" / f"{kind}_{gpu.replace(' ', '_')}_{today}.csv"
    cases = [case for case in (SWEEP if args.sweep else CASES) if not args.only or args.only in case.name]
    rows: list[dict] = []
    for case in cases:
        row = measure(case, getattr(torch, args.dtype), getattr(torch, args.out_dtype), args.profile)
        rows.append({**fixed, **row})
        write(path, rows)
        print(f"  {case.name} done", flush=True)
    print_table(rows, cases)
    if args.sweep:
        draw_sweep(rows, title, path.with_suffix(".png"))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
