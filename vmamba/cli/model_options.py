"""The options by which `validate` and `predict` name a model, and what they make of them."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from vmamba.cli.option_types import positive_integer, share
from vmamba.errors import UserError
from vmamba.training.config import AMP_CHOICES, INTERPOLATIONS

if TYPE_CHECKING:
    from vmamba.training.model_factory import Classifier


def add_model_options(parser: ArgumentParser) -> None:
    """Options that name a model, its weights, and how it is run."""
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", metavar="FILE", help="best.pth of a run, or published weights with --model")
    group.add_argument("--model", metavar="NAME", help="any model name timm knows; a run's checkpoint knows its own")
    group.add_argument("--pretrained", action="store_true", help="use the published weights of --model")
    group.add_argument(
        "--num-classes", type=positive_integer, metavar="N", help="outputs of the classifier (default: the model's own)"
    )
    group.add_argument(
        "--img-size", type=positive_integer, metavar="N", help="side of the input (default: the model's own)"
    )
    group.add_argument(
        "--crop-pct", type=share, metavar="X", help="share of the resized image that the centre crop keeps"
    )
    group.add_argument(
        "--interpolation", choices=INTERPOLATIONS, metavar="NAME", help=f"one of {', '.join(INTERPOLATIONS)}"
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--batch-size", type=positive_integer, default=128, metavar="N", help="images at a time (default: 128)"
    )
    run.add_argument("--amp", choices=AMP_CHOICES, default="none", help="autocast (default: none)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def load_model(args: Namespace) -> "Classifier":
    """The classifier that the options name, with its class names where they are known."""
    from vmamba.training.model_factory import Classifier, ModelRequest, create, load_classifier, preprocessing

    request = None
    if args.model is not None:
        request = ModelRequest(args.model, args.num_classes, args.img_size)
    if args.checkpoint is not None:
        if args.pretrained:
            raise UserError("--pretrained and --checkpoint both name weights; give one of them")
        classifier = load_classifier(Path(args.checkpoint), request)
    elif request is None:
        raise UserError("which model? give --checkpoint FILE, or --model NAME --pretrained")
    elif not args.pretrained:
        raise UserError(f"which weights for '{args.model}'? give --pretrained or --checkpoint FILE")
    else:
        model = create(request, pretrained=True).eval()
        classifier = Classifier(model, args.model, preprocessing(model))
    if args.num_classes not in (None, classifier.num_classes):
        raise UserError(
            f"--num-classes is {args.num_classes}, but {classifier.name} has {classifier.num_classes} trained outputs; "
            "leave it out"
        )
    _override_preprocessing(classifier.preprocessing, args)
    if classifier.class_names is None and not classifier.origin:
        classifier.class_names = _imagenet_names(classifier.num_classes)
    return classifier


def _override_preprocessing(values: dict, args: Namespace) -> None:
    if args.img_size is not None:
        values["input_size"] = (values["input_size"][0], args.img_size, args.img_size)
    for key in ("crop_pct", "interpolation"):
        if getattr(args, key) is not None:
            values[key] = getattr(args, key)


def _imagenet_names(num_classes: int) -> list[str] | None:
    """English names, if the number of outputs is that of an ImageNet."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return None
    # The lemmas of a class, "tench, Tinca tinca"; the first one will do.
    return [name.split(",")[0] for name in ImageNetInfo(subset).label_descriptions()]
