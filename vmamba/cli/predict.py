"""`vmamba predict`."""

import csv
import io
import logging
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from vmamba.cli.model_options import add_model_options, load_model
from vmamba.cli.option_types import positive_integer
from vmamba.cli.output_files import check_folders, check_outputs, check_picture, default_output
from vmamba.errors import UserError
from vmamba.training.config import DIGITS

if TYPE_CHECKING:
    from vmamba.training.distributed import Process
    from vmamba.training.model_factory import Classifier

_logger = logging.getLogger(__name__)

_DIGITS_SHOWN = 24
_PICTURE_SIZE = 320  # pictures are kept no larger than they are drawn

NamedImage = tuple[str, Image.Image]


@dataclass(frozen=True)
class Prediction:
    """Answers for one image.

    Args:
        name: Where the image comes from.
        picture: The image, made small.
        answers: Class names and probabilities, the likeliest first.
    """

    name: str
    picture: Image.Image
    answers: list[tuple[str, float]]


class Table:
    """Predictions as CSV, a line for each answer."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        self._writer = csv.writer(self.text)
        self._writer.writerow(["image", "rank", "class", "probability"])

    def add(self, prediction: Prediction) -> None:
        self._writer.writerows(
            (prediction.name, rank, name, f"{share:.6f}") for rank, (name, share) in enumerate(prediction.answers, 1)
        )


def add_arguments(parser: ArgumentParser) -> None:
    """The images, what to write, and the options of the model."""
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help=f"images, folders of images, or '{DIGITS}' for held-out digits"
    )
    parser.add_argument(
        "--topk", type=positive_integer, default=5, metavar="K", help="answers for each image (default: 5)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="picture to write (default: predictions.png, with a number if taken)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the answers as a table")
    parser.add_argument("--overwrite", action="store_true", help="write over files of these names")
    add_model_options(parser)


def run(args: Namespace) -> None:
    """Predict, print the answers, and draw them."""
    from vmamba.cli.output import on_terminal
    from vmamba.cli.prediction_grid import MOST_PICTURES, draw_predictions
    from vmamba.files import replace_text
    from vmamba.training.distributed import join

    if args.output is None:
        args.output = default_output("predictions.png", args.overwrite)
    _check_outputs(args)
    with join(args.device) as process, on_terminal():
        images = read_images(args.paths)
        first = next(images, None)  # a mistake in the paths must not wait for the model
        if first is None:
            raise UserError(f"no images in {', '.join(args.paths)}")
        classifier = load_model(args)
        table = Table()
        shown: list[Prediction] = []
        for prediction in predict(classifier, chain([first], images), args.topk, args.batch_size, args.amp, process):
            answers = "   ".join(f"{name} {100 * share:.1f} %" for name, share in prediction.answers)
            _logger.info(f"{prediction.name}:  {answers}")
            table.add(prediction)
            if len(shown) < MOST_PICTURES:
                shown.append(prediction)
        draw_predictions(shown, args.output)
        if args.csv is not None:
            replace_text(args.csv, table.text.getvalue())
        _logger.info(f"wrote  {args.output}{f' and {args.csv}' if args.csv else ''}")


def predict(
    classifier: "Classifier", images: Iterable[NamedImage], topk: int, batch_size: int, amp: str, process: "Process"
) -> Iterator[Prediction]:
    """Classify images, a batch at a time."""
    import torch

    from vmamba.training.data import eval_transform
    from vmamba.training.engine import AMP_DTYPES

    transform = eval_transform(classifier.preprocessing)
    model = classifier.model.to(process.device).eval()
    dtype = AMP_DTYPES[amp]
    images = iter(images)
    while batch := list(islice(images, batch_size)):
        inputs = torch.stack([transform(image) for _, image in batch]).to(process.device)
        with torch.inference_mode(), torch.autocast(process.device.type, dtype, enabled=dtype is not None):
            logits = model(inputs)
        shares, labels = logits.float().softmax(-1).topk(min(topk, logits.shape[-1]))
        for (name, image), values, indices in zip(batch, shares.tolist(), labels.tolist(), strict=True):
            names = [_class_name(classifier, index) for index in indices]
            image.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE))
            yield Prediction(name, image, list(zip(names, values, strict=True)))


def read_images(paths: Sequence[str]) -> Iterator[NamedImage]:
    """Read images from files and folders.

    What is no image is passed over with a warning, unless it is the only path.

    Raises:
        UserError: A path does not exist, or the only path is no image.
    """
    for path in map(Path, paths):
        if str(path) == DIGITS and not path.exists():
            yield from _digits()
        elif not path.exists():
            raise UserError(f"{path} not found")
        elif path.is_dir():
            yield from _readable(_files(path))
        elif len(paths) == 1:
            try:
                yield str(path), _read(path)
            except ValueError as error:
                raise UserError(f"{path} is no image that can be read: {error}") from error
        else:
            yield from _readable([path])


def _readable(files: Iterable[Path]) -> Iterator[NamedImage]:
    for file in files:
        try:
            image = _read(file)
        except ValueError as error:
            _logger.warning(f"skipped {file}: {error}")
            continue
        yield str(file), image


def _files(folder: Path) -> list[Path]:
    """All files below a folder, hidden ones left out."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return found


def _read(file: Path) -> Image.Image:
    """Read an image, upright, as RGB; raises ValueError if it cannot be read."""
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.UnidentifiedImageError as error:
        raise ValueError("not an image") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of these leave Pillow
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _digits() -> Iterator[NamedImage]:
    from vmamba.data.digits import DigitsReader

    reader = DigitsReader("validation")
    for index in range(_DIGITS_SHOWN):
        file, label = reader[index]
        yield f"{reader.filename(index)} (a {label})", Image.open(file).convert("RGB")


def _class_name(classifier: "Classifier", index: int) -> str:
    return classifier.class_names[index] if classifier.class_names else f"class {index}"


def _check_outputs(args: Namespace) -> None:
    """A mistake in the files to write must not wait for the answers, nor cost a file that is there."""
    outputs = [path for path in (args.output, args.csv) if path is not None]
    read = [Path(path) for path in (*args.paths, args.checkpoint) if path is not None]
    for path in outputs:
        if path.exists() and any(other.exists() and path.samefile(other) for other in read):
            raise UserError(f"{path} is read, and cannot be written as well; give the output another name")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise UserError(f"--output and --csv both name {args.csv}; give one of them another name")
    check_picture(args.output)
    check_folders(outputs)
    check_outputs(outputs, args.overwrite)
