"""Classifier-free guidance: away from what the network says when it is told no label.

    x0 = x0(null) + scale (x0(label) - x0(null))

Ho and Salimans 2022, "Classifier-free diffusion guidance", eq. 6, with scale = 1 + their w. At fixed x and t, every prediction
is linear in x0, so it does not matter which is guided.

    rescale:  x0 <- phi x0 std(x0(label)) / std(x0) + (1 - phi) x0

Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", eq. 14-16: takes back the contrast that a large
scale adds. Here std is that of x0, so that the same phi means the same for every prediction; the paper's is of v, and best
at 0.7.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_cli.denoiser import Denoiser
from diffusion_cli.guidance.guidance import Guided, Scaled, chosen
from diffusion_cli.ranges import Fraction
from diffusion_cli.schedules import Schedule

# (x, t, x0 of the label, x0 of the null label) -> x0; pictures are [B, C, H, W], t is [] or [B]
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LabelFree(Scaled):
    """Base of all guidance by the null label: both answers come from one call of 2 B pictures, or of B where it is not
    active."""

    def check(self, denoiser: Denoiser, null_taught: bool) -> None:
        if not denoiser.network.num_classes:
            raise ValueError(
                "this network is told no labels, so there is none to leave out: train one with dataset.labels=true, "
                "or choose guidance=auto or classifier"
            )
        if not null_taught:
            raise ValueError(
                "this network was trained with objective.label_dropout=0 and never learned to do without a label: train one "
                "with objective.label_dropout=0.1, or choose guidance=auto"
            )

    @abstractmethod
    def rule(self, schedule: Schedule) -> Rule:
        """How two answers become one, for one walk."""

    def guide(self, denoiser: Denoiser, cond: Tensor | None, helper: nn.Module | None = None) -> Guided:
        assert cond is not None  # `check` made sure
        labels = torch.cat([cond, torch.full_like(cond, denoiser.network.num_classes)])  # [2 B]
        rule = self.rule(denoiser.schedule)

        def ask(x: Tensor, t: Tensor, hint: Tensor | None = None) -> Tensor:
            active = self.active(denoiser.schedule, t)
            if not active.any():
                return denoiser(x, t, cond, hint)
            hints = None if hint is None else torch.cat([hint, hint])
            twice = torch.cat([t, t]) if t.dim() else t
            told, untold = denoiser(torch.cat([x, x]), twice, labels, hints).chunk(2)
            return chosen(active, rule(x, t, told, untold), told)

        return ask


@dataclass(frozen=True)
class CFG(LabelFree):
    """scale: 0 untold, 1 told, above 1 guided; rescale: phi, 0 for none."""

    rescale: Fraction = 0.0

    def rule(self, schedule: Schedule) -> Rule:
        def combine(x: Tensor, t: Tensor, told: Tensor, untold: Tensor) -> Tensor:
            x0 = untold + self.scale * (told - untold)  # [B, C, H, W]
            if self.rescale == 0:
                return x0
            ratio = _std(told) / _std(x0).clamp(min=1e-12)
            return self.rescale * ratio * x0 + (1 - self.rescale) * x0

        return combine


def _std(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 1, 1, 1]: over all values of a picture."""
    return x.flatten(1).std(1)[:, None, None, None]
