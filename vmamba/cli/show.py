"""`vmamba show`: pictures of what a model does with images."""

import logging
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmamba.cli.option_types import positive_integer
from vmamba.cli.output_files import check_folders, check_outputs, check_picture, default_output
from vmamba.errors import UserError, nearest
from vmamba.files import replaced
from vmamba.training.config import DIGITS

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor, nn

_logger = logging.getLogger(__name__)

_DEFAULT_MODEL = "vmamba_nano_32"
_DPI = 110
_SCANNING_BATCH = 8  # images whose receptive fields are measured at a time

KINDS = {
    "routes": "the orders in which a model's scans visit an image, stage by stage",
    "erf": "the effective receptive field, before and after training where weights are given",
    "attention": "the implicit attention of a block's scans, at a place of the image",
    "features": "the maps behind the stages, or behind some of the blocks",
}


def add_arguments(parser: ArgumentParser) -> None:
    """One sub-command for each kind of picture, with the options it has."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", title="kinds of picture")
    parsers = {kind: kinds.add_parser(kind, help=text, allow_abbrev=False) for kind, text in KINDS.items()}
    for kind, images in {"erf": 50, "attention": 4, "features": 4}.items():
        parsers[kind].add_argument(
            "paths", nargs="*", default=[DIGITS], metavar="PATH",
            help=f"images, folders of images, or '{DIGITS}' for held-out digits (default)",
        )  # fmt: skip
        parsers[kind].add_argument(
            "--limit", type=positive_integer, default=images, metavar="N", help=f"images at most (default: {images})"
        )
    parsers["attention"].add_argument("--block", metavar="NAME", help="such as stages.2.blocks.1 (default: the middle)")
    parsers["attention"].add_argument(
        "--at", type=_place, default=(0.5, 0.5), metavar="Y,X",
        help="the place that looks, in shares of height and width, or 'class' for a class token (default: 0.5,0.5)",
    )  # fmt: skip
    parsers["features"].add_argument(
        "--view", choices=("pca", "norm", "both"), default="pca",
        help="three principal components as colours, the norm over channels, or both (default: pca)",
    )  # fmt: skip
    parsers["features"].add_argument(
        "--indices", type=_indices, metavar="I,J", help="stages or blocks, counted from 0 (default: at most four)"
    )
    for kind, subparser in parsers.items():
        _add_model_and_output(subparser, kind)


def _add_model_and_output(parser: ArgumentParser, kind: str) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", help=f"(default: {_DEFAULT_MODEL}, or the checkpoint's own)")
    model.add_argument("--checkpoint", metavar="FILE", help="best.pth of a run, or published weights with --model")
    model.add_argument("--pretrained", action="store_true", help="use the published weights of --model")
    model.add_argument("--seed", type=int, default=0, metavar="N", help="of weights that are not trained (default: 0)")
    model.add_argument(
        "--img-size", type=_size, metavar="N or HxW", help="size of the input (default: the model's own)"
    )
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        metavar="FILE",
        help=f"picture to write, .png or .svg (default: {kind}_MODEL.png, with a number if taken)",
    )
    output.add_argument("--overwrite", action="store_true", help="write over a picture that is there")


def run(args: Namespace) -> None:
    """Draw what was asked for, and write it."""
    from vmamba.cli.output import on_terminal
    from vmamba.training.distributed import join

    draw = {"routes": _routes, "erf": _erf, "attention": _attention, "features": _features}[args.kind]
    with join(args.device) as process, on_terminal():
        if args.output is not None:
            _check_output(Path(args.output), args.overwrite)
        shown = _load(args)
        name = f"{args.kind}_{shown.name.partition('.')[0]}.png"
        path = default_output(name, args.overwrite) if args.output is None else Path(args.output)
        _check_output(path, args.overwrite)
        figure = draw(args, shown, process.device)
        with replaced(path) as temporary:
            figure.savefig(temporary, dpi=_DPI)
        _logger.info(f"wrote  {path}")


# ---------------------------------------------------------------------------------------------------------------------
# The model and its images
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shown:
    """A model, and how images come to it.

    Attributes:
        name: Its name.
        weights: Where its weights come from, in a few words.
        trained: The model with the weights that were named; None if none were.
        untrained: The model as it starts.
        preprocessing: timm's data configuration, for the size that was asked for.
    """

    name: str
    weights: str
    trained: "nn.Module | None"
    untrained: "nn.Module"
    preprocessing: dict[str, Any]

    @property
    def model(self) -> "nn.Module":
        """With the best weights there are."""
        return self.untrained if self.trained is None else self.trained

    @property
    def title(self) -> str:
        return f"{self.name}, {self.weights}"


def _load(args: Namespace) -> _Shown:
    from vmamba.cli.model_options import load_model
    from vmamba.training.model_factory import Classifier, preprocessing

    size = args.img_size
    if args.checkpoint is not None or args.pretrained:
        options = Namespace(**{**vars(args), "num_classes": None, "img_size": None, "crop_pct": None})
        options.interpolation = None
        loaded: Classifier = load_model(options)
        name, trained, values = loaded.name, loaded.model, loaded.preprocessing
        weights = Path(args.checkpoint).name if args.checkpoint is not None else "published weights"
    else:
        name, trained, weights = args.model or _DEFAULT_MODEL, None, "untrained weights"
        values = None
        if args.kind != "routes":
            _logger.info(f"{name} is not trained: --checkpoint FILE or --pretrained gives it weights")
    untrained = _untrained(name, args.seed, size)
    if values is None:
        values = preprocessing(untrained)
    if size is not None:
        values["input_size"] = (values["input_size"][0], *size)
    return _Shown(name, weights, trained, untrained, values)


def _untrained(name: str, seed: int, size: tuple[int, int] | None) -> "nn.Module":
    import torch

    from vmamba.training.model_factory import ModelRequest, create, default_cfg

    fixed = size is not None and default_cfg(name).fixed_input_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create(ModelRequest(name, kwargs={"img_size": size} if fixed else {})).eval()


def _read(args: Namespace, shown: _Shown, device: "torch.device") -> "Tensor":
    """The images as the model takes them: (batch, C, H, W)."""
    import torch

    from vmamba.cli.predict import read_images
    from vmamba.training.data import eval_transform

    transform = eval_transform(shown.preprocessing)
    images = [transform(image) for _, image in islice(read_images(args.paths), args.limit)]
    if not images:
        raise UserError(f"no images in {', '.join(args.paths)}")
    return torch.stack(images).to(device)


def _pictures(images: "Tensor", shown: _Shown) -> "Tensor":
    """What the model is given, in colours again: (batch, 3, H, W) in [0, 1]."""
    mean, std = (images.new_tensor(shown.preprocessing[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    return (images * std + mean).clamp(0, 1).expand(-1, 3, -1, -1)


# ---------------------------------------------------------------------------------------------------------------------
# The pictures
# ---------------------------------------------------------------------------------------------------------------------


def _routes(args: Namespace, shown: _Shown, device: "torch.device") -> "Figure":
    import torch

    from vmamba.analysis.model_routes import draw_model_routes, model_routes

    image = torch.zeros(1, *shown.preprocessing["input_size"], device=device)
    walks = model_routes(shown.untrained.to(device), image)
    height, width = image.shape[-2:]
    return draw_model_routes(walks, f"{shown.name}, {height} x {width} px")


def _erf(args: Namespace, shown: _Shown, device: "torch.device") -> "Figure":
    from vmamba.analysis.erf import SHARES, draw_receptive_fields, effective_receptive_field

    images = _read(args, shown, device)
    models = [("untrained", shown.untrained)]
    if shown.trained is not None:
        models.append((shown.weights, shown.trained))
    fields = []
    for name, model in models:
        field = effective_receptive_field(model.to(device), _progress(images.split(_SCANNING_BATCH), name))
        fields.append((name, field))
        squares = ((share, field.square(share)) for share in SHARES)
        within = ",  ".join(f"{share:.0%} in {s.side} px ({s.area:.1%} of the image)" for share, s in squares)
        _logger.info(f"{name}:  {within}")
    return draw_receptive_fields(fields, f"{shown.name}, {len(images)} images")


def _attention(args: Namespace, shown: _Shown, device: "torch.device") -> "Figure":
    from vmamba.analysis.attention import draw_attention, grid_attention
    from vmamba.analysis.scans import model_scans

    images = _read(args, shown, device)
    scans = model_scans(shown.model.to(device), images)
    blocks = list(dict.fromkeys(scan.block for scan in scans))
    block = args.block or blocks[len(blocks) // 2]
    if block not in blocks:
        raise UserError(f"no block '{block}' scans in {shown.name}{nearest(block, blocks) or f'; {blocks[0]} does'}")
    chosen = [scan for scan in scans if scan.block == block]
    try:
        attentions = [[grid_attention(scan, args.at, image) for scan in chosen] for image in range(len(images))]
    except ValueError as error:
        raise UserError(f"--at: {error}") from error
    return draw_attention(_pictures(images, shown), attentions, f"{shown.title}: {block}")


def _features(args: Namespace, shown: _Shown, device: "torch.device") -> "Figure":
    from vmamba.analysis.features import draw_features, feature_maps

    images = _read(args, shown, device)
    maps = feature_maps(shown.model.to(device), images, args.indices)
    views: Any = ("pca", "norm") if args.view == "both" else (args.view,)
    return draw_features(_pictures(images, shown), maps, views, shown.title)


def _progress(batches: Any, name: str) -> Iterator[Any]:
    from tqdm import tqdm

    return iter(tqdm(batches, desc=name, leave=False, disable=None))


# ---------------------------------------------------------------------------------------------------------------------
# Output and options
# ---------------------------------------------------------------------------------------------------------------------


def _check_output(path: Path, overwrite: bool) -> None:
    check_picture(path)
    check_folders([path])
    check_outputs([path], overwrite)


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    try:
        height, width = map(int, sides if len(sides) == 2 else sides * 2)
    except ValueError:
        raise ArgumentTypeError(f"'{text}' is no size such as 224 or 192x256") from None
    if min(height, width) < 1:
        raise ArgumentTypeError(f"'{text}' is no size: sides are positive")
    return height, width


def _place(text: str) -> tuple[float, float] | str:
    if text.isalpha():
        return text
    try:
        top, left = map(float, text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"'{text}' is no place such as 0.5,0.5") from None
    return top, left


def _indices(text: str) -> list[int]:
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"'{text}' is no list such as 0,2") from None
