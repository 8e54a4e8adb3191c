"""`vmamba validate`."""

import logging
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from vmamba.cli.model_options import add_model_options, load_model
from vmamba.cli.option_types import not_negative, positive_integer
from vmamba.cli.output_files import check_outputs
from vmamba.errors import UserError
from vmamba.training.config import DIGITS

if TYPE_CHECKING:
    from vmamba.analysis.resolution import SizeRecord
    from vmamba.training.data import DataSource
    from vmamba.training.distributed import Process
    from vmamba.training.model_factory import Classifier

_logger = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the data, and those of the model."""
    group = parser.add_argument_group("data (a run's checkpoint knows its own)")
    group.add_argument("--data", help="'digits', a folder of class folders, or a timm reader such as hfds/NAME")
    group.add_argument("--data-dir", metavar="DIR", help="root folder or cache of a timm reader")
    group.add_argument("--split", help="split, or sub-folder, to validate on (default: validation)")
    group.add_argument("--class-map", metavar="FILE", help="text file with one class name a line, in the model's order")
    group.add_argument("--workers", type=not_negative, default=4, metavar="N", help="loader processes (default: 4)")
    add_model_options(parser)
    sizes = parser.add_argument_group("many sizes")
    sizes.add_argument(
        "--sizes", type=_sizes, metavar="NS", help="sides of the input to validate at, such as 192,224,256"
    )
    sizes.add_argument(
        "--output",
        type=Path,
        default=Path("sizes"),
        metavar="STEM",
        help="writes STEM.csv and STEM.png (default: sizes)",
    )
    sizes.add_argument("--overwrite", action="store_true", help="write over files of these names")


def run(args: Namespace) -> None:
    """Validate, and print the figures."""
    from vmamba.cli.output import on_terminal
    from vmamba.training.distributed import join

    if args.sizes is not None and args.img_size is not None:
        raise UserError("--sizes and --img-size both say how large the images are; give one of them")
    with join(args.device) as process, on_terminal(process.is_first):
        if args.sizes is None:
            _validate(args, process)
        else:
            _validate_at_sizes(args, process)


def _validate_at_sizes(args: Namespace, process: "Process") -> None:
    """Validates at one size after the other, and keeps what there is so far in the files."""
    from vmamba.analysis.resolution import as_csv, draw
    from vmamba.files import replaced, write_text

    table, picture = (args.output.with_name(args.output.name + suffix) for suffix in (".csv", ".png"))
    check_outputs([table, picture], args.overwrite)
    trained_at = load_model(args).preprocessing["input_size"][-1]
    records: list[SizeRecord] = []
    for size in args.sizes:
        args.img_size = size
        records.append(_validate(args, process))
        if process.is_first:
            write_text(table, as_csv(records))
            with replaced(picture) as temporary:
                draw(records, trained_at, temporary)
    _logger.info(f"wrote  {table} and {picture}")


def _validate(args: Namespace, process: "Process") -> "SizeRecord":
    from vmamba.analysis.resolution import SizeRecord
    from vmamba.training import data
    from vmamba.training.engine import AMP_DTYPES, evaluate

    classifier = load_model(args)
    _fit_to_size(classifier, args.img_size)
    source, split = _source(args, classifier.origin)
    dataset = data.open_split(source, split)
    _check_classes(data.class_names(dataset), classifier, source.data)
    loader = data.eval_loader(
        dataset,
        data.eval_transform(classifier.preprocessing),
        args.batch_size,
        0 if source.data == DIGITS else args.workers,
        process.rank,
        process.world,
        pin_memory=process.device.type == "cuda",
    )
    start = time.perf_counter()
    show_bar = process.is_first and sys.stderr.isatty()
    metrics = evaluate(classifier.model.to(process.device), loader, process, AMP_DTYPES[args.amp], show_bar)
    speed = metrics.images / (time.perf_counter() - start)
    sides = classifier.preprocessing["input_size"][1:]
    size = "x".join(str(side) for side in sides)
    _logger.info(f"{classifier.name} at {size} on {source.data} ({split}, {metrics.images} images, {speed:.0f} img/s)")
    _logger.info(f"top-1 {metrics.top1:.3f} %  top-5 {metrics.top5:.3f} %  loss {metrics.loss:.4f}")
    return SizeRecord(
        classifier.name, source.data, split, sides[-1], metrics.top1, metrics.top5, metrics.loss, metrics.images, speed
    )


def _fit_to_size(classifier: "Classifier", size: int | None) -> None:
    """Some models of timm are built for one size, and must be told of another; their position embedding is resized."""
    from vmamba.training.model_factory import default_cfg

    resize = getattr(classifier.model, "set_input_size", None)
    if size is not None and resize is not None and default_cfg(classifier.name).fixed_input_size:
        resize(img_size=size)


def _source(args: Namespace, origin: dict) -> "tuple[DataSource, str]":
    """The data that the options name, or else those the checkpoint was validated on."""
    from vmamba.training.data import DataSource

    known = {"split": "validation", **origin}
    split = known.pop("split")
    if args.data is not None:
        known = {"data": args.data}
    if not known:
        raise UserError("which images? give --data DIR")
    options = {"data_dir": args.data_dir, "class_map": args.class_map}
    source = DataSource(**{**known, **{key: value for key, value in options.items() if value is not None}})
    if args.data_dir is not None and not source.prefix:
        raise UserError(f"--data-dir is for timm readers such as hfds/NAME, and '{source.data}' is none; leave it out")
    return source, args.split or split


def _check_classes(names: list[str] | None, classifier: "Classifier", data: str) -> None:
    """Labels of other classes, or in another order, would give figures without meaning."""
    outputs = classifier.num_classes
    if names is None:
        return
    if len(names) != outputs:
        raise UserError(
            f"'{data}' has {len(names)} classes, but {classifier.name} has {outputs} outputs; the data must be of the "
            "classes it was trained on (--class-map names them all if a folder has only some)"
        )
    trained_on = classifier.class_names
    if classifier.origin and trained_on and names != trained_on:
        odd = next(pair for pair in zip(names, trained_on, strict=True) if pair[0] != pair[1])
        raise UserError(f"the classes differ from those the model was trained on: '{odd[0]}' where it has '{odd[1]}'")


def _sizes(text: str) -> list[int]:
    try:
        return sorted({positive_integer(part) for part in text.split(",")})
    except ValueError:
        raise ArgumentTypeError(f"'{text}' is not a list of positive whole numbers such as 192,224,256") from None
