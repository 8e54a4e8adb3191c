"""Times the selective scan on a GPU: the SS2D core (x_proj, scan, merge) of VMamba's stages, and larger maps.

    python benchmarks/scan.py                        # the table, and a CSV under results/
    python benchmarks/scan.py --only "T stage 1" --profile

Inputs are random and resident, timings are medians over CUDA events after warm-up. "target" is what the kernels are
built to reach on an H200, "published" what the authors' CUDA extension took there.
"""

import argparse
import csv
import datetime
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from vmamba.ops import get_route, selective_scan


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
    published: tuple[float, float]
    target: tuple[float | None, float | None]


CASES = (
    Case("T stage 1", 128, 96, 56, 56, 1, 6, (3.20, 8.89), (0.40, 1.5)),
    Case("T stage 2", 128, 192, 28, 28, 1, 12, (1.41, 4.29), (0.25, None)),
    Case("T stage 3", 128, 384, 14, 14, 1, 24, (0.79, 2.81), (0.15, None)),
    Case("T stage 4", 128, 768, 7, 7, 1, 48, (0.77, 2.50), (0.10, None)),
    Case("vanilla stage 1", 128, 192, 56, 56, 16, 6, (15.7, 64.4), (3.0, 11.0)),
    Case("detection", 2, 96, 200, 272, 1, 6, (0.90, 2.59), (None, 0.6)),
)


class Core:
    """x_proj, scan and merge with random weights."""

    def __init__(self, case: Case, dtype: torch.dtype, out_dtype: torch.dtype):
        directions, device = 4, "cuda"
        self.case, self.out_dtype = case, out_dtype
        features = case.rank + 2 * case.states
        self.x = torch.randn(case.batch, case.height * case.width, case.channels, device=device, dtype=dtype)
        self.projection = torch.randn(directions * features, case.channels, device=device, dtype=dtype)
        self.projection /= case.channels**0.5
        self.A = -torch.arange(1, case.states + 1, device=device).float().repeat(directions, case.channels, 1)
        self.D = torch.ones(directions, case.channels, device=device)
        self.dt_weight = torch.randn(directions, case.channels, case.rank, device=device) * case.rank**-0.5
        self.dt_bias = torch.empty(directions, case.channels, device=device).uniform_(-7, -2)
        self.route = get_route("cross", case.height, case.width, device)
        self.leaves = (self.x, self.projection, self.A, self.D, self.dt_weight, self.dt_bias)
        self.grad = torch.randn_like(self.x, dtype=out_dtype)

    def project(self):
        return torch.nn.functional.linear(self.x, self.projection).unflatten(-1, (4, -1))

    def forward(self):
        case = self.case
        dt, B, C = self.project().split([case.rank, case.states, case.states], dim=-1)
        return selective_scan(
            self.x, dt, self.A, B, C, self.D,
            dt_weight=self.dt_weight, dt_bias=self.dt_bias, route=self.route, out_dtype=self.out_dtype,
        )  # fmt: skip

    def forward_backward(self):
        return torch.autograd.grad(self.forward(), self.leaves, self.grad)

    def require_grad(self, wanted: bool):
        for leaf in self.leaves:
            leaf.requires_grad_(wanted)


def captured(function):
    """The function as a CUDA graph: what the GPU alone takes, without Python and launch gaps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def milliseconds(function, repeats: int = 50) -> float:
    for _ in range(5):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times)


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
    core = Core(case, dtype, out_dtype)
    row = {"case": case.name, "dtype": str(dtype)[6:], "out_dtype": str(out_dtype)[6:]}
    core.require_grad(False)
    with torch.no_grad():
        row["projection"] = milliseconds(captured(core.project))
        row["forward"] = milliseconds(captured(core.forward))
        row["forward eager"] = milliseconds(core.forward)
        if with_profile:
            profile(core.forward, "forward")
    core.require_grad(True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    core.forward_backward()
    row["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    row["forward+backward"] = milliseconds(captured(core.forward_backward))
    row["forward+backward eager"] = milliseconds(core.forward_backward)
    if with_profile:
        profile(core.forward_backward, "forward + backward")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--out-dtype", default="float32", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--profile", action="store_true", help="print the time of each kernel too")
    parser.add_argument("--csv", type=Path, help="where to write; default: results/scan_<gpu>_<date>.csv")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    gpu, today = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    print(f"{gpu}, torch {torch.__version__}, {args.dtype} in, {args.out_dtype} out, TF32 on, CUDA graphs, {today}")
    rows = []
    for case in CASES:
        if args.only and args.only not in case.name:
            continue
        rows.append(measure(case, getattr(torch, args.dtype), getattr(torch, args.out_dtype), args.profile))
    print(f"{'case':16} {'x_proj':>7} {'fwd':>7} {'target':>7} {'fwd+bwd':>8} {'target':>7}  published fwd, fwd+bwd"
          "   eager fwd, fwd+bwd  peak MiB")  # fmt: skip
    for row in rows:
        case = next(case for case in CASES if case.name == row["case"])
        goals = [f"{t:7.2f}" if t else "      -" for t in case.target]
        print(
            f"{case.name:16} {row['projection']:7.3f} {row['forward']:7.3f} {goals[0]} "
            f"{row['forward+backward']:8.3f} {goals[1]}  {case.published[0]:9.2f} {case.published[1]:9.2f}      "
            f"{row['forward eager']:9.3f} {row['forward+backward eager']:9.3f} {row['peak MiB']:9.0f}"
        )
    path = args.csv or Path(__file__).parent.parent / "results" / f"scan_{gpu.replace(' ', '_')}_{today}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    fixed = {"gpu": gpu, "torch": torch.__version__, "date": today}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*fixed, *rows[0]])
        writer.writeheader()
        writer.writerows({**fixed, **row} for row in rows)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
