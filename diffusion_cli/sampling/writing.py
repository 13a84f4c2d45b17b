"""Pictures on the disk: a PNG each, or all in one array."""

import io
from pathlib import Path

import numpy as np
from torch import Tensor

from diffusion_cli import storage


def write_npz(path: Path, images: Tensor, classes: list[int] | None, n: int) -> None:
    """images uint8 [N, H, W, C], and labels int64 [N] where there are any."""
    arrays = {"images": images.permute(0, 2, 3, 1).numpy()}
    if classes is not None:
        arrays["labels"] = np.array([classes[i % len(classes)] for i in range(n)], dtype=np.int64)
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    storage.write(path, file.getvalue())
