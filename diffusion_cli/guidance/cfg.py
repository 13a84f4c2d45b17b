"""Classifier-free guidance: away from what the network says when it is told nothing.

    x0 = x0(untold) + scale (x0(told) - x0(untold))

Ho and Salimans 2022, "Classifier-free diffusion guidance", eq. 6, with scale = 1 + their w. Told is a label or a text; untold
is the null condition, or a text that is not wanted, as Stable Diffusion's negative prompt. At fixed x and t, every prediction
is linear in x0, so it does not matter which is guided.

    rescale:  x0 <- phi x0 std(x0(told)) / std(x0) + (1 - phi) x0

Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", eq. 14-16: takes back the contrast that a large
scale adds. Here std is that of x0, so that the same phi means the same for every prediction; the paper's is of v, and best
at 0.7.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from diffusion_cli.denoiser import Condition, Denoiser
from diffusion_cli.guidance.guidance import Guided, Scaled, chosen
from diffusion_cli.ranges import Fraction
from diffusion_cli.schedules import Schedule

# (x, t, x0 told, x0 untold) -> x0; pictures are [B, C, H, W], t is [] or [B]
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LabelFree(Scaled):
    """Base of all guidance by the untold condition: both answers come from one call of 2 B pictures, or of B where it is not
    active."""

    leads_away = True

    def check(self, denoiser: Denoiser, null_taught: bool) -> None:
        if not denoiser.network.told:
            raise ValueError(
                "this network is told no labels and no texts, so there is nothing to leave out: train one with "
                "dataset.labels=true or texts=clip, or choose guidance=auto or classifier"
            )
        if not null_taught:
            raise ValueError(
                "this network was trained with objective.label_dropout=0 and never learned to do without a label or text: "
                "train one with objective.label_dropout=0.1, or choose guidance=auto"
            )

    @abstractmethod
    def rule(self, schedule: Schedule) -> Rule:
        """How two answers become one, for one walk."""

    def guide(self, denoiser: Denoiser, cond: Condition | None, helper: nn.Module | None = None) -> Guided:
        assert cond is not None  # `check` made sure
        both = torch.cat(equally_long(*cond))  # [2 B], or [2 B, L, D]
        rule = self.rule(denoiser.schedule)

        def ask(x: Tensor, t: Tensor, hint: Tensor | None = None) -> Tensor:
            active = self.active(denoiser.schedule, t)
            if not active.any():
                return denoiser(x, t, cond.told, hint)
            hints = None if hint is None else torch.cat([hint, hint])
            twice = torch.cat([t, t]) if t.dim() else t
            told, untold = denoiser(torch.cat([x, x]), twice, both, hints).chunk(2)
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


def equally_long(told: Tensor, untold: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, L, D] of both, padded with zeros to one L; labels as they are."""
    if told.dim() == 1:
        return told, untold
    length = max(told.shape[1], untold.shape[1])
    padded = [nnf.pad(tokens, (0, 0, 0, length - tokens.shape[1])) for tokens in (told, untold)]
    return padded[0], padded[1]


def _std(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 1, 1, 1]: over all values of a picture."""
    return x.flatten(1).std(1)[:, None, None, None]
