"""A loss is three independent choices: L = E_t [ w(t) norm(F - target) ]."""

from torch import Tensor, nn

from diffusion_cli.losses.norms import Norm
from diffusion_cli.losses.times import Times
from diffusion_cli.losses.weights import Weight
from diffusion_cli.predictions import Prediction
from diffusion_cli.randomness import Source
from diffusion_cli.schedules import Schedule


class Loss(nn.Module):
    """times: which t; norm: per-picture error of F; weight: how much each noise level counts."""

    def __init__(self, times: Times, norm: Norm, weight: Weight):
        super().__init__()
        self.times = times
        self.norm = norm
        self.weight = weight

    def draw(self, schedule: Schedule, source: Source) -> tuple[Tensor, Tensor]:
        """(t [B] in (0, 1], correction [B]): the correction undoes any uneven drawing of t."""
        return self.times(schedule, source)

    def forward(self, F: Tensor, target: Tensor, t: Tensor, correction: Tensor, prediction: Prediction) -> Tensor:
        """F and target [B, C, H, W], t and correction [B] -> loss [B]."""
        error = self.norm(F, target)  # [B]
        if self.training:
            self.times.observe(t, error)
        return correction * self.weight(error, prediction, t)
