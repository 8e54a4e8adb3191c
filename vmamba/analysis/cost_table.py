"""The cost of every published model beside its authors' figures, with what makes them differ."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields

import timm
import torch

from vmamba.analysis.flops import published_flops, published_rule
from vmamba.analysis.fvcore_count import count_by_fvcore
from vmamba.analysis.module_costs import break_down
from vmamba.weights import Checkpoint, checkpoints

SIZE = 224

_WHOLE_SCANS = "operations of scans count in full, not by half"
EXPLANATIONS = {
    "vmamba": f"fvcore: {_WHOLE_SCANS}; norms 5 per element, pooling 1",
    "efficientvmamba": f"fvcore: {_WHOLE_SCANS}, padded to whole cells; norms and pooling too",
    "msvmamba": f"fvcore: {_WHOLE_SCANS}; norms and interpolation too; the small map is projected once for each pass",
    "plainmamba": f"mmcv's counter: {_WHOLE_SCANS}; norms 2 per element, biases too; without the classifier",
    "spatialmamba": "fvcore in training mode: 7 operations per state in full; batch norms and norms 5 per element",
    "vim": "no figure is published",
}
"""What the authors count otherwise than multiply-adds, by family."""

EXCEPTIONS = {
    "msvmambav3_tiny": "the published 5.0 is of no variant of the published configuration",
    "plainmamba_l3": "published with its last digits cut off",
}
"""Models whose published figure is not what their authors' rule gives, rounded."""


@dataclass(frozen=True)
class CostRow:
    """One model at 224 x 224; G is 10^9; None where nothing is published.

    Attributes:
        model: timm name.
        params: Parameters, with 1000 classes.
        published_params_m: Millions of them, as published.
        macs: Half of ``flops``.
        flops: Operations of products, convolutions and scans, by torch's counter.
        scan_flops: Those of the scans.
        fvcore_flops: The same as ``flops`` by fvcore, two for a multiply-add; None where it was not asked.
        authors_rule: By the rule of the authors.
        published_g: Their figure.
        note: What makes it differ from ``macs``.
    """

    model: str
    params: int
    published_params_m: float | None
    macs: int
    flops: int
    scan_flops: int
    fvcore_flops: int | None
    authors_rule: int | None
    published_g: float | None
    note: str


def published_models() -> dict[str, Checkpoint]:
    """The models with published weights, and their authors' figures."""
    classifiers = [c for c in checkpoints().values() if c.task == "classification"]
    return {checkpoint.backbone: checkpoint for checkpoint in reversed(classifiers)}


def cost_row(checkpoint: Checkpoint, ask_fvcore: bool = False) -> CostRow:
    """Counts one model.

    Args:
        checkpoint: The model's published checkpoint.
        ask_fvcore: Also count by fvcore, which runs the model.
    """
    name = checkpoint.backbone
    with torch.device("meta"):
        model = timm.create_model(name)
    costs = break_down(model, SIZE, depth=0)
    whole = costs.modules[0]
    notes = [EXPLANATIONS[checkpoint.family], EXCEPTIONS.get(name, "")]
    return CostRow(
        model=name,
        params=whole.params,
        published_params_m=checkpoint.params_m,
        macs=whole.macs,
        flops=whole.flops,
        scan_flops=sum(flops for operator, flops in costs.operators.items() if operator.startswith("selective_scan")),
        fvcore_flops=count_by_fvcore(timm.create_model(name), SIZE).flops if ask_fvcore else None,
        authors_rule=published_flops(model, SIZE) if published_rule(model) is not None else None,
        published_g=checkpoint.gflops,
        note="; ".join(note for note in notes if note),
    )


def cost_rows(ask_fvcore: bool = False) -> Iterator[CostRow]:
    """All published models, in the manifest's order."""
    for checkpoint in reversed(published_models().values()):
        yield cost_row(checkpoint, ask_fvcore)


def as_csv(rows: Sequence[CostRow]) -> str:
    """The rows as they are."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(CostRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def as_markdown(rows: Iterable[CostRow]) -> str:
    """The rows for a reader."""
    lines = [
        f"One image of {SIZE} x {SIZE}. MACs are multiply-adds of convolutions and matrix products, and half the "
        "operations of scans, by torch's counter and, the same to the last, by fvcore. By rule: what the authors' own "
        "counter gives.",
        "",
        "| model | params (M) | published | MACs (G) | scans (GFLOP) | by rule (G) | published | why they differ |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            row.model,
            f"{row.params / 1e6:.2f}",
            _figure(row.published_params_m),
            f"{row.macs / 1e9:.3f}",
            f"{row.scan_flops / 1e9:.3f}",
            "-" if row.authors_rule is None else f"{row.authors_rule / 1e9:.3f}",
            _figure(row.published_g),
            row.note,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figure(value: float | None) -> str:
    return "-" if value is None else str(value)
