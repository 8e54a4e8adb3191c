"""`vmamba validate`."""

import logging
import sys
import time
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from vmamba.cli.model_options import add_model_options, load_model
from vmamba.errors import UserError
from vmamba.training.config import DIGITS

if TYPE_CHECKING:
    from vmamba.training.data import DataSource
    from vmamba.training.model_factory import Classifier

_logger = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the data, and those of the model."""
    group = parser.add_argument_group("data (a run's checkpoint knows its own)")
    group.add_argument("--data", help="'digits', a folder of class folders, or a timm reader such as hfds/NAME")
    group.add_argument("--data-dir", metavar="DIR", help="root folder or cache of a timm reader")
    group.add_argument("--split", help="split, or sub-folder, to validate on (default: validation)")
    group.add_argument("--class-map", metavar="FILE", help="text file with one class name a line, in the model's order")
    group.add_argument("--workers", type=int, default=4, metavar="N", help="loader processes (default: 4)")
    add_model_options(parser)


def run(args: Namespace) -> None:
    """Validate, and print the figures."""
    from vmamba.cli.output import on_terminal
    from vmamba.training import data
    from vmamba.training.distributed import join
    from vmamba.training.engine import AMP_DTYPES, evaluate

    with join(args.device) as process, on_terminal(process.is_first):
        classifier = load_model(args)
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
        size = "x".join(str(side) for side in classifier.preprocessing["input_size"][1:])
        _logger.info(
            f"{classifier.name} at {size} on {source.data} ({split}, {metrics.images} images, {speed:.0f} img/s)"
        )
        _logger.info(f"top-1 {metrics.top1:.3f} %  top-5 {metrics.top5:.3f} %  loss {metrics.loss:.4f}")


def _source(args: Namespace, origin: dict) -> "tuple[DataSource, str]":
    """The data that the options name, or else those the checkpoint was validated on."""
    from vmamba.training.data import DataSource

    origin = dict(origin)
    split = args.split or origin.pop("split", "validation")
    if args.data is not None:
        return DataSource(args.data, args.data_dir, args.class_map), split
    if not origin:
        raise UserError("which images? give --data DIR")
    if args.class_map is not None:
        origin["class_map"] = args.class_map
    return DataSource(**origin), split


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
