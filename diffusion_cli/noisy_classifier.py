"""A noise-aware classifier: p(y | x_t) at any noise level of any schedule.

    logits = network(x_t / sqrt(alpha^2 + sigma^2), 1000 sigma / (alpha + sigma))

Both arguments depend on alpha / sigma alone, so a classifier trained on one schedule can be asked on another, and its input is
of about unit scale on all of them. At t = 0 it is an ordinary classifier. Dhariwal and Nichol 2021, section 4.1.
"""

import torch
from torch import Tensor, nn

from diffusion_cli.models.classifier import Classifier
from diffusion_cli.schedules import Schedule, over_pictures


class NoisyClassifier(nn.Module):
    """x [B, C, H, W] at t [] or [B] of a schedule -> logits [B, classes]."""

    def __init__(self, network: Classifier):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        time = (1000 * sigma / (alpha + sigma)).to(x).expand(len(x))  # [B]
        return self.network(over_pictures(1 / torch.sqrt(alpha**2 + sigma**2), x) * x, time).float()
