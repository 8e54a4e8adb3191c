"""The training configuration: one dataclass, read from YAML, overridden from the command line.

Every field of :class:`TrainConfig` is a key in YAML and a flag of ``vmamba train``; its default and its help text are
written here and nowhere else. This module does not import torch, so that ``vmamba train --help`` is quick.
"""

import dataclasses
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from vmamba.errors import UserError, nearest

DIGITS = "digits"
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
READER_PREFIXES = ("hfds", "hfids", "tfds", "wds", "torch")
BASE_KEY = "base"


def _option(group: str, default: Any, help: str) -> Any:
    metadata = {"group": group, "help": help}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_model = partial(_option, "model")
_data = partial(_option, "data")
_augment = partial(_option, "augmentation")
_optimise = partial(_option, "optimisation")
_run = partial(_option, "run")


# Each call makes a field of its own, so the linter's worry about shared defaults (RUF009) does not apply.
# ruff: noqa: RUF009
@dataclasses.dataclass
class TrainConfig:
    """Everything that decides the outcome of a training run."""

    model: str = _model("vmamba_nano_32", "any model name timm knows, with or without a tag")
    pretrained: bool = _model(False, "start from the published weights")
    initial_checkpoint: str | None = _model(None, "start from the weights in this file; the head adapts to the data")
    fine_tuning: bool = _model(False, "the rates are for trained weights: refuse to start from random ones")
    num_classes: int | None = _model(None, "number of classes; null: as many as the data has")
    img_size: int | None = _model(None, "side of the input in pixels; null: the model's own")
    drop_rate: float | None = _model(None, "dropout before the classifier; null: the model's own")
    drop_path_rate: float | None = _model(None, "stochastic depth; null: the model's own")
    model_kwargs: dict[str, Any] = _model({}, "further arguments of the model, e.g. '{ssm_ratio: 1.0}'")
    grad_checkpointing: bool = _model(False, "recompute activations in the backward pass: slower, much less memory")
    compile: bool = _model(False, "run the model through torch.compile")

    data: str = _data(
        DIGITS,
        "'digits', a folder (or .tar) of class folders, or a timm reader: hfds/NAME, hfids/NAME, tfds/NAME, wds/NAME, "
        "torch/NAME",
    )
    data_dir: str | None = _data(None, "root folder or cache of a timm reader")
    train_split: str = _data("train", "split to train on; for a folder: the name of its sub-folder")
    val_split: str = _data("validation", "split to validate on; for a folder: its sub-folder (val is found as well)")
    class_map: str | None = _data(None, "text file with one class name a line, fixing the order of the classes")
    reader_kwargs: dict[str, Any] = _data({}, "further arguments of a timm reader, e.g. '{input_key: jpg}'")
    download: bool = _data(False, "let a timm reader download its data")
    workers: int = _data(4, "loader processes for each training process; 0: load in the training process")
    mean: tuple[float, ...] | None = _data(None, "mean of each channel in 0..1; null: the model's own")
    std: tuple[float, ...] | None = _data(None, "standard deviation of each channel in 0..1; null: the model's own")
    interpolation: str | None = _data(None, f"{', '.join(INTERPOLATIONS)}; null: the model's own")
    crop_pct: float | None = _data(None, "share of the resized image that the validation crop keeps; null: model's own")

    scale: tuple[float, float] = _augment((0.08, 1.0), "area of the random resized crop, as shares of the image")
    ratio: tuple[float, float] = _augment((3 / 4, 4 / 3), "aspect ratio of the random resized crop")
    hflip: float = _augment(0.5, "probability of a horizontal flip")
    vflip: float = _augment(0.0, "probability of a vertical flip")
    color_jitter: float | None = _augment(
        0.4, "strength of the colour jitter; timm switches it off beside auto_augment"
    )
    auto_augment: str | None = _augment(None, "timm's policy string, e.g. rand-m9-mstd0.5-inc1")
    reprob: float = _augment(0.0, "probability of random erasing")
    remode: str = _augment("pixel", "what random erasing fills in: const, rand, pixel")
    recount: int = _augment(1, "most erased rectangles in one image")
    mixup: float = _augment(0.0, "alpha of mixup; 0: off")
    cutmix: float = _augment(0.0, "alpha of cutmix; 0: off")
    mixup_prob: float = _augment(1.0, "probability that a batch is mixed")
    mixup_switch_prob: float = _augment(0.5, "probability of cutmix where both are on")
    mixup_mode: str = _augment("batch", "batch, pair or elem; only batch is independent of the number of processes")
    smoothing: float = _augment(0.1, "label smoothing")
    repeated_aug: int = _augment(
        1, "times an image comes in an update, each time augmented anew; N: an Nth of the images"
    )

    epochs: int = _optimise(300, "epochs in all, warm-up included")
    batch_size: int = _optimise(1024, "GLOBAL batch size: images in one update, over all processes and accumulation")
    accumulate: int = _optimise(1, "forward passes that make up one update")
    opt: str = _optimise("adamw", "optimiser, by its timm name")
    opt_betas: tuple[float, ...] | None = _optimise(None, "betas of the optimiser; null: its own")
    opt_eps: float | None = _optimise(None, "epsilon of the optimiser; null: its own")
    lr: float = _optimise(5e-4, "learning rate at a batch of lr_batch_size")
    warmup_lr: float = _optimise(5e-7, "learning rate the warm-up starts from, at a batch of lr_batch_size")
    min_lr: float = _optimise(5e-6, "learning rate the schedule ends with, at a batch of lr_batch_size")
    lr_batch_size: int | None = _optimise(
        512, "the three rates grow linearly with batch_size / lr_batch_size; null: take them as they are"
    )
    sched: str = _optimise("cosine", "schedule, by its timm name; it moves after every update")
    warmup_epochs: int = _optimise(20, "epochs of linear warm-up; the schedule follows in the epochs that remain")
    weight_decay: float = _optimise(0.05, "weight decay; not for biases, norms and what the model exempts")
    layer_decay: float | None = _optimise(None, "factor of the learning rate from one layer group to the one below")
    clip_grad: float | None = _optimise(5.0, "largest global norm of the gradient; null: do not clip")
    amp: str = _optimise("none", "autocast: none, bf16 or fp16 (fp16 with loss scaling)")
    ema: bool = _optimise(True, "keep and validate an exponential moving average of the weights")
    ema_decay: float = _optimise(0.9999, "decay of that average")
    ema_warmup: bool = _optimise(False, "let the decay grow from 0 to ema_decay; for short runs")
    mesa: float = _optimise(0.0, "weight of the cross-entropy with the moving average's output (MESA); 0: off")
    mesa_start: float = _optimise(0.25, "share of the epochs after which MESA begins")

    seed: int = _run(0, "seed of everything random")
    device: str = _run("auto", "auto, cpu, cuda or cuda:N")
    threads: int | None = _run(None, "CPU threads of each training process; null: torch's choice")
    tensorboard: bool = _run(True, "write a TensorBoard log beside summary.csv")


AMP_CHOICES = ("none", "bf16", "fp16")

_CHOICES = {
    "amp": AMP_CHOICES,
    "interpolation": INTERPOLATIONS,
    "mixup_mode": ("batch", "pair", "elem"),
    "remode": ("const", "rand", "pixel"),
}

# The values that make sense, in words and as a test; of a tuple, each number is tested.
_RANGES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "at least 1": (
        lambda value: value >= 1,
        (
            *("num_classes", "img_size", "recount", "repeated_aug"),
            *("epochs", "batch_size", "accumulate", "lr_batch_size", "threads"),
        ),
    ),
    "0 or more": (
        lambda value: value >= 0,
        (
            *("workers", "color_jitter", "mixup", "cutmix"),
            *("opt_eps", "warmup_lr", "min_lr", "weight_decay", "warmup_epochs", "mesa", "seed"),
        ),
    ),
    "more than 0": (lambda value: value > 0, ("lr", "clip_grad", "std", "scale", "ratio")),
    "from 0 to 1": (
        lambda value: 0 <= value <= 1,
        ("mean", "hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob", "mesa_start"),
    ),
    "0 or more and less than 1": (
        lambda value: 0 <= value < 1,
        ("drop_rate", "drop_path_rate", "smoothing", "opt_betas", "ema_decay"),
    ),
    "more than 0 and at most 1": (lambda value: 0 < value <= 1, ("crop_pct", "layer_decay")),
}


def parse(values: Mapping[str, Any], origin: str, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Build a configuration from plain values, as YAML or a command line gives them.

    Args:
        values: Field names and values; fields left out keep their default.
        origin: Where the values come from, for error messages.
        overrides: Field names and values that win; those of flags, and called so in error messages.

    Raises:
        UserError: An unknown key, or a value of the wrong type or out of range.
    """
    overrides = overrides or {}
    hints = typing.get_type_hints(TrainConfig)
    converted = {}
    for key, value in {**values, **overrides}.items():
        if key not in hints:
            raise UserError(f"{origin}: unknown key '{key}'{nearest(key, hints)}")
        converted[key] = _convert(value, hints[key], _place(key, origin, overrides))
    config = TrainConfig(**converted)
    _check(config, origin, overrides)
    return config


def load(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Read a bundled recipe by name, or a YAML file, with its bases, and apply overrides.

    Args:
        name_or_path: A name out of :func:`bundled`, or the path of a YAML file.
        overrides: Field names and values that win over the file.
    """
    path = find(name_or_path)
    return parse(_read_with_bases(path), path.name, overrides)


def default_recipe(model: str | None, data: str | None) -> str:
    """The recipe of a command line that names none.

    The digits have their own. Other data gets the published recipe of the model, or the common ImageNet recipe.
    """
    published = None if model is None else model.partition(".")[0]  # without the tag of its weights
    if published in bundled():
        return published
    return DIGITS if data in (None, DIGITS) else "_imagenet"


def bundled() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(_bundled_folder().glob("*.yaml"))}


def find(name_or_path: str) -> Path:
    """The file behind the name of a bundled recipe, or behind a path."""
    known = bundled()
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if path.is_dir():
            raise UserError(f"config {path} is a folder, expected a YAML file or the name of a bundled recipe")
        if not path.is_file():
            raise UserError(f"config file {path} not found")
        return path
    raise UserError(f"no bundled recipe is called '{name_or_path}'{nearest(name_or_path, known)}")


def dump(config: TrainConfig) -> str:
    """The configuration as YAML that :func:`load` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values, fit for YAML and for a checkpoint."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(config).items()}


def flag(key: str) -> str:
    """The flag of a field."""
    return "--" + key.replace("_", "-")


def reader_prefix(data: str) -> str:
    """Prefix of a timm reader that ``data`` names, or an empty string."""
    prefix, separator, _ = data.partition("/")
    return prefix.lower() if separator and prefix.lower() in READER_PREFIXES else ""


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The same configuration, with a meaning that does not depend on the folder one is in."""
    keys = ["class_map", "initial_checkpoint"]
    if config.data != DIGITS and not reader_prefix(config.data):
        keys.append("data")
    paths = {key: getattr(config, key) for key in keys}
    # What does not exist may be relative to something else, as a class map to its data.
    found = {key: value for key, value in paths.items() if value is not None and os.path.exists(value)}
    # A reader makes its cache, if need be; but some have their root in a network.
    if config.data_dir is not None and not re.match(r"\w+:", config.data_dir):
        found["data_dir"] = config.data_dir
    return dataclasses.replace(config, **{key: os.path.abspath(value) for key, value in found.items()})


def _bundled_folder() -> Path:
    installed = Path(__file__).parents[1] / "configs" / "classification"
    # In a checkout, and in an editable install, the recipes stand at the top of the tree.
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs" / "classification"


def _read_with_bases(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path in seen:
        raise UserError(f"{path.name}: '{BASE_KEY}' leads back to the file itself")
    values = _read(path)
    base = values.pop(BASE_KEY, None)
    if base is None:
        return values
    base_path = path.parent / str(base)
    if not base_path.is_file():
        base_path = find(str(base))
    return {**_read_with_bases(base_path, (*seen, path)), **values}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold 'key: value' lines, not a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Turn a YAML value, or the text of a flag, into the type of a field."""
    if isinstance(hint, types.UnionType):
        if value is None or value in ("null", "none"):
            return None
        hint = next(arg for arg in hint.__args__ if arg is not type(None))
    try:
        return _convert_present(value, hint)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{where}: {value!r} is not {_type_name(hint)}") from error


def _convert_present(value: Any, hint: Any) -> Any:
    if value is None:
        raise ValueError("null where a value is needed")
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str):
            value = value.strip("[]() ").replace(",", " ").split()
        return tuple(float(item) for item in value)
    if typing.get_origin(hint) is dict:
        value = yaml.safe_load(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise ValueError("not a mapping")
        return value
    if hint is bool:
        if isinstance(value, bool):
            return value
        if value in ("true", "false"):
            return value == "true"
        raise ValueError("not a boolean")
    if isinstance(value, bool):
        raise ValueError("a boolean where another value is needed")
    if hint is int and isinstance(value, float) and not value.is_integer():
        raise ValueError("not a whole number")
    # YAML 1.1 reads 1e-3 as text; float() and int() accept text, so flags and YAML take the same path.
    return hint(value)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return "a list of numbers"
    if typing.get_origin(hint) is dict:
        return "a mapping such as '{key: value}'"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def _place(key: str, origin: str, overrides: Collection[str]) -> str:
    """Where the value of a field comes from, for error messages."""
    return flag(key) if key in overrides else f"{origin}: {key}"


def _check(config: TrainConfig, origin: str, overrides: Collection[str]) -> None:
    def require(good: bool, key: str, expected: str) -> None:
        if not good:
            raise UserError(f"{_place(key, origin, overrides)} is {getattr(config, key)!r}, expected {expected}")

    if config.fine_tuning and not (config.pretrained or config.initial_checkpoint):
        raise UserError(
            f"{origin}: its rates are for trained weights; give --initial-checkpoint FILE or --pretrained, or another "
            "--config to train from random weights"
        )
    for key, choices in _CHOICES.items():
        require(getattr(config, key) in (None, *choices), key, " or ".join(choices))
    for expected, (makes_sense, keys) in _RANGES.items():
        for key in keys:
            require(all(map(makes_sense, _numbers(getattr(config, key)))), key, expected)
    for key in ("scale", "ratio"):
        value = getattr(config, key)
        require(len(value) == 2 and value[0] <= value[1], key, "two numbers, the smaller one first")
    require(config.scale[1] <= 1, "scale", "shares of the image, at most 1")
    require(config.warmup_epochs < config.epochs, "warmup_epochs", f"less than epochs ({config.epochs})")
    require(config.mesa == 0 or config.ema, "mesa", "0 without ema, whose weights it follows")


def _numbers(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)
