"""Between pictures and what is diffused: x = encode(picture), picture = decode(x).

picture  [B, C, H, W] float32 in [-1, 1]
x        [B, *shape(C, H)] float32, of about zero mean and unit variance: what schedules and networks are made for
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from diffusion_cli.randomness import Source

TOGETHER = 16  # pictures


class Codec(nn.Module, ABC):
    """A module, so that it moves to a device as a whole; it is asked and never trained, and its weights stay its own.

    digest: names its weights; "" where there are none. bounded: does every value of x lie within [-1, 1]?
    """

    digest = ""
    bounded = False

    @abstractmethod
    def shape(self, channels: int, size: int) -> tuple[int, int, int]:
        """The shape of one x, for pictures of channels x size x size. ValueError: pictures that it cannot take."""

    @abstractmethod
    def encode(self, pictures: Tensor, source: Source | None = None) -> Tensor:
        """Pictures [B, C, H, W] -> x. source: a sample, counted by slots, where a picture has a distribution of x; None: its
        mean."""

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """x -> pictures [B, C, H, W], not clamped. The gradient passes: guidance by the decoded picture needs it."""

    def pictures(self, x: Tensor) -> Tensor:
        """The same a few at a time: a decoder needs more memory than a denoiser."""
        return torch.cat([self.decode(part) for part in x.split(TOGETHER)])

    @property
    def device(self) -> torch.device:
        """Where what is encoded has to lie."""
        return next((one.device for one in self.buffers()), torch.device("cpu"))


class Pixels(Codec):
    """x is the picture."""

    bounded = True

    def shape(self, channels: int, size: int) -> tuple[int, int, int]:
        return channels, size, size

    def encode(self, pictures: Tensor, source: Source | None = None) -> Tensor:
        return pictures

    def decode(self, x: Tensor) -> Tensor:
        return x
