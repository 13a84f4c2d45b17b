"""Features without training: the pixels themselves, and a convolutional network of random weights. They need no file.

    raw      x in [-1, 1], all pixels in a row; where they are more than `dimensions`, x P with P_ij ~ N(0, 1 / dimensions)
             (Johnson and Lindenstrauss 1984: distances stay about the same)
    random   means and deviations over places after each of some convolutions with He's initial weights: texture and strokes, no
             classes. Naeem et al. 2020, "Reliable fidelity and diversity metrics for generative models", advise random networks
             for pictures unlike ImageNet's

Both are the same on every machine, to the rounding of a logarithm: their digest is that of the words that fix them.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as nnf
from torch import Tensor

from diffusion_cli.assembly import Facts
from diffusion_cli.data.pixels import to_float
from diffusion_cli.features.features import Extractor, Features, Seen, of_words
from diffusion_cli.randomness import Source
from diffusion_cli.ranges import NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class Raw(Features):
    """dimensions: pictures of more numbers are projected to so many; seed: of the projection."""

    dimensions: PositiveInt = 1024
    seed: NonNegativeInt = 0

    def open(self, facts: Facts, device: torch.device, trust: Collection[str] = ()) -> Extractor:
        pixels = facts["channels"] * facts["image_size"] ** 2
        if pixels <= self.dimensions:
            return Extractor(self.name, of_words("raw", pixels), lambda images: Seen(to_float(images).flatten(1)))
        P = _normal("raw", self.seed, (pixels, self.dimensions)) / math.sqrt(self.dimensions)
        on_device = P.to(device)
        return Extractor(
            self.name,
            of_words("raw", pixels, self.dimensions, self.seed),
            lambda images: Seen(to_float(images).flatten(1) @ on_device),
        )


@dataclass(frozen=True)
class Random(Features):
    """width: channels of the first of three convolutions, doubled by each; seed: of the weights."""

    width: PositiveInt = 64
    seed: NonNegativeInt = 0

    def open(self, facts: Facts, device: torch.device, trust: Collection[str] = ()) -> Extractor:
        widths = [facts["channels"], *(self.width * 2**k for k in range(3))]
        kernels = [
            _normal(f"random {k}", self.seed, (c_out, c_in, 3, 3)) * math.sqrt(2 / (9 * c_in))
            for k, (c_in, c_out) in enumerate(pairwise(widths))
        ]
        on_device = [kernel.to(device) for kernel in kernels]

        def look(images: Tensor) -> Seen:
            h, read = to_float(images), []
            for k, kernel in enumerate(on_device):
                h = nnf.relu(nnf.conv2d(h, kernel, stride=1 if k == 0 else 2, padding=1))  # [B, c, h, w]
                places = h.flatten(2)
                read += [places.mean(2), places.std(2, correction=0)]
            return Seen(torch.cat(read, dim=1))  # [B, 14 width]

        return Extractor(self.name, of_words("random", *widths, self.seed), look)


def _normal(stream: str, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Counted, so the same numbers on every machine."""
    return Source(seed, torch.arange(shape[0])).normal(stream, shape[1:])
