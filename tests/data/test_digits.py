import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import ImageDataset, create_transform

from vmamba.data.digits import CLASS_NAMES, DigitsReader, split_indices


def test_splits_are_disjoint_and_complete():
    train, validation = split_indices("train"), split_indices("validation")
    assert sorted(train + validation) == list(range(1797))
    assert (len(train), len(validation)) == (1442, 355)


def test_split_is_stratified():
    targets = load_digits().target
    counts = np.bincount(targets[split_indices("validation")])
    assert counts.tolist() == [number // 5 for number in np.bincount(targets)]


def test_images_are_the_scans():
    reader = DigitsReader("validation")
    digits = load_digits()
    for index in (0, 100, 354):
        file, target = reader[index]
        image = Image.open(file)
        assert image.size == (32, 32)
        assert image.mode == "RGB"
        original = reader.indices[index]
        assert target == digits.target[original]
        small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.ravel(), digits.images[original].ravel())[0, 1] > 0.98


def test_works_in_timms_dataset():
    dataset = ImageDataset("", reader=DigitsReader("train"), transform=create_transform(32))
    image, target = dataset[3]
    assert image.shape == (3, 32, 32)
    assert 0 <= target < len(CLASS_NAMES)
    assert len(set(dataset.filenames())) == len(dataset)


def test_unknown_split():
    with pytest.raises(ValueError, match="train and validation, not 'test'"):
        DigitsReader("test")
