"""`vmamba models`."""

import fnmatch
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass

from vmamba.errors import UserError, nearest

_PACKAGE = "vmamba.models"


@dataclass(frozen=True)
class Row:
    """One line of the table; None where nothing is published."""

    name: str
    params: int
    macs: int
    top1: float | None
    license: str | None


def add_arguments(parser: ArgumentParser) -> None:
    """The pattern."""
    parser.add_argument("pattern", nargs="?", default="*", help="part of a name, or a pattern such as '*_tiny_*'")


def run(args: Namespace) -> None:
    """Print the table."""
    names = own_models()
    pattern = args.pattern if any(sign in args.pattern for sign in "*?[") else f"*{args.pattern}*"
    matching = [name for name in names if fnmatch.fnmatch(name, pattern)]
    if not matching:
        raise UserError(f"no model matches '{args.pattern}'{nearest(args.pattern, names)}")
    rows = [describe(name) for name in matching]
    width = max(len(row.name) for row in rows)
    print(f"{'model':<{width}}  {'params (M)':>10}  {'MACs (G)':>8}  {'top-1 (%)':>9}  licence")
    for row in rows:
        top1 = f"{row.top1:.1f}" if row.top1 is not None else "-"
        print(
            f"{row.name:<{width}}  {row.params / 1e6:>10.2f}  {row.macs / 1e9:>8.2f}  {top1:>9}  {row.license or '-'}"
        )


def own_models() -> list[str]:
    """Names of the models of this package."""
    import timm
    from timm.models import model_entrypoint

    import vmamba.models  # noqa: F401  (registers them)

    return [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith(_PACKAGE)]


def describe(name: str) -> Row:
    """Measure a model, without making its weights."""
    import timm
    import torch
    from timm.models import model_entrypoint

    from vmamba.analysis.flops import count
    from vmamba.training.model_factory import default_cfg

    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = default_cfg(name)
    family = sys.modules[model_entrypoint(name).__module__]
    cost = count(model, cfg.input_size)
    published = getattr(family, "ALIASES", {}).get(name, name)
    return Row(name, cost.params, cost.macs, getattr(family, "PUBLISHED_TOP1", {}).get(published), cfg.license)
