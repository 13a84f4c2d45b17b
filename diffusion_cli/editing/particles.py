"""Twisted diffusion sampling (Wu et al. 2023, "Practical and asymptotically exact conditional sampling", algorithm 1).

Each picture is walked by `count` particles. One moves as if what the network foresees agreed with y, by a law p~, and is
weighed for what that law has changed and for how well it looks now,

    w = [p(x_s | x_t) / p~(x_s | x_t, y)] [twist(x_s) / twist(x_t)],        twist(x_t) = N(y; A x0(x_t), doubt(t))

where particles have grown unequal, new ones are drawn among them by their weights (systematic resampling). With ever more
particles and steps the law of the pictures tends to the conditional one, whatever the proposal and the twist, which only say
how fast. The last step, which adds no noise, is a projection, so that y is met exactly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_cli.editing.known import Known
from diffusion_cli.editing.method import Method, Question
from diffusion_cli.errors import ConfigError
from diffusion_cli.ranges import PositiveInt
from diffusion_cli.samplers import Ancestral, Noise, Sampler, State
from diffusion_cli.samplers.frames import points
from diffusion_cli.schedules import Schedule


@dataclass(frozen=True)
class Particles(Method):
    """count: calls of the network for each picture and step. Needs a sampler whose moves are Gaussian with a known spread.
    They ask without memory: what guidance remembers, and a network's own last answer, belong to no particle."""

    count: PositiveInt = 16

    def check(self, sampler: Sampler) -> None:
        if not isinstance(sampler, Ancestral) or sampler.eta == 0:
            raise ConfigError("particles need the noise of ddpm, or of ddim with eta above 0: sampler=ddpm")

    def moves(
        self, known: Known, question: Question, schedule: Schedule, sampler: Sampler, x: Tensor, noise: Noise
    ) -> Iterator[State]:
        assert isinstance(sampler, Ancestral)
        times = sampler.times(schedule)
        K, end = self.count, len(times) - 1
        x = x.expand(K, *x.shape)  # [K, B, C, H, W]: the noise of the moves will part them
        gained = x.new_zeros(x.shape[:2])  # log weights [K, B], but for the twist of now
        for i, (t, s) in enumerate(pairwise(points(schedule, times))):
            x0 = torch.stack([question()(each, t.t) for each in x])
            x0 = x0.clamp(-1, 1) if sampler.clip else x0
            lacking = torch.stack([known.lacking(each) for each in x0])
            twist = -lacking.flatten(2).square().sum(2) / (2 * float(known.doubt(schedule, t.t)))  # [K, B]
            weight = gained + twist
            if s.sigma > 0:
                parent, drawn = resampled(weight, uniform(noise(i, K)))
                x, x0, twist = (taken(each, parent) for each in (x, x0, twist))
                gained = torch.where(drawn, 0, weight) - twist
            else:
                parent = chosen(weight, uniform(noise(i, K)))
                x, x0 = taken(x, parent), taken(x0, parent)
            agreed = torch.stack([known.nearer(schedule, each, t.t) for each in x0])
            yield State(i, t.t, x[0], agreed[0])
            kept, fresh = sampler.spread(t, s)
            x = s.alpha * agreed + kept * (x - t.alpha * agreed) / t.sigma
            if fresh > 0:
                moved = (s.alpha - kept * t.alpha / t.sigma) * (agreed - x0)  # the mean, by the proposal
                z = torch.stack([noise(i, k) for k in range(K)])
                x = x + fresh * z
                gained = gained - (moved * (2 * fresh * z + moved)).flatten(2).sum(2) / (2 * fresh**2)
        yield State(end, times[-1], x[0], x[0])


def uniform(z: Tensor) -> Tensor:
    """[B] in (0, 1) from counted noise z [B, C, H, W]."""
    return torch.special.ndtr(z.flatten(1)[:, 0].double()).clamp(1e-7, 1 - 1e-7)


def resampled(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(parent of each particle [K, B], whether the picture's were drawn anew [B]): where fewer than half count.

    weight: logarithms [K, B]; u [B]. Systematic: the K points (k + u) / K in the sums of the weights.
    """
    K = len(weight)
    share = torch.softmax(weight.double(), 0)  # [K, B]
    drawn = 1 / share.square().sum(0) < K / 2
    k = torch.arange(K, device=weight.device)[:, None]
    parent = torch.searchsorted(share.cumsum(0).T.contiguous(), ((k + u) / K).T.contiguous()).T.clamp(max=K - 1)
    return torch.where(drawn, parent, k), drawn


def chosen(weight: Tensor, u: Tensor) -> Tensor:
    """[K, B]: for each picture the number of one particle, drawn by the weights [K, B] (logarithms), K times over."""
    sums = torch.softmax(weight.double(), 0).cumsum(0).T.contiguous()  # [B, K]
    return torch.searchsorted(sums, u[:, None]).clamp(max=len(weight) - 1).T.expand(len(weight), -1)


def taken(x: Tensor, parent: Tensor) -> Tensor:
    """x [K, B, ...] with particle k of each picture replaced by its parent [K, B]."""
    return x.gather(0, parent.view(*parent.shape, *[1] * (x.dim() - 2)).expand_as(x))
