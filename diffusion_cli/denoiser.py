"""The denoiser: a network, a schedule and a prediction become the one question that a sampler may ask, denoise(x, t) -> x0."""

from torch import Tensor, nn

from diffusion_cli.models.network import Network
from diffusion_cli.predictions import Prediction
from diffusion_cli.schedules import over_pictures


class Denoiser(nn.Module):
    """D(x_t, t) -> x0 for one network trained with one prediction on one schedule.

    x [B, C, H, W] float32; t [] or [B] in (0, 1]; cond: labels [B] or None.
    """

    def __init__(self, network: Network, prediction: Prediction):
        super().__init__()
        self.network = network
        self.prediction = prediction
        self.schedule = prediction.schedule

    def output(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The network's raw F [B, C, H, W]."""
        time = self.prediction.c_noise(t).to(x).expand(len(x))  # [B]
        return self.network(over_pictures(self.prediction.c_in(t), x) * x, time, cond).float()

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.prediction.decode(self.output(x, t, cond), x, t)[0]
