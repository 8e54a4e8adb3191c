import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor

from tests.running import make_folder
from vmamba.data.digits import DigitsReader
from vmamba.errors import UserError
from vmamba.training import data
from vmamba.training.config import load
from vmamba.training.engine import _check_targets
from vmamba.training.sampling import BatchPlan


class Stream:
    """A reader of a stream: digits in a row, without an index."""

    def __init__(self):
        self.reader = DigitsReader("validation")
        self.epochs = []

    def __iter__(self):
        for index in range(len(self)):
            file, target = self.reader[index]
            yield Image.open(file), target

    def __len__(self):
        return 50

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def test_streams():
    stream = Stream()
    dataset = IterableImageDataset("", reader=stream)
    loader = data.TrainLoader(dataset, to_tensor, BatchPlan(12, accumulate=2), seed=0, workers=0)
    assert loader.updates == 4
    updates = list(loader.epoch(7))
    assert [[len(targets) for _, targets in parts] for parts in updates] == [[6, 6]] * 4
    assert stream.epochs == [7]


def test_streams_for_validation():
    loader = data.eval_loader(IterableImageDataset("", reader=Stream()), to_tensor, 16, workers=0)
    assert sum(len(targets) for _, targets in loader) == 50


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_validation_image_is_seen_once(tmp_path, world):
    dataset = data.open_split(data.DataSource(str(make_folder(tmp_path))), "validation")
    loaders = [data.eval_loader(dataset, to_tensor, 4, 0, rank, world) for rank in range(world)]
    seen = [image.sum().item() for loader in loaders for images, _ in loader for image in images]
    assert sorted(seen) == pytest.approx(sorted(to_tensor(dataset_image(dataset, i)).sum().item() for i in range(15)))


def dataset_image(dataset, index):
    dataset.transform = None
    return dataset[index][0]


class Grey(Dataset):
    """Like torchvision's MNIST."""

    transform = None

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.transform(Image.new("L", (32, 32), index)), index


def test_grey_images_become_rgb():
    loader = data.eval_loader(Grey(), to_tensor, 4, workers=0)
    assert next(iter(loader))[0].shape == (4, 3, 32, 32)


PREPROCESSING = {
    **{"input_size": (3, 64, 64), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3},
    **{"crop_pct": 0.875, "crop_mode": "center"},
}


def test_transforms_follow_the_config():
    config = load("vmamba_tiny_s1l8")
    train = str(data.train_transform(config, PREPROCESSING))
    for part in ("RandomResizedCrop", "scale=(0.08, 1.0)", "RandAugment", "RandomErasing(p=0.25", "HorizontalFlip"):
        assert part in train
    assert "ColorJitter" not in train
    assert "size=73" in str(data.eval_transform(PREPROCESSING))  # int(64 / 0.875)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9", "augmix-m3-w3", "original", "originalr", "v0"])
def test_every_level_of_posterize_runs(policy):
    transform = data.train_transform(replace(load("vmamba_tiny_s1l8"), auto_augment=policy), PREPROCESSING)
    ops = [op for op in data._augment_ops(transform) if op.aug_fn.__name__ == "posterize"]
    image = Image.linear_gradient("L").convert("RGB")
    for op in ops:
        op.prob, op.magnitude_std = 1.0, 0
        for op.magnitude in range(11):
            op(image)
    assert ops


def test_posterize_to_no_bits_is_black():
    image = Image.linear_gradient("L").convert("RGB")
    assert data.posterize(image, 0).getextrema() == ((0, 0),) * 3
    assert data.posterize(image, 1).getextrema() == ((0, 128),) * 3


def test_reader_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match="cannot open 'wds/photos', split 'train'"):
        data.open_split(data.DataSource("wds/photos", "nowhere"), "train")


def test_labels_out_of_range():
    model = torch.nn.Linear(1, 1)
    model.num_classes = 10
    with pytest.raises(UserError, match="the data has the label 10, but the model has 10 classes"):
        _check_targets(torch.tensor([3, 10]), model)
