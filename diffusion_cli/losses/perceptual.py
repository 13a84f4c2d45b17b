"""How far two pictures are apart for a network that has learned to see: what is alike by eye but not pixel by pixel is near.

    d(x, y) = sum_l mean_hw | u_l(x) - u_l(y) |^2,   u_l = f_l / |f_l|: feature maps of layer l, each place a vector of length 1

Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric", equation 1 with all weights w_l one
(there they are learned of people's judgements). The layers are the levels of a classifier that was trained here, asked without
noise. Beside a norm of pixels: Rombach et al. 2022, appendix G.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from diffusion_cli.models import Classifier
from diffusion_cli.ranges import NonNegativeFloat

SMALLEST = 1e-10  # of the length of a feature vector


class Perceptual(nn.Module):
    """The distance by a frozen network's eyes. weight: in front of it in the loss. digest: names the network's weights."""

    digest = ""

    def __init__(self, network: Classifier, weight: NonNegativeFloat = 1.0):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.weight = weight

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Of pictures y, which get a gradient, from x, which get none, [B, C, H, W] in [-1, 1] each: [B]."""
        time = torch.zeros(len(x), device=x.device)
        with torch.no_grad():
            seen = self.network.maps(x, time)
        return apart(self.network.maps(y, time), seen)


def apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Of feature maps [B, c, h, w] of each layer: [B]."""
    unit = lambda f: nnf.normalize(f.float(), dim=1, eps=SMALLEST)  # noqa: E731
    layers = [(unit(f) - unit(g)).square().sum(1).mean((1, 2)) for f, g in zip(one, other, strict=True)]  # [B] each
    return torch.stack(layers).sum(0)
