"""Classifier guidance: towards pictures in which a classifier of noised pictures sees the class.

    x0 <- x0 + scale (sigma^2 / alpha) grad_x log p(y | x_t)

Dhariwal and Nichol 2021, "Diffusion models beat GANs on image synthesis", algorithm 2 (eps <- eps - sigma grad) written for
x0. At scale 1, with an exact classifier, the denoiser of all pictures becomes that of the class: Bayes' rule on x0 = (x_t +
sigma^2 grad_x log p(x_t)) / alpha (Tweedie's formula). A network that is told labels is told them too.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion_cli.denoiser import Condition, Denoiser
from diffusion_cli.guidance.guidance import Guided, Helper, Scaled, chosen
from diffusion_cli.noisy_classifier import NoisyClassifier
from diffusion_cli.ranges import NonNegativeFloat, PositiveInt
from diffusion_cli.schedules import Schedule, over_pictures


@dataclass(frozen=True)
class ByClassifier(Scaled):
    """ckpt: the run or checkpoint of the classifier; step: that checkpoint of it, null for its newest. scale: 0 for none."""

    scale: NonNegativeFloat = 1.0
    ckpt: str | None = None
    step: PositiveInt | None = None
    weights: Literal["ema", "raw"] = "ema"

    neutral = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ckpt is None:
            raise ValueError("guidance.ckpt= a classifier run is needed, as experiment=classifier_digits makes one")

    def helper(self) -> Helper:
        return Helper(NoisyClassifier, self.ckpt, self.step, self.weights)

    def guide(self, denoiser: Denoiser, cond: Condition | None, helper: nn.Module | None = None) -> Guided:
        assert cond is not None and helper is not None
        schedule, classifier, labels = denoiser.schedule, helper, cond.told
        told = labels if denoiser.network.told else None

        def ask(x: Tensor, t: Tensor, hint: Tensor | None = None) -> Tensor:
            x0 = denoiser(x, t, told, hint)
            active = self.active(schedule, t) & (schedule.alpha(t) > 0)  # of pure noise nothing can be seen
            if not active.any():
                return x0
            factor = self.scale * schedule.sigma(t) ** 2 / schedule.alpha(t)
            return chosen(active, x0 + over_pictures(factor, x) * gradient(classifier, schedule, x, t, labels), x0)

        return ask


def gradient(classifier: nn.Module, schedule: Schedule, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """grad_x log p(label | x_t) [B, C, H, W] of each picture. Also where gradients are off, as while sampling."""
    with torch.inference_mode(False), torch.enable_grad():
        # Copies: what was made in inference mode cannot be part of a graph.
        z, s, y = x.clone().requires_grad_(), t.clone(), labels.clone()
        log_p = torch.log_softmax(classifier(z, s, schedule), dim=1)  # [B, classes]
        return torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), z)[0]
