"""Where a walk begins: at pure noise, at a picture with so much noise as the grid's first time has (SDEdit, Meng et al. 2022),
or on a great circle between noises, whose points are as likely as the noises themselves (Shoemake 1985; White 2016, "Sampling
generative networks").
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Sampler
from diffusion_cli.schedules import Schedule, over_pictures


class Start(ABC):
    @abstractmethod
    def x(self, schedule: Schedule, sampler: Sampler, source: Source, shape: tuple[int, ...]) -> Tensor:
        """[B, *shape] at the first time of the sampler's grid, for the slots of source: the numbers of the pictures."""


@dataclass(frozen=True)
class PureNoise(Start):
    def x(self, schedule: Schedule, sampler: Sampler, source: Source, shape: tuple[int, ...]) -> Tensor:
        return sampler.start(schedule, schedule.noise(source, "start", shape))


@dataclass(frozen=True)
class FromPicture(Start):
    """picture: float32 [C, H, W] within [-1, 1]. The sampler's grid is a Tail that begins where the noising ends."""

    picture: Tensor

    def x(self, schedule: Schedule, sampler: Sampler, source: Source, shape: tuple[int, ...]) -> Tensor:
        noise = schedule.noise(source, "start", shape)
        x0 = self.picture.to(noise).expand_as(noise)
        return schedule.mix(x0, noise, sampler.times(schedule)[0])


@dataclass(frozen=True)
class Varied(Start):
    """noise: [C, H, W] of unit scale, a picture's. share: how far each picture goes from it towards a noise of its own."""

    noise: Tensor
    share: float

    def x(self, schedule: Schedule, sampler: Sampler, source: Source, shape: tuple[int, ...]) -> Tensor:
        own = schedule.noise(source, "start", shape)
        share = torch.full((len(own),), self.share, device=own.device)
        return sampler.start(schedule, slerp(self.noise.to(own).expand_as(own), own, share))


@dataclass(frozen=True)
class Between(Start):
    """ends: two noises [2, C, H, W] of unit scale, between which n pictures walk, or the four corners [4, C, H, W] of a square
    map of n pictures: upper left, upper right, lower left, lower right."""

    ends: Tensor
    n: int

    def place(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """(across, down), each [B] float64 from 0 to 1."""
        if len(self.ends) == 2:
            return slots.double() / (self.n - 1), torch.zeros_like(slots, dtype=torch.float64)
        side = math.isqrt(self.n)
        return (slots % side).double() / (side - 1), (slots // side).double() / (side - 1)

    def shares(self, slots: Tensor) -> Tensor:
        """[B, ends] float64: how much of each end a picture has."""
        u, v = self.place(slots)
        corners = torch.stack([(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v], 1)  # [B, 4]
        return corners[:, : len(self.ends)]

    def x(self, schedule: Schedule, sampler: Sampler, source: Source, shape: tuple[int, ...]) -> Tensor:
        u, v = self.place(source.slots)
        ends = self.ends.to(source.slots.device)[:, None].expand(-1, len(u), *shape)  # [ends, B, C, H, W]
        noise = slerp(ends[0], ends[1], u)
        if len(ends) == 4:
            noise = slerp(noise, slerp(ends[2], ends[3], u), v)
        return sampler.start(schedule, noise)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """The point at share [B] from 0 to 1 of the way from a to b [B, C, H, W]: its direction goes along the great circle and its
    length goes evenly from one to the other. The ends are exact."""
    flat_a, flat_b, w = a.flatten(1).double(), b.flatten(1).double(), share.double()[:, None]
    long_a, long_b = flat_a.norm(dim=1, keepdim=True), flat_b.norm(dim=1, keepdim=True)
    one, two = flat_a / long_a, flat_b / long_b
    angle = 2 * torch.atan2((one - two).norm(dim=1, keepdim=True), (one + two).norm(dim=1, keepdim=True))  # [B, 1]
    near = angle < 1e-6  # then the chord is the arc
    sine = torch.where(near, 1, torch.sin(angle))
    left = torch.where(near, 1 - w, torch.sin((1 - w) * angle) / sine)
    right = torch.where(near, w, torch.sin(w * angle) / sine)
    between = ((1 - w) * long_a + w * long_b) * (left * one + right * two)
    between = between.view_as(a).to(a.dtype)
    w = over_pictures(share, a)
    return torch.where(w == 0, a, torch.where(w == 1, b, between))
