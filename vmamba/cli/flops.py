"""`vmamba flops`."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from vmamba.cli.option_types import positive_integer
from vmamba.cli.output_files import check_outputs
from vmamba.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from vmamba.analysis.flops import InputSize
    from vmamba.analysis.module_costs import Breakdown


def add_arguments(parser: ArgumentParser) -> None:
    """The model, or all of them."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="any model name timm knows")
    parser.add_argument("--size", type=_size, metavar="N|HxW", help="of the image (default: the model's own)")
    parser.add_argument("--in-chans", type=positive_integer, default=3, metavar="N", help="channels (default: 3)")
    parser.add_argument("--depth", type=positive_integer, default=2, metavar="N", help="depth of modules (default: 2)")
    parser.add_argument(
        "--no-fvcore", action="store_true", help="do not ask fvcore, which runs the model and takes longer"
    )
    parser.add_argument(
        "--all", action="store_true", help="a table of all published models beside the published figures"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("flops"), metavar="STEM", help="with --all: writes STEM.csv and STEM.md"
    )
    parser.add_argument("--overwrite", action="store_true", help="with --all: write over a table that is there")


def run(args: Namespace) -> None:
    """Count one model and print what came out, or all and write a table."""
    if args.all:
        if args.model is not None or args.size is not None:
            raise UserError("--all counts all published models at the published size; leave model and size out")
        _write_table(args)
    elif args.model is None:
        raise UserError("which model? give a name, or --all")
    else:
        _print_model(args)


def _print_model(args: Namespace) -> None:
    import torch

    from vmamba.analysis.module_costs import SCAN_FORMULA, break_down
    from vmamba.training.model_factory import ModelRequest, create, default_cfg

    height, width = args.size or default_cfg(args.model).input_size[1:]
    built_for = {"img_size": (height, width)} if default_cfg(args.model).fixed_input_size else {}
    request = ModelRequest(args.model, kwargs={"in_chans": args.in_chans, **built_for})
    with torch.device("meta"):
        model = create(request)
    size = (args.in_chans, height, width)
    try:
        costs = break_down(model, size, args.depth)
    except (AssertionError, RuntimeError, ValueError) as error:  # of any model of timm
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{args.model} takes no images of {height}x{width}, try another --size: {reason}") from error
    total = costs.modules[0]
    print(
        f"{args.model} at {height}x{width}: {total.params / 1e6:.3f} M parameters, {total.macs / 1e9:.4g} GMACs, "
        f"{total.flops / 1e9:.4g} GFLOPs"
    )
    print()
    print(_modules(costs))
    print()
    print("\n".join(f"{name:<24} {flops / 1e9:>10.4f} GFLOPs" for name, flops in costs.operators.items()))
    print(f"counted: two for a multiply-add of convolutions and matrix products; {SCAN_FORMULA}")
    if not args.no_fvcore:
        print(_fvcore(create(request), size, costs.flops))
    print(_authors(model, size))


def _modules(costs: "Breakdown") -> str:
    total = costs.modules[0]
    indented = [("  " * cost.depth + (cost.name or "(all)"), cost) for cost in costs.modules]
    width = max(len(name) for name, _ in indented)
    lines = [f"{'module':<{width}}  {'params (M)':>10}  {'MACs (G)':>9}  {'share':>6}  class"]
    lines += [
        f"{name:<{width}}  {cost.params / 1e6:>10.3f}  {cost.macs / 1e9:>9.4f}  "
        f"{100 * cost.flops / max(1, total.flops):>5.1f}%  {cost.kind}"
        for name, cost in indented
    ]
    return "\n".join(lines)


def _fvcore(model: "nn.Module", size: "InputSize", flops: int) -> str:
    from vmamba.analysis.fvcore_count import count_by_fvcore

    try:
        counted = count_by_fvcore(model, size)
    except UserError as error:
        return f"fvcore:  not asked ({error})"
    agreement = (
        "the same" if counted.flops == flops else f"{(counted.flops - flops) / 1e9:+.4f} G against torch's counter"
    )
    others = ", ".join(f"{name} {value / 1e9:.4f}" for name, value in counted.others.items())
    return (
        f"fvcore:  {counted.product_macs / 1e9:.4f} GMACs of products, {counted.scan_flops / 1e9:.4f} GFLOPs of scans: "
        f"{counted.flops / 1e9:.4f} GFLOPs, {agreement}" + (f"; it alone counts {others} G" if others else "")
    )


def _authors(model: "nn.Module", size: "InputSize") -> str:
    from vmamba.analysis.flops import published_flops, published_rule

    if published_rule(model) is None:
        return "authors: no published rule is known for this family"
    return f"authors: {published_flops(model, size) / 1e9:.4f} G by the rule of their published table"


def _write_table(args: Namespace) -> None:
    from vmamba.analysis.cost_table import as_csv, as_markdown, cost_rows
    from vmamba.files import write_text

    stem: Path = args.output
    formats = {stem.with_name(f"{stem.name}.csv"): as_csv, stem.with_name(f"{stem.name}.md"): as_markdown}
    check_outputs(formats, args.overwrite)
    rows = []
    for row in cost_rows(ask_fvcore=not args.no_fvcore):
        rows.append(row)
        for path, as_text in formats.items():
            write_text(path, as_text(rows))
        published = "-" if row.published_g is None else row.published_g
        print(f"{row.model:<32} {row.macs / 1e9:8.3f} GMACs, published {published}", flush=True)
    print(f"wrote  {stem}.csv and .md")


def _size(text: str) -> tuple[int, int]:
    try:
        sides = [positive_integer(side) for side in text.lower().split("x")]
        height, width = sides if len(sides) == 2 else (sides[0], sides[0])
    except ValueError:
        raise ArgumentTypeError(f"'{text}' is no size such as 224 or 512x2048") from None
    if len(sides) > 2:
        raise ArgumentTypeError(f"'{text}' is no size such as 224 or 512x2048")
    return height, width
