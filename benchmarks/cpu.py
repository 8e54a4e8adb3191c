"""CPU speed: the scan core against the PyTorch reference, and VMamba-T against timm's peers, in one process.

    python benchmarks/cpu.py [--threads 2] [--csv results/cpu.csv]

Random inputs, float32, channels_last for all models, medians over rounds in which all contestants take turns, so that a
disturbance hits them all. The scan core is cross-scan, step projection, recurrence and merge (not the projection that
makes dt, B and C).
"""

import argparse
import csv
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import vmamba
from vmamba.ops import backend_info, get_route, selective_scan

PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny")
OURS = "vmamba_tiny"

Run = Callable[[], object]


def interleaved_medians(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Milliseconds of each run, the median over rounds after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def scan_core(backend: str, train: bool) -> Run:
    """One SS2D scan at the first stage of VMamba-T: batch 1, 96 channels, 56 x 56, K = 4, N = 1, R = 6."""
    torch.manual_seed(0)
    L, D, K, N, R = 56 * 56, 96, 4, 1, 6
    u, params = torch.randn(1, L, D), torch.randn(1, L, K, R + 2 * N)
    A, skip, weight, bias = -torch.rand(K, D, N), torch.randn(K, D), 0.3 * torch.randn(K, D, R), torch.randn(K, D) - 3
    inputs = [x.requires_grad_(train) for x in (u, params, A, skip, weight, bias)]
    route = get_route("cross", 56, 56)
    grad = torch.randn(1, L, D)

    def forward() -> Tensor:
        u, params, A, skip, weight, bias = inputs
        dt, B, C = params.split([R, N, N], dim=-1)
        return selective_scan(u, dt, A, B, C, skip, dt_weight=weight, dt_bias=bias, route=route, backend=backend)

    return (lambda: torch.autograd.grad(forward(), inputs, grad)) if train else forward


def model_run(model: nn.Module, batch: int, train: bool) -> Run:
    """A forward in eval mode, or a training step without the optimiser: forward, loss and backward."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,))

    def infer() -> Tensor:
        model.eval()
        with torch.inference_mode():
            return model(images)

    def step() -> None:
        model.train()
        nn.functional.cross_entropy(model(images), labels).backward()
        model.zero_grad()

    return step if train else infer


def measure() -> list[dict[str, object]]:
    """All comparisons; a row each."""
    rows = []

    def compare(what: str, runs: dict[str, Run], rounds: int, ours: str) -> None:
        medians = interleaved_medians(runs, rounds)
        for name, milliseconds in medians.items():
            ratio = milliseconds / medians[ours]
            rows.append({"what": what, "name": name, "ms": round(milliseconds, 3), "times_ours": round(ratio, 2)})
            print(f"{what:<24} {name:<32} {milliseconds:>10.2f} ms   {ratio:>7.2f} x ours", flush=True)

    # The reference takes most of a minute for a backward, so it is asked once.
    for what, train, rounds in (("scan forward", False, 9), ("scan forward + backward", True, 1)):
        runs = {backend: scan_core(backend, train) for backend in ("kernel", "reference")}
        compare(what, runs, rounds, ours="kernel")
    models = {name: timm.create_model(name).to(memory_format=torch.channels_last) for name in (OURS, *PEERS)}
    for batch, rounds in ((1, 21), (8, 9)):
        for what, train in ((f"inference, batch {batch}", False), (f"training, batch {batch}", True)):
            runs = {name: model_run(model, batch, train) for name, model in models.items()}
            compare(what, runs, rounds, ours=OURS)
    return rows


def settings() -> dict[str, object]:
    """What the numbers depend on."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "kernel": backend_info()["cpu"].reason,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vmamba": vmamba.__version__,
        "dtype": "float32",
        "mode": "eager, channels_last",
        "date": datetime.date.today().isoformat(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, default=Path("results/cpu.csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = settings()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    rows = measure()
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)
    print(f"written to {args.csv}")


if __name__ == "__main__":
    main()
