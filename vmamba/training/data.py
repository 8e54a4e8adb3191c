"""Data sets and loaders, out of timm's readers and transforms."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.auto_augment import posterize as timm_posterize
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import Compose

from vmamba.data.digits import DigitsReader
from vmamba.errors import UserError, nearest
from vmamba.training.config import DIGITS, READER_PREFIXES, TrainConfig, reader_prefix
from vmamba.training.sampling import BatchPlan, EpochBatchSampler, SeededDataset


@dataclass(frozen=True)
class DataSource:
    """Where images and labels come from.

    Args:
        data: ``digits``, a folder, or ``prefix/name`` of a timm reader.
        data_dir: Root folder or cache of a timm reader.
        class_map: Text file with one class name a line.
        download: Let the reader download.
        reader_kwargs: Further arguments of the reader.
    """

    data: str
    data_dir: str | None = None
    class_map: str | None = None
    download: bool = False
    reader_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: TrainConfig) -> "DataSource":
        return cls(config.data, config.data_dir, config.class_map, config.download, config.reader_kwargs)

    @property
    def prefix(self) -> str:
        """Prefix of a timm reader, or an empty string for a folder."""
        return reader_prefix(self.data)

    @property
    def reader_arguments(self) -> dict[str, Any]:
        return {"class_map": self.class_map, **self.reader_kwargs}


def open_training(source: DataSource, config: TrainConfig, plan: BatchPlan) -> tuple[Any, Any]:
    """Open the training and the validation split, and see that they agree on the classes."""
    train = open_split(source, config.train_split, is_training=True, batch_size=plan.part_size, seed=config.seed)
    val = open_split(source, config.val_split)
    if source.data != DIGITS and not source.prefix:
        _check_folders(train, val, source, config)
    return train, val


def open_split(source: DataSource, split: str, is_training: bool = False, batch_size: int = 1, seed: int = 0) -> Any:
    """Open one split as a timm data set, without a transform.

    Raises:
        UserError: No such data, or no images in it.
    """
    if source.data == DIGITS:
        try:
            return ImageDataset("", reader=DigitsReader(split))
        except ValueError as error:
            raise UserError(str(error)) from error
    if not source.prefix:
        return _open_folder(source, split)
    try:
        return create_dataset(
            source.data,
            root=source.data_dir,
            split=split,
            is_training=is_training,
            download=source.download,
            batch_size=batch_size,
            seed=seed,
            **source.reader_arguments,
        )
    except Exception as error:  # readers wrap libraries that raise what they like
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot open '{source.data}', split '{split}': {reason}") from error


def class_names(dataset: Any) -> list[str] | None:
    """Names of the classes in the order of their labels, if the data set knows them."""
    mapping = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if not mapping:
        return None
    names = {index: str(name) for name, index in mapping.items()}
    return [names.get(index, str(index)) for index in range(max(names) + 1)]


def train_transform(config: TrainConfig, preprocessing: dict[str, Any]) -> Any:
    """timm's training transform.

    It normalises and erases each image by itself, in the loader process: per-image seeding must cover random erasing.

    Raises:
        UserError: timm does not know the policy of ``auto_augment``.
    """
    try:
        transform = create_transform(
            preprocessing["input_size"],
            is_training=True,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            vflip=config.vflip,
            color_jitter=config.color_jitter,  # type: ignore[arg-type]  # None is timm's way to switch it off
            auto_augment=config.auto_augment,
            re_prob=config.reprob,
            re_mode=config.remode,
            re_count=config.recount,
            interpolation=preprocessing["interpolation"],
            mean=preprocessing["mean"],
            std=preprocessing["std"],
        )
    except Exception as error:
        if config.auto_augment is None:
            raise
        # timm takes the policy apart with assertions and look-ups that say little.
        raise UserError(
            f"auto_augment '{config.auto_augment}' is no policy of timm's; they look like rand-m9-mstd0.5-inc1, "
            "augmix-m3-w3, original or 3a"
        ) from error
    for op in _augment_ops(transform):
        if op.aug_fn is timm_posterize:
            op.aug_fn = posterize
    return transform


def _augment_ops(transform: Any) -> Iterator[AugmentOp]:
    """The operations that the policies of a transform choose from."""
    for step in transform.transforms:
        yield from getattr(step, "ops", ())  # RandAugment, AugMix
        for sub_policy in getattr(step, "policy", ()):  # AutoAugment
            yield from sub_policy


def posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """timm's; with no bits left, as its policies have it at an extreme level, a black image: Pillow 13 refuses that."""
    if bits_to_keep <= 0:
        return image.point(lambda _: 0)
    return timm_posterize(image, bits_to_keep, **kwargs)


def eval_transform(preprocessing: dict[str, Any]) -> Any:
    """timm's validation transform: resize, centre crop, normalise."""
    return create_transform(**preprocessing, is_training=False)


class TrainLoader:
    """Batches for training, the same whenever an epoch is run again.

    Data sets without an index (streams) bring their own order; that they repeat is up to their reader.

    Args:
        dataset: A timm or torchvision data set.
        transform: The training transform.
        plan: How global batches are spread.
        seed: Seed of the run.
        workers: Loader processes.
        pin_memory: Prepare batches for copying to a GPU.
        copies: How often an image comes in an epoch, see :class:`EpochBatchSampler`.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Any,
        plan: BatchPlan,
        seed: int,
        workers: int,
        pin_memory: bool = False,
        copies: int = 1,
    ) -> None:
        self.dataset = dataset
        self.plan = plan
        set_transform(dataset, transform)
        common: dict[str, Any] = {
            "num_workers": workers,
            "pin_memory": pin_memory,
            "persistent_workers": workers > 0,
            # The loader draws a seed for its workers, now and then; not from the numbers that the model will draw.
            "generator": torch.Generator(),
        }
        self.sampler: EpochBatchSampler | None = None
        if isinstance(dataset, IterableDataset):
            if copies > 1:
                raise UserError("repeated_aug needs a data set with an index, and this one is a stream")
            if hasattr(dataset, "set_loader_cfg"):
                dataset.set_loader_cfg(num_workers=workers)
            self.updates = len(dataset) // (plan.part_size * plan.accumulate)  # type: ignore[arg-type]
            self.loader = DataLoader(dataset, batch_size=plan.part_size, drop_last=True, **common)
        else:
            self.sampler = EpochBatchSampler(len(dataset), plan, seed, copies)
            self.updates = self.sampler.updates
            self.loader = DataLoader(SeededDataset(dataset, seed), batch_sampler=self.sampler, **common)
        if self.updates == 0:
            raise UserError(f"batch_size {plan.batch_size} is larger than the training split ({len(dataset)} images)")

    def epoch(self, epoch: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Yields the forward passes of one update after another."""
        if self.sampler is not None:
            self.sampler.epoch = epoch
        elif hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        batches = readable(self.loader)
        for _ in range(self.updates):
            update = list(itertools.islice(batches, self.plan.accumulate))
            if len(update) < self.plan.accumulate:
                return
            yield update


def eval_loader(
    dataset: Any,
    transform: Any,
    batch_size: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches for validation: each image goes to exactly one process, none is repeated to even them out."""
    set_transform(dataset, transform)
    if isinstance(dataset, IterableDataset):
        if hasattr(dataset, "set_loader_cfg"):
            dataset.set_loader_cfg(num_workers=workers)
        sampler = None
    else:
        sampler = range(rank, len(dataset), world)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=workers, pin_memory=pin_memory)


def readable(loader: DataLoader) -> Iterator[Any]:
    """Iterate, turning timm's refusal to skip any more unreadable images into a message."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "consecutive samples" not in str(error):
                raise
            raise UserError("too many images in a row cannot be read; see the warnings above") from error
        yield batch


def set_transform(dataset: Any, transform: Any) -> None:
    """Give a data set its transform; images of torchvision's data sets may be grey and become RGB first."""
    if not hasattr(dataset, "input_img_mode") and not hasattr(dataset, "reader"):
        transform = Compose([_to_rgb, transform])
    dataset.transform = transform


def _to_rgb(image: Any) -> Any:
    return image.convert("RGB")


def _open_folder(source: DataSource, split: str) -> Any:
    root = Path(source.data)
    if not root.exists():
        hint = nearest(source.data, (DIGITS,)) or f" (a folder, '{DIGITS}', or {'/, '.join(READER_PREFIXES)}/NAME)"
        raise UserError(f"data '{source.data}' not found{hint}")
    try:
        dataset = create_dataset("", root=str(root), split=split, **source.reader_arguments)
    except (RuntimeError, AssertionError, ValueError, OSError) as error:
        raise UserError(f"cannot read {root}, split '{split}': {' '.join(str(error).split())}") from error
    if "" in dataset.reader.class_to_idx and root.is_dir():
        raise UserError(f"images lie directly in {dataset.reader.root}; expected one sub-folder for each class")
    if len(dataset) == 0:
        raise UserError(f"no image in {dataset.reader.root} belongs to a class of the class map")
    return dataset


def _check_folders(train: Any, val: Any, source: DataSource, config: TrainConfig) -> None:
    if str(train.reader.root) == str(val.reader.root):
        raise UserError(
            f"{source.data} needs a sub-folder for each split, '{config.train_split}' and '{config.val_split}' (or "
            "train and val); without them training and validation would use the same images"
        )
    train_classes, val_classes = train.reader.class_to_idx, val.reader.class_to_idx
    if train_classes != val_classes:
        odd = sorted(set(train_classes) ^ set(val_classes))
        raise UserError(
            f"the splits have different classes ({len(train_classes)} for training, {len(val_classes)} for validation; "
            f"in one only: {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}); --class-map fixes their order"
        )
