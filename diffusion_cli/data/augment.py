"""Augmentation that does not leak: pictures are moved, and the network is told how, so that told nothing it draws them unmoved.

    flips, scale 2^(0.2 n), rotation pi u, scale 2^(0.2 n) along an axis and its inverse across, translation by n / 8 of all

Each with probability p on its own, n normal and u uniform on (-1, 1); the flip left to right always, by a fair coin (Karras et
al. 2022, appendix F.2 and table 6, after Karras et al. 2020, "Training GANs with limited data"). What is told are nine numbers,
0 where nothing is done. All moves of a picture are one resampling, cubic, its edges mirrored; theirs smooths before.
The axis is told by twice its angle: by its angle, as there, a stretch and its inverse would be told alike.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from diffusion_cli.randomness import Source
from diffusion_cli.ranges import Fraction

WIDTH = 9  # numbers that are told


@dataclass(frozen=True)
class Augment:
    """p: of each kind of move."""

    p: Fraction = 0.12

    def __call__(self, x: Tensor, source: Source) -> tuple[Tensor, Tensor]:
        """Pictures [B, C, H, W] to the same, moved, and how: [B, WIDTH]."""
        chosen = (source.uniform("augment", (5,)) < self.p).float().unbind(1)  # yflip, scale, rotation, anisotropy, translation
        u, n = source.uniform("augment by", (4,)).unbind(1), source.normal("augment by", (4,)).unbind(1)
        mirrored, upside = (u[0] < 0.5).float() * float(self.p > 0), (u[1] < 0.5).float() * chosen[0]  # [B]
        scale, angle = n[0] * chosen[1], math.pi * (2 * u[2] - 1) * chosen[2]
        stretch, axis = n[1] * chosen[3], math.pi * (2 * u[3] - 1)
        right, down = n[2] * chosen[4], n[3] * chosen[4]
        told = [mirrored, upside, scale, angle.cos() - 1, angle.sin()]
        told += [stretch * (2 * axis).cos(), stretch * (2 * axis).sin(), right, down]
        x = torch.where(mirrored[:, None, None, None] > 0, x.flip(-1), x)
        x = torch.where(upside[:, None, None, None] > 0, x.flip(-2), x)
        # what is at a place of the result was at inverse(place): the moves backwards, the last one first
        inverse = _scaled(2 ** (-0.2 * scale), 2 ** (-0.2 * scale)) @ _turned(-angle)
        inverse = inverse @ _turned(axis) @ _scaled(2 ** (-0.2 * stretch), 2 ** (0.2 * stretch)) @ _turned(-axis)
        inverse = inverse @ _shifted(-right / 4, -down / 4)  # an eighth of the size, which is 2 wide in grid_sample
        moved = torch.stack(chosen[1:]).any(0)[:, None, None, None]
        return torch.where(moved, warped(x, inverse), x), torch.stack(told, 1)


def warped(x: Tensor, inverse: Tensor) -> Tensor:
    """x [B, C, H, W] of which place p, within -1 to 1, has what was at inverse [B, 3, 3] times p."""
    grid = nnf.affine_grid(inverse[:, :2], list(x.shape), align_corners=False)
    return nnf.grid_sample(x, grid, "bicubic", "reflection", align_corners=False)  # [B, C, H, W]


def _matrix(*rows: tuple[Tensor | float, ...]) -> Tensor:
    """[B, 3, 3] of numbers and of tensors [B]."""
    like = next(value for row in rows for value in row if isinstance(value, Tensor))
    return torch.stack([torch.stack([torch.zeros_like(like) + value for value in row], -1) for row in rows], -2)


def _scaled(across: Tensor, down: Tensor) -> Tensor:
    return _matrix((across, 0.0, 0.0), (0.0, down, 0.0), (0.0, 0.0, 1.0))


def _turned(angle: Tensor) -> Tensor:
    return _matrix((angle.cos(), -angle.sin(), 0.0), (angle.sin(), angle.cos(), 0.0), (0.0, 0.0, 1.0))


def _shifted(right: Tensor, down: Tensor) -> Tensor:
    return _matrix((1.0, 0.0, right), (0.0, 1.0, down), (0.0, 0.0, 1.0))
