"""Half and twice the size: by means and doublings of pixels, or by the filter [1, 3, 3, 1], beyond whose border all is zero.

    halved    y_i = sum_k f_k x_{2i + k - p},     f = (1, 3, 3, 1) / 8 in both directions, p = 1
    doubled   its transpose, times 4

The filter keeps high frequencies from folding into low ones (Zhang 2019, "Making convolutional networks shift-invariant
again"); this one is StyleGAN2's (Karras et al. 2020, appendix B), which Song et al. 2021 took over.
"""

from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor

Resample = Literal["mean", "fir"]


def _filter(x: Tensor) -> Tensor:
    """[C, 1, 4, 4] of sum 1, one for each channel of x. Computed where x is: numbers from the host would make a GPU wait."""
    d = torch.arange(4, dtype=x.dtype, device=x.device) - 1.5
    f = (3.25 - d * d) / 8  # [1, 3, 3, 1] / 8
    return torch.outer(f, f).expand(x.shape[1], 1, 4, 4)


def halved(x: Tensor, resample: Resample, padding: int = 1) -> Tensor:
    """[B, C, H, W] to [B, C, H/2, W/2]. padding 0, of the filter: where x has a border of one pixel around it already."""
    if resample == "mean":
        return nnf.avg_pool2d(x, 2)
    return nnf.conv2d(x, _filter(x), stride=2, padding=padding, groups=x.shape[1])


def doubled(x: Tensor, resample: Resample) -> Tensor:
    """[B, C, H, W] to [B, C, 2H, 2W]."""
    if resample == "mean":
        return nnf.interpolate(x, scale_factor=2.0, mode="nearest")
    return nnf.conv_transpose2d(x, 4 * _filter(x), stride=2, padding=1, groups=x.shape[1])
