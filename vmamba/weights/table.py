"""The manifest for people."""

from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from vmamba.weights import places
from vmamba.weights.manifest import Checkpoint, checkpoints

_METRICS = {
    "top1": "top-1 {}",
    "top5": "top-5 {}",
    "box_ap": "box AP {}",
    "mask_ap": "mask AP {}",
    "miou_ss": "mIoU {}",
    "miou_ms": "{} multi-scale",
}


def figures(checkpoint: Checkpoint) -> str:
    """The published accuracy in a few words, such as ``top-1 82.6``."""
    return ", ".join(
        text.format(checkpoint.metrics[key]) for key, text in _METRICS.items() if key in checkpoint.metrics
    )


def readme() -> str:
    """`checkpoints/README.md`: what the folder is for, and what there is."""
    lines = [
        "# Checkpoints",
        "",
        "<!-- Generated from vmamba/weights/manifest.yaml by: vmamba weights list --markdown -->",
        "",
        "Files in this folder are found by name when a command or script runs in the checkout: "
        '`timm.create_model("vmamba_tiny_s1l8.in1k", pretrained=True)` reads `vmamba_tiny_s1l8.in1k.safetensors` or '
        "`vmamba_tiny_s1l8.in1k.pth` here before it looks into the cache or downloads anything.",
        "",
        "```bash",
        "vmamba weights download vmamba_tiny_s1l8.in1k --to checkpoints  # resumes; checked before it is named",
        "vmamba weights import ~/Downloads/best.pth --as spatialmamba_tiny.in1k  # a file you got by other means",
        "vmamba weights convert vmamba_tiny_s1l8.in1k --to checkpoints   # safetensors, with its origin inside",
        "vmamba weights verify                                                   # has a file changed?",
        "```",
        "",
        "Another folder is named in `VMAMBA_CHECKPOINTS`. A copy of such a folder on a web server is a mirror, and is "
        "named in `VMAMBA_WEIGHTS_MIRROR`. Where no hash was published, the first file that arrives under a name is "
        "remembered, and a later one that differs is refused. Nothing in a file is executed.",
        "",
        "All figures are the authors' own. GFLOPs are counted by their rules: at 224x224 for classifiers, 1280x800 for "
        "detectors, 512x2048 for segmentors. Weights keep their authors' licences.",
    ]
    for task, title in (
        ("classification", "Classification (ImageNet-1K)"),
        ("detection", "Detection (COCO)"),
        ("segmentation", "Segmentation (ADE20K)"),
    ):
        own = [checkpoint for checkpoint in checkpoints().values() if checkpoint.task == task]
        lines += ["", f"## {title}", "", *_markdown(own)]
    return "\n".join(lines) + "\n"


def rows(found: Iterable[Checkpoint]) -> list[tuple[str, ...]]:
    """A line for each checkpoint, for a terminal, after a headline."""
    lines: list[tuple[str, ...]] = [("name", "published accuracy", "size", "licence", "where")]
    return lines + [(item.name, figures(item), item.size or "-", item.license, _where(item)) for item in found]


def _where(checkpoint: Checkpoint) -> str:
    path = places.local(checkpoint)
    return str(path) if path else _place(checkpoint)


def _place(checkpoint: Checkpoint) -> str:
    if checkpoint.host == "web":
        return urlsplit(checkpoint.url).hostname or ""
    return {"hub": "Hugging Face", "drive": "Google Drive"}[checkpoint.host]


def _markdown(found: Sequence[Checkpoint]) -> list[str]:
    lines = [
        "| name | accuracy | params (M) | GFLOPs | file | licence | paper |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes: dict[str, int] = {}
    for item in found:
        marks = [notes.setdefault(note, len(notes) + 1) for note in (item.note, item.license_note) if note]
        mark = "".join(f" [{number}]" for number in marks)
        size = f", {item.size}" if item.size else ""
        cells = [
            f"`{item.name}`{mark}",
            figures(item),
            _number(item.params_m),
            _number(item.gflops),
            f"[{_place(item)}]({item.url}){size}",
            item.license,
            f"[{item.paper}](https://arxiv.org/abs/{item.paper})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines + ([""] if notes else []) + [f"[{number}] {note}.  " for note, number in notes.items()]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
