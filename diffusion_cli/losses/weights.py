"""How much each noise level counts.

A weight is a function of the log signal-to-noise ratio on the error of x0. An error dF of the network is an error
-sigma dF / det of x0 (predictions.py), so the factor on |dF|^2 is w_x0 (sigma / det)^2: the same weight means the same
objective whatever the prediction.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from diffusion_cli.predictions import Prediction
from diffusion_cli.ranges import NonNegativeFloat, PositiveFloat, PositiveInt


class Weight(nn.Module):
    @abstractmethod
    def forward(self, error: Tensor, prediction: Prediction, t: Tensor) -> Tensor:
        """The error [B] of F at t [B] -> its part of the loss [B]."""


class One(Weight):
    """Weight 1 on F: each paper's own weighting, for the prediction that the paper trains."""

    def forward(self, error: Tensor, prediction: Prediction, t: Tensor) -> Tensor:
        return error


class _OfSNR(Weight):
    """A weight stated on |dx0|^2 or on |dnoise|^2 as a function of SNR = exp(log_snr)."""

    def on_x0(self, snr: Tensor) -> Tensor:
        return snr * self.on_noise(snr)  # dx0 = -dnoise sigma / alpha

    def on_noise(self, snr: Tensor) -> Tensor:
        return self.on_x0(snr) / snr

    def forward(self, error: Tensor, prediction: Prediction, t: Tensor) -> Tensor:
        snr = torch.exp(prediction.schedule.log_snr(t).clamp(-40, 40))
        factor = self.on_x0(snr) * (prediction.schedule.sigma(t) / prediction.determinant(t)).square()
        return factor * error


class MinSNR(_OfSNR):
    """min(SNR, gamma) on x0 (Hang et al. 2023, "Efficient diffusion training via Min-SNR", section 3.4)."""

    def __init__(self, gamma: PositiveFloat = 5.0):
        super().__init__()
        self.gamma = gamma

    def on_x0(self, snr: Tensor) -> Tensor:
        return snr.clamp(max=self.gamma)


class P2(_OfSNR):
    """1 / (k + SNR)^gamma on the noise (Choi et al. 2022, "Perception prioritized training", eq. 8)."""

    def __init__(self, k: PositiveFloat = 1.0, gamma: NonNegativeFloat = 1.0):
        super().__init__()
        self.k, self.gamma = k, gamma

    def on_noise(self, snr: Tensor) -> Tensor:
        return (self.k + snr) ** -self.gamma


class EDMWeight(_OfSNR):
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x0, sigma^2 = 1 / SNR (Karras et al. 2022, table 1)."""

    def __init__(self, sigma_data: PositiveFloat = 0.5):
        super().__init__()
        self.sigma_data = sigma_data

    def on_x0(self, snr: Tensor) -> Tensor:
        return snr + 1 / self.sigma_data**2


class Sigmoid(_OfSNR):
    """sigmoid(bias - log_snr) on the noise (Kingma and Gao 2023, "Understanding diffusion objectives", section 4.2; bias 2)."""

    def __init__(self, bias: float = 2.0):
        super().__init__()
        self.bias = bias

    def on_noise(self, snr: Tensor) -> Tensor:
        return 1 / (1 + snr * math.exp(-self.bias))


class Learned(Weight):
    """error / exp(u) + u with u(log_snr) learned beside the network (Karras et al. 2024, EDM2, eq. 14-16).

    At the optimum u is the logarithm of the expected error, so every noise level weighs the same. u is linear in random
    Fourier features of log_snr / 8 (their c_noise) and starts at 0.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: PositiveInt = 128):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))
        self.linear = nn.Linear(features, 1, bias=True)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, error: Tensor, prediction: Prediction, t: Tensor) -> Tensor:
        c_noise = (-prediction.schedule.log_snr(t) / 8).clamp(-10, 10)  # [B]
        waves = math.sqrt(2) * torch.cos(c_noise[:, None] * self.frequencies + self.phases)  # [B, features]
        u = self.linear(waves)[:, 0]  # [B]
        return error / u.exp() + u
