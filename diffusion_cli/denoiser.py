"""The denoiser: a network, a schedule and a prediction become the one question that a sampler may ask, denoise(x, t) -> x0.

A self-conditioned network (Chen et al. 2022, "Analog bits", section 3.2) is told in further channels what was foreseen before:
the hint, zero where there is none. It is no state of the denoiser: who asks remembers (walking.py, objectives/denoising.py).
"""

import torch
from torch import Tensor, nn

from diffusion_cli.models.network import Network
from diffusion_cli.predictions import Prediction
from diffusion_cli.schedules import over_pictures

# A hint is kept within this: a foreseen x0 can explode where alpha is near 0. Pictures lie within 1, latents of unit
# variance nearly always within 3.
HINT_RANGE = 3.0


class Denoiser(nn.Module):
    """D(x_t, t) -> x0 for one network trained with one prediction on one schedule.

    x [B, C, H, W] float32; t [] or [B] in (0, 1]; cond: labels [B] or None; hint [B, C, H, W]: an earlier x0, or None.
    """

    def __init__(self, network: Network, prediction: Prediction):
        super().__init__()
        self.network = network
        self.prediction = prediction
        self.schedule = prediction.schedule

    def output(self, x: Tensor, t: Tensor, cond: Tensor | None = None, hint: Tensor | None = None) -> Tensor:
        """The network's raw F [B, C, H, W]. A network without hint_channels is not told the hint."""
        time = self.prediction.c_noise(t).to(x).expand(len(x))  # [B]
        z = over_pictures(self.prediction.c_in(t), x) * x  # [B, C, H, W]
        if self.network.hint_channels:
            told = torch.zeros_like(x) if hint is None else hint.to(x).clamp(-HINT_RANGE, HINT_RANGE)
            z = torch.cat([z, told], dim=1)  # [B, 2 C, H, W]
        return self.network(z, time, cond).float()

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, hint: Tensor | None = None) -> Tensor:
        return self.prediction.decode(self.output(x, t, cond, hint), x, t)[0]
