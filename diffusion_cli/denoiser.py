"""The denoiser: a network, a schedule and a prediction become the one question that a sampler may ask, denoise(x, t) -> x0.

A self-conditioned network (Chen et al. 2022, "Analog bits", section 3.2) is told in further channels what was foreseen before:
the hint, zero where there is none. It is no state of the denoiser: who asks remembers (walking.py, objectives/denoising.py).

A network of two times (Geng et al. 2025, "Mean flows") gives the average velocity from t to an earlier s, x_s = x - (t - s) F.
Asked for x0 it leads nowhere, s = t, and F is the velocity at x_t as any other network's; `leading` makes a denoiser whose x0
is such that one straight move, transfer(x, x0, t, s), ends where the path does.

What it is told of a picture, cond, is a label or the tokens of a text; there is a null condition of either, of pictures of
which nothing is said (Ho and Salimans 2022): the label after the last one, or the tokens of the empty text.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion_cli.models.network import Network
from diffusion_cli.predictions import Prediction
from diffusion_cli.schedules import over_pictures

# A hint is kept within this: a foreseen x0 can explode where alpha is near 0. Pictures lie within 1, latents of unit
# variance nearly always within 3.
HINT_RANGE = 3.0
# Of 1000 t the fastest wave of a time embedding turns in a thousandth of the way, and a network's derivative in time is made of
# such waves more than of the data (measured on digits: 2 to 9 times the mean slope over 0.04). So two times are told slower.
PACE = 0.01


class Condition(NamedTuple):
    """told: labels [B] or tokens [B, L, D]. untold: what guidance leads away from, of the same kind and number: the null
    condition, or a text that is not wanted; its L may be another."""

    told: Tensor
    untold: Tensor


class Denoiser(nn.Module):
    """D(x_t, t) -> x0 for one network trained with one prediction on one schedule.

    x [B, C, H, W] float32; t [] or [B] in (0, 1]; cond: labels [B], tokens [B, L, D] or None, for the null condition; hint
    [B, C, H, W]: an earlier x0, or None. null: [L, D], the tokens of the empty text, where the network reads tokens; length: L.
    """

    null: Tensor
    digest = ""  # of the checkpoint that it was read from, where it serves as a teacher
    goal: Callable[[Tensor], Tensor] | None = None  # t -> the s that a network of two times leads to; None: t itself
    note: Callable[[Tensor], None] | None = None  # is given v of each answer

    def __init__(self, network: Network, prediction: Prediction, length: int = 0):
        super().__init__()
        self.network = network
        self.prediction = prediction
        self.schedule = prediction.schedule
        if network.text_width:
            self.register_buffer("null", torch.zeros(length, network.text_width))

    def condition(self, told: Tensor, untold: Tensor | None = None) -> Condition:
        """untold: tokens [L, D] that guidance leads away from; None: the null condition."""
        if untold is None and not self.network.text_width:
            return Condition(told, torch.full_like(told, self.network.num_classes))
        away = self.null if untold is None else untold
        return Condition(told, away.to(told).expand(len(told), -1, -1))

    def leading(self, goal: Callable[[Tensor], Tensor] | None) -> "Denoiser":
        """The same denoiser, with the same weights, that leads from t to goal(t), where its network has two times."""
        if goal is None or not self.network.two_times:
            return self
        made = copy.copy(self)
        made.goal = goal
        return made

    def noting(self, note: Callable[[Tensor], None]) -> "Denoiser":
        """The same denoiser, with the same weights, that gives v of each x0 to `note`. Its network has learned variances."""
        made = copy.copy(self)
        made.note = note
        return made

    def output(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        hint: Tensor | None = None,
        augment: Tensor | None = None,
        s: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The network's raw F [B, C, H, W], and v of the same shape where it says one: the logarithm of a step's variance lies
        v of the way from the posterior's to that of the whole step (losses/hybrid.py). A network without hint_channels is not
        told the hint; augment [B, 9]: how x was moved, for a network with augment_width; one of one time is not told s."""
        time = self.prediction.c_noise(t).to(x).expand(len(x))  # [B]
        if self.network.two_times:
            s = s if s is not None else t if self.goal is None else self.goal(t)
            time = PACE * torch.stack([time, time - self.prediction.c_noise(s).to(x)], dim=1)  # [B, 2]
        z = over_pictures(self.prediction.c_in(t), x) * x  # [B, C, H, W]
        if self.network.hint_channels:
            told = torch.zeros_like(x) if hint is None else hint.to(x).clamp(-HINT_RANGE, HINT_RANGE)
            z = torch.cat([z, told], dim=1)  # [B, 2 C, H, W]
        if cond is None and self.network.text_width:
            cond = self.null.expand(len(x), -1, -1)
        more = {} if augment is None else {"augment": augment}
        F = self.network(z, time, cond, **more).float()
        if not self.network.variance_channels:
            return F, None
        F, said = F.chunk(2, dim=1)  # [B, C, H, W] each
        return F, (said + 1) / 2

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, hint: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        F, v = self.output(x, t, cond, hint, augment)
        if self.note is not None and v is not None:
            self.note(v)
        return self.prediction.decode(F, x, t)[0]
