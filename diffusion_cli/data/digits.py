"""1,797 handwritten digits of 8 x 8 pixels, inside the package: a first run needs no download.

From the UCI repository (Alpaydin and Kaynak 1998, CC BY 4.0), as scikit-learn ships them; see digits.LICENSE.txt.
The test set is the last 30 pictures of each class in the order of the file: 300, and 1,497 for training.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion_cli.data.dataset import Dataset, Raw
from diffusion_cli.data.pictures import Arrays

FILE = Path(__file__).with_name("digits.npz")
TEST_OF_EACH_CLASS = 30


@dataclass(frozen=True, kw_only=True)
class Digits(Dataset):
    """The digits 0 to 9, in 17 levels of grey. Splits: train (1,497) and test (300)."""

    def read(self, split: str) -> Raw | None:
        if split not in ("train", "test"):
            return None
        with np.load(FILE, allow_pickle=False) as stored:
            images, labels = stored["images"], stored["labels"].astype(np.int64)
        test = np.concatenate([np.flatnonzero(labels == digit)[-TEST_OF_EACH_CLASS:] for digit in range(10)])
        mine = np.isin(np.arange(len(labels)), test, invert=split == "train")
        pixels = (images[mine] * (255 / 16)).round().astype(np.uint8)
        return Raw(Arrays(pixels), labels[mine], classes=tuple("0123456789"))
