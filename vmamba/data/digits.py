"""scikit-learn's handwritten digits as a timm reader: real images that need no download.

The set holds 1,797 scans of 8x8 pixels and 17 grey levels (E. Alpaydin and C. Kaynak, UCI ML repository, 1998).
"""

import functools
import io

import numpy as np
from PIL import Image
from timm.data.readers.reader import Reader

IMAGE_SIZE = 32
CLASS_NAMES = tuple(str(digit) for digit in range(10))
SPLITS = ("train", "validation")

# Every fifth scan of each digit, in the order of the data set, is held out: stratified, and the same on every machine
# and with every version of scikit-learn.
_HOLD_OUT_EVERY = 5


class DigitsReader(Reader):
    """Serves the digits as 32x32 RGB images through timm's reader interface.

    Args:
        split: ``"train"`` (1,442 images) or ``"validation"`` (355).

    Raises:
        ValueError: The split does not exist.
    """

    def __init__(self, split: str = "train") -> None:
        super().__init__()
        if split not in SPLITS:
            raise ValueError(f"the digits have the splits {' and '.join(SPLITS)}, not {split!r}")
        self.split = split
        self.class_to_idx = {name: index for index, name in enumerate(CLASS_NAMES)}
        self.indices = split_indices(split)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        files, targets = _encoded_digits()
        original = self.indices[index]
        return io.BytesIO(files[original]), targets[original]

    def __len__(self) -> int:
        return len(self.indices)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f"digit_{self.indices[index]:04d}.png"


def split_indices(split: str) -> list[int]:
    """Positions in scikit-learn's order that belong to a split."""
    _, targets = _encoded_digits()
    seen = dict.fromkeys(range(len(CLASS_NAMES)), 0)
    held_out = []
    for target in targets:
        seen[target] += 1
        held_out.append(seen[target] % _HOLD_OUT_EVERY == 0)
    return [index for index, out in enumerate(held_out) if out == (split == "validation")]


@functools.cache
def _encoded_digits() -> tuple[list[bytes], list[int]]:
    """All scans as PNG files in memory, as a folder would hold them, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return [_encode(scan) for scan in digits.images], [int(target) for target in digits.target]


def _encode(scan: np.ndarray) -> bytes:
    grey = Image.fromarray((scan * (255.0 / 16.0)).round().astype(np.uint8))
    image = grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB")
    file = io.BytesIO()
    # Uncompressed: the images are decoded once per epoch and are tiny.
    image.save(file, format="PNG", compress_level=0)
    return file.getvalue()
