"""Which times are trained: distributions of t over (0, 1], drawn for a batch of counted slots."""

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffusion_cli.collectives import gathered
from diffusion_cli.randomness import Source
from diffusion_cli.ranges import Fraction, PositiveFloat, PositiveInt
from diffusion_cli.schedules import Schedule


class Times(nn.Module):
    """A distribution of t. A module, because one that learns keeps its history in buffers that the checkpoint carries."""

    @abstractmethod
    def sample(self, schedule: Schedule, source: Source) -> Tensor:
        """t [B] in (0, 1]."""

    def correction(self, t: Tensor) -> Tensor:
        """[B]: what the loss is multiplied by so that its mean is that of the intended distribution."""
        return torch.ones_like(t)

    def forward(self, schedule: Schedule, source: Source) -> tuple[Tensor, Tensor]:
        t = self.sample(schedule, source)
        return t, self.correction(t)

    def observe(self, t: Tensor, error: Tensor) -> None:
        """Told of each picture's error [B] while training."""


class Uniform(Times):
    """t uniform over (0, 1)."""

    def sample(self, schedule: Schedule, source: Source) -> Tensor:
        return source.uniform("time").clamp(min=1e-6)  # below, EDM's sigma = 80 t^7 is 0 in float32 and a weight 0 / 0


class Discrete(Times):
    """t uniform over 1/N, 2/N ... 1: the knots of a table of N steps (Ho et al. 2020)."""

    def __init__(self, steps: PositiveInt = 1000):
        super().__init__()
        self.steps = steps

    def sample(self, schedule: Schedule, source: Source) -> Tensor:
        return torch.ceil(source.uniform("time") * self.steps).clamp(1, self.steps) / self.steps


class LogNormal(Times):
    """log(sigma / alpha) normal with this mean and standard deviation (Karras et al. 2022, table 1)."""

    def __init__(self, mean: float = -1.2, std: PositiveFloat = 1.2):
        super().__init__()
        self.mean, self.std = mean, std

    def sample(self, schedule: Schedule, source: Source) -> Tensor:
        log_sigma = self.mean + self.std * source.normal("time")
        return schedule.t_of_log_snr(-2 * log_sigma).clamp(min=1e-6)


class LogitNormal(Times):
    """t = sigmoid(z), z normal (Esser et al. 2024, "Scaling rectified flow transformers", eq. 19): the middle more often."""

    def __init__(self, mean: float = 0.0, std: PositiveFloat = 1.0):
        super().__init__()
        self.mean, self.std = mean, std

    def sample(self, schedule: Schedule, source: Source) -> Tensor:
        return torch.sigmoid(self.mean + self.std * source.normal("time")).clamp(min=1e-6)


class LowDiscrepancy(Times):
    """t uniform, but spread evenly over the batch (Kingma et al. 2021, "Variational diffusion models", appendix I.1).

    One offset for the batch, then steps of the golden ratio from slot to slot: any part of a batch is spread evenly too.
    """

    def sample(self, schedule: Schedule, source: Source) -> Tensor:
        offset = replace(source, slots=torch.zeros_like(source.slots)).uniform("time")  # [B], all the same
        steps = torch.remainder(source.slots.double() * ((5**0.5 - 1) / 2), 1).float()
        return torch.remainder(offset + steps, 1).clamp(min=1e-6)


class Importance(Times):
    """t with probability proportional to the root mean square of its loss (Nichol and Dhariwal 2021, eq. 18).

    Over `buckets` equal parts of (0, 1], from each bucket's last `memory` losses, mixed with a share `floor` of uniform
    drawing; uniform until every bucket has its memory full.
    """

    history: Tensor  # [buckets, memory] the last losses of each bucket
    seen: Tensor  # [buckets] how many it has had

    def __init__(self, buckets: PositiveInt = 100, memory: PositiveInt = 10, floor: Fraction = 0.001):
        super().__init__()
        self.floor = floor
        self.register_buffer("history", torch.zeros(buckets, memory))
        self.register_buffer("seen", torch.zeros(buckets, dtype=torch.int64))

    def _density(self) -> Tensor:
        """[buckets]: probability density over (0, 1], of mean 1."""
        buckets, memory = self.history.shape
        p = self.history.square().mean(1).sqrt()
        p = (1 - self.floor) * p / p.sum().clamp(min=1e-30) * buckets + self.floor
        return torch.where((self.seen >= memory).all(), p, torch.ones_like(p))

    def sample(self, schedule: Schedule, source: Source) -> Tensor:
        edges = torch.cumsum(self._density(), 0) / len(self.history)  # [buckets], the last is 1
        u = source.uniform("time") * edges[-1]
        bucket = torch.searchsorted(edges, u).clamp(max=len(edges) - 1)
        low = torch.where(bucket > 0, edges[bucket - 1], 0)
        within = (u - low) / (edges[bucket] - low)
        return ((bucket + within) / len(edges)).clamp(1e-6, 1)

    def _bucket(self, t: Tensor) -> Tensor:
        return (torch.ceil(t * len(self.history)) - 1).clamp(min=0).long()

    def correction(self, t: Tensor) -> Tensor:
        return 1 / self._density()[self._bucket(t)]

    @torch.no_grad()
    def observe(self, t: Tensor, error: Tensor) -> None:
        bucket, value = self._bucket(gathered(t)), gathered(error.detach().float())  # [B] both
        memory, same = self.history.shape[1], bucket[:, None] == bucket  # [B, B]
        after = torch.triu(same, 1).sum(1)  # [B]: pictures of its bucket that come after it in this batch
        place = (self.seen[bucket] + torch.tril(same, -1).sum(1)) % memory
        kept = torch.where(after < memory, bucket * memory + place, self.history.numel())  # the rest beyond the end
        longer = torch.cat([self.history.flatten(), value[:1]]).index_put((kept,), value)
        self.history.copy_(longer[:-1].view_as(self.history))
        self.seen.index_add_(0, bucket, torch.ones_like(bucket))
