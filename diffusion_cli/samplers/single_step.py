"""DPM-Solver's single-step rules: exponential Runge-Kutta rules in log(alpha / sigma) whose inner points stand on the grid.

`order` moves make a group. Each of its points is reached from the group's first: the second by a rule of order 1, the third by
one of order 2, the next group's first by one of order 3; then what was foreseen is forgotten (Lu et al. 2022, "DPM-Solver",
algorithms 1 and 2; "DPM-Solver++", algorithm 1; their "fast" way of filling a number of calls is section 3.4 of the former).
So every point of the grid is one question, a short group stands at the end, and a grid that is even in log_snr gives the
published inner points, 1/2, or 1/3 and 2/3.

Moves and weights are those of `multistep`: the integral of a polynomial through what was foreseen in this group. Fresh noise
runs along the group as one path, for what is foreseen at an inner point depends on the noise there.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion_cli.ranges import NonNegativeFloat
from diffusion_cli.samplers.frames import Point, points, transfer
from diffusion_cli.samplers.multistep import FRAMES
from diffusion_cli.samplers.multistep_weights import moments, weights
from diffusion_cli.samplers.sampler import Denoise, Noise, Sampler, State
from diffusion_cli.schedules import Schedule


class Stage(NamedTuple):
    """A move from the group's first point by what was foreseen at these of its points."""

    of: tuple[int, ...]
    half: bool = False  # is a slope's part half of the whole, instead of its exact integral?


# (points foreseen, length of the group) -> how to make the move; diffusers' words for them, and the paper's own mixture
_ONE, _TWO, _HALF, _ENDS, _ALL = Stage((0,)), Stage((0, 1)), Stage((0, 1), half=True), Stage((0, 2)), Stage((0, 1, 2))
_RULES: dict[str, dict[tuple[int, int], Stage]] = {
    "paper": {(2, 2): _HALF, (2, 3): _TWO, (3, 3): _ENDS},
    "midpoint": {(2, 2): _HALF, (2, 3): _HALF, (3, 3): _ENDS},
    "heun": {(2, 2): _TWO, (2, 3): _TWO, (3, 3): _ALL},
}


@dataclass(frozen=True)
class SingleStep(Sampler):
    """One call of the network a step; order of convergence `order`, but 1 from pure noise and to the picture.

    frame: `noise` is DPM-Solver, `data` DPM-Solver++. rule: which polynomial (`heun`: the one through all points; `midpoint`
    and `paper` need inner points near 1/2, 1/3 and 2/3 for their order). eta: fresh noise, as in multistep rules.
    """

    frame: Literal["data", "noise"] = "data"
    order: Literal[1, 2, 3] = 2
    rule: Literal["paper", "midpoint", "heun"] = "midpoint"
    eta: NonNegativeFloat = 0.0

    def moves(self, ask: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise) -> Iterator[State]:
        frame, places = FRAMES[self.frame], points(schedule, times)
        for group in self.groups(places):
            first, start, path = places[group[0]], x, torch.zeros_like(x)
            seen: list[Tensor] = []
            for i in group:
                t, s = places[i], places[i + 1]
                x0 = ask(x, t.t)
                yield State(i, t.t, x, x0)
                if math.isinf(t.lam) or math.isinf(s.lam):
                    x = transfer(x, x0, t, s)
                    continue
                seen.append(frame.foreseen(x, x0, t))
                stage = _RULES[self.rule].get((len(seen), len(group)), _ONE)
                x = self._move(start, first, s, [places[group[k]] for k in stage.of], [seen[k] for k in stage.of], stage.half)
                step = frame.pull(t, s, self.eta)
                if step.fresh > 0:
                    path = step.kept * path + step.fresh * noise(i)
                    x = x + path
        yield State(len(times) - 1, times[-1], x, x)

    def groups(self, places: list[Point]) -> list[range]:
        """The moves by number; one alone where log(alpha / sigma) is infinite at one of its ends."""
        moves = len(places) - 1
        low, high = int(math.isinf(places[0].lam)), moves - int(math.isinf(places[-1].lam))
        bounds = sorted({0, *range(low, high, self.order), high, moves})
        return [range(first, after) for first, after in pairwise(bounds)]

    def _move(self, x: Tensor, t: Point, s: Point, at: list[Point], seen: list[Tensor], half: bool) -> Tensor:
        """x [B, C, H, W] from t to s, with the polynomial through what was seen at these points and without fresh noise."""
        pull, h = FRAMES[self.frame].pull(t, s, self.eta), s.lam - t.lam
        integrals = moments(len(at), pull.z)
        if half:
            integrals[1] = integrals[0] / 2
        x = pull.kept * x
        for m, weight in zip(seen, weights([(p.lam - t.lam) / h for p in at], integrals), strict=True):
            x = x + pull.scale * pull.rate * weight * m
        return x
