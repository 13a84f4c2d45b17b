"""DPM-Solver-12 and -23: two rules that share their questions, and steps as long as the difference between them allows.

    y = x / alpha, rho = sigma / alpha, lambda = -log rho:    dy = -rho n d lambda        (noise frame)
    order 2     DPM-Solver-1 against DPM-Solver-2          inner point at 1/2
    order 3     DPM-Solver-2 against DPM-Solver-3          inner points at 1/3 and 2/3

(Lu et al. 2022, "DPM-Solver", algorithms 1, 2 and appendix C). The measure of the error and the controller are those of
k-diffusion's dpm_adaptive: with E = rms((y_low - y_high) / max(atol, rtol max(|y_low|, |y_before|))) the step h in lambda
changes by

    factor = 1 + atan(e_0^b0 e_1^b1 e_2^b2 - 1),    e = 1 / E now, at the last accepted move and at the one before it
    b0 = (pcoeff + icoeff + dcoeff) / order,  b1 = -(pcoeff + 2 dcoeff) / order,  b2 = dcoeff / order

and the move is accepted where factor >= safety. Every picture has a step of its own, so that it does not depend on the batch
that it is drawn in (k-diffusion's take one for all): a question is asked at times t [B].
"""

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion_cli.errors import NumericError
from diffusion_cli.ranges import NonNegativeFloat, PositiveFloat
from diffusion_cli.samplers.frames import Point, point, transfer
from diffusion_cli.samplers.sampler import Denoise, Noise, Sampler, State
from diffusion_cli.schedules import Schedule, over_pictures

NEAR = 1e-5  # a move that would end this close before the end in lambda goes there


class Control(NamedTuple):
    """Of each picture: h [B], the next step in lambda, and e [3, B], None before the first try. float64."""

    h: Tensor
    e: Tensor | None


@dataclass(frozen=True)
class Adaptive(Sampler):
    """Only the ends of the grid matter: its first time, and the last above 0, from where one `transfer` leads to the picture.

    steps: how many moves may be tried, of order questions each; a walk that needs more is an error. first: h of the first
    move. A state for each try, whatever the pictures made of it; its time [] is that of the picture with furthest to go.
    """

    order: Literal[2, 3] = 3
    rtol: PositiveFloat = 0.05
    atol: PositiveFloat = 0.0078
    first: PositiveFloat = 0.05
    pcoeff: NonNegativeFloat = 0.0
    icoeff: NonNegativeFloat = 1.0
    dcoeff: NonNegativeFloat = 0.0
    safety: PositiveFloat = 0.81

    def __post_init__(self) -> None:
        if self.safety >= 1 + math.pi / 2:
            raise ValueError(f"safety is {self.safety}: the factor of a step stays below 2.57, so that none would be accepted")

    def length(self, schedule: Schedule) -> int | None:
        return None

    def moves(self, ask: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise) -> Iterator[State]:
        t, step = point(schedule, times[0]), 0
        end = point(schedule, times[-1] if times[-1] > 0 else times[-2])
        if t.alpha == 0 and end.t < t.t:  # no h leads away from lambda = -inf: to the grid's second time
            x0, s = ask(x, t.t), point(schedule, times[1])
            yield State(step, t.t, x, x0)
            x, t, step = transfer(x, x0, t, s), s, 1
        if end.t < t.t:
            x, step = yield from self._from(ask, schedule, x, t, end, step)
        if times[-1] == 0:
            x0, clean = ask(x, end.t), point(schedule, times[-1])
            yield State(step, end.t, x, x0)
            x, step = transfer(x, x0, end, clean), step + 1
        yield State(step, times[-1], x, x)

    def _from(
        self, ask: Denoise, schedule: Schedule, x: Tensor, start: Point, end: Point, step: int
    ) -> Generator[State, None, tuple[Tensor, int]]:
        """Walks x [B, C, H, W] from start to end; returns it there, and the number of the next step."""
        lam = torch.full((len(x),), start.lam, dtype=torch.float64)
        t, before = start.t.expand(len(x)), x / start.alpha
        control = Control(torch.full_like(lam, self.first), None)
        while (going := lam < end.lam).any():
            if step >= self.steps or not control.h[going].isfinite().all():
                raise NumericError(
                    f"{int(going.sum())} of {len(x)} pictures are not done after {step} moves of adaptive size: "
                    "raise sampler.steps, sampler.rtol or sampler.atol, or take a sampler whose steps are fixed"
                )
            x0 = ask(x, t)
            yield State(step, t.max(), x, x0)
            h = torch.where(lam + control.h > end.lam - NEAR, end.lam - lam, control.h)
            h = torch.where(going, h, NEAR)  # a picture that is done is asked for nothing: finite is enough
            y = x / over_pictures(schedule.alpha(t), x)
            low, high = _PAIRS[self.order](ask, schedule, y, lam, h, _noise_in(y, x0, lam))
            error = _rms((low - high) / (self.rtol * torch.maximum(low.abs(), before.abs())).clamp(min=self.atol))
            accepted, control = self._steered(control, error)
            moved = over_pictures(accepted & going, x) > 0
            lam = torch.where(accepted & going, torch.where(h == end.lam - lam, end.lam, lam + h), lam)
            t = torch.where(accepted & going, torch.where(lam == end.lam, end.t, schedule.t_of_log_snr(2 * lam)), t)
            x, before = torch.where(moved, over_pictures(schedule.alpha(t), x) * high, x), torch.where(moved, low, before)
            step += 1
        return x, step

    def _steered(self, control: Control, error: Tensor) -> tuple[Tensor, Control]:
        """Which moves are accepted [B], and the steps after them."""
        now = 1 / (error + 1e-8)  # [B]
        _, last, older = control.e if control.e is not None else torch.stack([now] * 3)
        b0 = (self.pcoeff + self.icoeff + self.dcoeff) / self.order
        b1, b2 = -(self.pcoeff + 2 * self.dcoeff) / self.order, self.dcoeff / self.order
        factor = 1 + torch.atan(now**b0 * last**b1 * older**b2 - 1)
        accepted = factor >= self.safety
        e = torch.stack([now, torch.where(accepted, now, last), torch.where(accepted, last, older)])
        return accepted, Control(control.h * factor, e)


def _rms(x: Tensor) -> Tensor:
    """Root mean square of each picture: [B] float64, on the CPU."""
    return x.flatten(1).square().mean(1).sqrt().double().cpu()


def _noise_in(y: Tensor, x0: Tensor, lam: Tensor) -> Tensor:
    """n [B, C, H, W] of y at lam [B]."""
    return (y - x0) * over_pictures(torch.exp(lam), y)


def _told(ask: Denoise, schedule: Schedule, y: Tensor, lam: Tensor) -> Tensor:
    """The noise n [B, C, H, W] foreseen for y at lam [B]."""
    t = schedule.t_of_log_snr(2 * lam)
    return _noise_in(y, ask(over_pictures(schedule.alpha(t), y) * y, t), lam)


def _move(y: Tensor, lam: Tensor, h: Tensor, n: Tensor, more: Tensor, r: float, half: bool) -> Tensor:
    """y [B, C, H, W] from lam to lam + h [B] with noise n, which is `more` after the share r of the way; half: the slope's part
    as half of the whole (DPM-Solver-2), else by its exact integral (DPM-Solver-3)."""
    whole, rho = torch.expm1(h), torch.exp(-lam - h)
    slope = whole / 2 if half else whole / h - 1
    return y - over_pictures(rho * whole, y) * n - over_pictures(rho * slope / r, y) * (more - n)


def _pair_12(ask: Denoise, schedule: Schedule, y: Tensor, lam: Tensor, h: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """DPM-Solver-1 and DPM-Solver-2."""
    n_1 = _told(ask, schedule, _move(y, lam, h / 2, n, n, 1.0, True), lam + h / 2)
    return _move(y, lam, h, n, n, 1.0, True), _move(y, lam, h, n, n_1, 1 / 2, True)


def _pair_23(ask: Denoise, schedule: Schedule, y: Tensor, lam: Tensor, h: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """DPM-Solver-2 with its inner point at 1/3, and DPM-Solver-3."""
    n_1 = _told(ask, schedule, _move(y, lam, h / 3, n, n, 1.0, True), lam + h / 3)
    n_2 = _told(ask, schedule, _move(y, lam, 2 * h / 3, n, n_1, 1 / 2, False), lam + 2 * h / 3)
    return _move(y, lam, h, n, n_1, 1 / 3, True), _move(y, lam, h, n, n_2, 2 / 3, False)


_Pair = Callable[[Denoise, Schedule, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # -> low, high
_PAIRS: dict[int, _Pair] = {2: _pair_12, 3: _pair_23}
