"""The grid of all pictures of a question: classes in columns, or a named row for each class where that was asked for."""

import torch
from PIL.Image import Image
from torch import Tensor

from diffusion_cli import drawing
from diffusion_cli.objectives.denoising import columns_for


def sheet(pictures: Tensor, classes: list[int] | None, rows: list[str] | None) -> Image:
    """pictures uint8 [N, C, H, W], whose classes come in turn; rows: the names of `classes`, or None for columns."""
    if rows is None:
        return drawing.grid(pictures, None if classes is None else columns_for(torch.tensor(classes)))
    return drawing.rows({name: pictures[k :: len(rows)] for k, name in enumerate(rows[: len(pictures)])})
