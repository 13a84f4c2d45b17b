"""How like a picture its reconstruction is: peak signal-to-noise ratio and structural similarity, of pictures in [-1, 1].

    PSNR = 10 log10( 2^2 / mean (x - y)^2 )
    SSIM = mean of (2 m_x m_y + c1) (2 s_xy + c2) / ((m_x^2 + m_y^2 + c1) (s_x^2 + s_y^2 + c2))

with c1 = (0.01 2)^2, c2 = (0.03 2)^2, means m, variances s^2 and the covariance s_xy under a Gaussian window of 11 x 11 and
standard deviation 1.5, wherever the whole window lies in the picture, channel by channel. Wang et al. 2004, "Image quality
assessment: from error visibility to structural similarity", equation 13 and section III.C. In a picture smaller than the
window, that is cut to the largest odd size that fits.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor

RANGE = 2.0  # from -1 to 1
WINDOW, SPREAD = 11, 1.5
ERRORS = ("psnr", "ssim", "mae", "mse")  # as shown
LEAST_MSE = 1e-10  # a PSNR of 106 dB: equal pictures, too, have one that can be averaged


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """[B, C, H, W] twice -> [B], decibels."""
    mse = (x - y).square().flatten(1).mean(1)
    return 10 * torch.log10(RANGE**2 / mse.clamp(min=LEAST_MSE))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """[B, C, H, W] twice -> [B], at most 1."""
    window = _window(min(WINDOW, (min(x.shape[2:]) - 1) // 2 * 2 + 1), x)
    blur = lambda f: nnf.conv2d(f.flatten(0, 1)[:, None], window)  # noqa: E731  [B, C, H, W] -> [B C, 1, h, w]
    with torch.autocast(x.device.type, enabled=False):
        m_x, m_y = blur(x), blur(y)
        s_x, s_y, s_xy = blur(x * x) - m_x**2, blur(y * y) - m_y**2, blur(x * y) - m_x * m_y
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    likeness = (2 * m_x * m_y + c1) * (2 * s_xy + c2) / ((m_x**2 + m_y**2 + c1) * (s_x + s_y + c2))
    return likeness.view(len(x), -1).mean(1)


def errors(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """[B, C, H, W] twice -> [B] of psnr, ssim, and the mean absolute and squared error mae and mse."""
    mae, mse = (error.flatten(1).mean(1) for error in ((x - y).abs(), (x - y).square()))
    return {"psnr": psnr(x, y), "ssim": ssim(x, y), "mae": mae, "mse": mse}


def _window(size: int, like: Tensor) -> Tensor:
    """[1, 1, size, size], sum 1."""
    places = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    row = torch.exp(-places.square() / (2 * SPREAD**2))
    row = row / row.sum()
    return (row[:, None] * row)[None, None]
