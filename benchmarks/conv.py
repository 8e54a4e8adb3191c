"""Times depthwise convolutions on a GPU at the shapes the families have: the kernel here, and PyTorch's operators.

    python benchmarks/conv.py                        # the table, and a CSV under results/
    python benchmarks/conv.py --only Vim

Each case is what a model computes at that point, bias, residual and SiLU with it, for a batch of 128 at 224x224. Inputs
are random and resident, PyTorch gets them and the weights in the memory format and dtype that suit it best. Timings are
medians over CUDA events of CUDA graphs, after warm-up.
"""

import argparse
import csv
import datetime
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_timing import captured, milliseconds

from vmamba.ops import depthwise_conv
from vmamba.ops.depthwise_conv import by_torch


@dataclass(frozen=True)
class Case:
    """A convolution: channels, map, kernel, and what it has beside them."""

    name: str
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: int = 1
    silu: bool = False
    residual: bool = False
    both_ways: bool = False
    sliced: bool = False  # the map is half of a wider one, as in gated mixers
    dilation: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Above, below, left, right."""
        if self.both_ways:
            return (0, 0, self.kernel[1] - 1, 0)
        return (self.dilation * (self.kernel[0] // 2),) * 2 + (self.dilation * (self.kernel[1] // 2),) * 2


CASES = (
    Case("VMamba-T stage 1", 96, (56, 56), (3, 3), silu=True),
    Case("VMamba-T stage 2", 192, (28, 28), (3, 3), silu=True),
    Case("VMamba-T stage 3", 384, (14, 14), (3, 3), silu=True),
    Case("VMamba-T stage 4", 768, (7, 7), (3, 3), silu=True),
    Case("MSVMamba-T stage 1, low", 192, (56, 56), (7, 7), stride=2, silu=True, sliced=True),
    Case("MSVMamba-T stage 2, low", 384, (28, 28), (7, 7), stride=2, silu=True, sliced=True),
    Case("MSVMamba-T stage 3, low", 768, (14, 14), (7, 7), stride=2, silu=True, sliced=True),
    Case("MSVMamba-T stage 4, low", 1536, (7, 7), (7, 7), stride=2, silu=True, sliced=True),
    Case("MSVMamba-T stage 1, full", 192, (56, 56), (3, 3), silu=True, sliced=True),
    Case("MSVMamba-T stage 1, FFN", 192, (56, 56), (3, 3), residual=True),
    Case("MSVMamba-T stage 3, FFN", 768, (14, 14), (3, 3), residual=True),
    Case("Spatial-Mamba-T stage 1", 128, (56, 56), (3, 3), silu=True, sliced=True),
    Case("Spatial-Mamba-T stage 1, position", 64, (56, 56), (3, 3), residual=True, dtype=torch.float32),
    Case("Spatial-Mamba-T stage 1, fusion", 128, (56, 56), (3, 3), dilation=3, dtype=torch.float32),
    Case("Spatial-Mamba-T stage 3, fusion", 512, (14, 14), (3, 3), dilation=3, dtype=torch.float32),
    Case("Spatial-Mamba-T downsampling 1", 512, (56, 56), (3, 3), stride=2),
    Case("EfficientVMamba-T stage 1", 96, (56, 56), (3, 3), silu=True, sliced=True),
    Case("EfficientVMamba-T stage 3", 768, (14, 14), (3, 3)),
    Case("PlainMamba-L1", 384, (14, 14), (7, 7), silu=True, sliced=True),
    Case("Vim-T", 384, (1, 197), (1, 4), silu=True, both_ways=True, sliced=True),
)


class Convolution:
    """A case with random inputs."""

    def __init__(self, case: Case, batch: int):
        self.case = case
        x = torch.randn(batch, *case.size, case.channels * (1 + case.sliced), device="cuda", dtype=case.dtype)
        directions = (2,) if case.both_ways else ()
        weight = torch.randn(*directions, case.channels, 1, *case.kernel, device="cuda")
        bias = torch.randn(*directions, case.channels, device="cuda")
        self.leaves = [x[..., : case.channels], weight, bias]
        with torch.no_grad():
            self.grad = torch.randn_like(self.ours())

    def ours(self):
        case = self.case
        return depthwise_conv(
            *self.leaves,
            stride=case.stride,
            padding=case.padding,
            dilation=case.dilation,
            activation="silu" if case.silu else None,
            residual=case.residual,
            padding_mode="replicate" if case.dilation > 1 else "zeros",
        )

    def torchs(self):
        case, (x, weight, bias) = self.case, self.leaves
        return by_torch(
            x, weight, bias, (case.stride,) * 2, case.padding, (case.dilation,) * 2, case.dilation > 1,
            case.residual, case.silu,
        )  # fmt: skip

    def gradients(self, forward):
        return torch.autograd.grad(forward(), self.leaves, self.grad)

    def require_grad(self):
        self.leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]


def measure(case: Case, batch: int) -> dict:
    conv = Convolution(case, batch)
    row: dict = {"case": case.name, "dtype": str(case.dtype)[6:]}
    with torch.no_grad():
        row["forward"] = milliseconds(captured(conv.ours), 30)
        row["torch forward"] = milliseconds(captured(conv.torchs), 30)
    conv.require_grad()
    row["forward+backward"] = milliseconds(captured(lambda: conv.gradients(conv.ours)), 30)
    row["torch forward+backward"] = milliseconds(captured(lambda: conv.gradients(conv.torchs)), 30)
    moved = (conv.leaves[0].numel() + conv.grad.numel()) * conv.grad.element_size()
    row["forward GB/s"] = moved / row["forward"] / 1e6
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--csv", type=Path, help="where to write; default: results/conv_<gpu>_<date>.csv")
    args = parser.parse_args()
    gpu, today = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    print(f"{gpu}, torch {torch.__version__}, batch {args.batch}, CUDA graphs, {today}")
    print(f"{'milliseconds':34} {'fwd':>7} {'torch':>7} {'':>6} {'fwd+bwd':>8} {'torch':>7} {'':>6} {'fwd GB/s':>9}")
    rows = []
    for case in CASES:
        if args.only and args.only not in case.name:
            continue
        row = measure(case, args.batch)
        rows.append(row)
        forward, backward = (
            f"{row[name]:7.3f} {row[f'torch {name}']:7.3f} {row[f'torch {name}'] / row[name]:5.1f}x"
            for name in ("forward", "forward+backward")
        )
        print(f"{case.name:34} {forward} {backward:>23} {row['forward GB/s']:9.0f}", flush=True)
    path = args.csv or Path(__file__).parent.parent / "results" / f"conv_{gpu.replace(' ', '_')}_{today}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    fixed = {"gpu": gpu, "torch": torch.__version__, "date": today, "batch": args.batch}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*fixed, *rows[0]])
        writer.writeheader()
        writer.writerows({**fixed, **row} for row in rows)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
