"""The one door to torchvision, which fails to import beside a CPU-only torch.

The torchvision of PyPI for Linux is built for CUDA. Beside a CPU-only torch its library of C++ operators cannot be loaded, and
`import torchvision` then ends in "operator torchvision::nms does not exist"; torchmetrics and diffusers fail with it. What they
miss is the schema of two operators that nobody here calls, so we state those first. Where torchvision fits, nothing is done.
Importing it takes more than a second: it happens inside the functions that need it.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[Any] = []  # a torch.library.Library takes its operators along when it is collected


@cache
def mend_torchvision() -> bool:
    """Makes `import torchvision`, torchmetrics and diffusers work; to be called before them. True when there was need."""
    spec = find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    for library in Path(spec.submodule_search_locations[0]).glob("_C.*"):
        try:
            torch.ops.load_library(str(library))  # what torchvision does itself: a second time is free
        except OSError:  # its CUDA libraries are not there
            continue
    if hasattr(torch.ops.torchvision, "nms"):
        return False
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(name + _SCHEMA)
    _kept.append(operators)
    return True


def make_grid(images: Tensor, columns: int = 8, padding: int = 2, background: float = 0.0) -> Tensor:
    """[N, C, H, W] of any type -> [3, height, width], row by row; `background` is the value between the pictures."""
    mend_torchvision()
    from torchvision.utils import make_grid

    return make_grid(images, nrow=columns, padding=padding, pad_value=background)
