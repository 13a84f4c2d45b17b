"""A second player beside an autoencoder: it tells pictures x from reconstructions y, patch by patch, and so these become sharp.

    critic        L_D = 1/2 E[ max(0, 1 - D(x)) + max(0, 1 + D(y)) ]           y held fast
    autoencoder   L   = L_rec + penalty + weight lambda E[ -D(y) ]             D held fast
                  lambda = |grad_w L_rec| / (|grad_w E[-D(y)]| + 1e-6)         w: the decoder's last layer

D answers [B, 1, h, w], each number about a patch: Isola et al. 2017, "Image-to-image translation with conditional adversarial
networks", section 3.2.2. Hinge loss: Lim and Ye 2017, "Geometric GAN". lambda, and a start when pictures come back already:
Esser et al. 2021, "Taming transformers for high-resolution image synthesis", equation 7; the weight is that of the recipes of
Rombach et al. 2022.

There it is two optimizers in turn. Here both players are one sum and move at once: the critic reads reconstructions without
a gradient to the autoencoder, and the autoencoder is judged by the critic's weights without a gradient to them, so each weight
gets the gradient of its own player alone. What the optimizer says of rate, betas and clipping holds for both: a rate that an
autoencoder alone takes well can be too large for a critic, and its weights begin as torch makes them for the same reason (the
N(0, 0.02^2) of Isola et al. is for a rate of 2e-4).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffusion_cli.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt

DEEPEST = 3  # halvings that Isola et al. make: patches of 70 x 70 pixels
LARGEST = 1e4  # of lambda


class Duel(NamedTuple):
    """critic [B], adversarial [B]: the losses of the two, in front of which no weight stands; balance []: lambda."""

    critic: Tensor
    adversarial: Tensor
    balance: Tensor


class Patches(nn.Module):
    """D: halvings of the size by convolutions of 4 x 4, and two more that keep it. Groups in place of batch normalisation: then
    a picture is judged alone, and nothing but weights is to be kept."""

    def __init__(self, channels: int, width: int, layers: int):
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(widths)):
            parts.append(nn.Conv2d(before, after, 4, stride=2 if i + 1 < layers else 1, padding=1, bias=False))
            parts += [nn.GroupNorm(math.gcd(8, after), after), nn.LeakyReLU(0.2)]
        parts.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x).float()  # [B, 1, h, w]


@dataclass(frozen=True)
class PatchCritic:
    """weight: of what it makes the autoencoder do, 0: it does nothing and learns nothing; start: steps before it enters.

    width: channels after the first convolution; layers: halvings, null: as many as the pictures allow, 3 at most.
    """

    weight: NonNegativeFloat = 0.5
    start: NonNegativeInt = 0
    width: PositiveInt = 64
    layers: PositiveInt | None = None

    def make(self, channels: int, image_size: int) -> nn.Module:
        """D with fresh weights. ValueError: pictures too small for so many layers."""
        most = int(math.log2(max(image_size // 3, 1)))  # 3 x 3 are left for the two last convolutions at least
        layers = min(most, DEEPEST) if self.layers is None else self.layers
        if not 0 < layers <= most:
            said = f"at most {most}" if most else "6 pixels at least"
            raise ValueError(f"critic.layers is {self.layers} and image_size {image_size}: it must be {said}")
        return Patches(channels, self.width, layers)

    def plays(self, step: int) -> bool:
        return self.weight > 0 and step >= self.start


def duel(critic: nn.Module, x: Tensor, y: Tensor, error: Tensor, last: Tensor) -> Duel:
    """Pictures and their reconstructions [B, C, H, W], the error [B] of those; last: the weights w."""
    real, made = critic(x).flatten(1), critic(y.detach()).flatten(1)  # [B, patches]
    loss = (torch.relu(1 - real) + torch.relu(1 + made)).mean(1) / 2  # [B]
    held = {name: weight.detach() for name, weight in critic.named_parameters()}
    adversarial = -functional_call(critic, held, (y,)).flatten(1).mean(1)  # [B]
    ours, theirs = (torch.autograd.grad(part.mean(), last, retain_graph=True)[0].norm() for part in (error, adversarial))
    return Duel(loss, adversarial, (ours / (theirs + 1e-6)).clamp(max=LARGEST))


def moves(loss: Tensor) -> Tensor:
    """0 with the gradient of the loss: it moves weights, and what is told of training stays comparable without it."""
    return loss - loss.detach()
