"""The contract of a sampler: a generator of states, so that progress bars, trajectories and previews cost nothing.

A sampler walks down a grid of times 1 = t_0 > t_1 > ... > t_n = 0 (its own `grid`, `steps` moves). At each it asks
x0 = denoise(x, t), and moves by schedule.transfer; higher orders correct x0 before the move. What wraps the question
(guidance, clipping, inpainting) wraps `denoise`, never the sampler.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from diffusion_cli.errors import ConfigError
from diffusion_cli.ranges import PositiveInt
from diffusion_cli.samplers.grids import Grid
from diffusion_cli.schedules import Schedule

Denoise = Callable[[Tensor, Tensor], Tensor]  # x [B, C, H, W], t [] -> x0 [B, C, H, W]


@dataclass(frozen=True)
class Varied:
    """A question to a network of learned variances. v: what was said with the last answer, [B, C, H, W] (losses/hybrid.py)."""

    denoise: Denoise
    v: Callable[[], Tensor]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.denoise(x, t)


def clipped(denoise: Denoise) -> Denoise:
    """The same question, each x0 kept within [-1, 1]."""
    kept: Denoise = lambda x, t: denoise(x, t).clamp(-1, 1)  # noqa: E731
    return Varied(kept, denoise.v) if isinstance(denoise, Varied) else kept


class Noise(Protocol):
    """Fresh noise [B, C, H, W] of a step, counted: the same numbers, the same noise. A step may draw more than once."""

    def __call__(self, step: int, which: int = 0, /) -> Tensor: ...


class State(NamedTuple):
    """Before move number `step`: x [B, C, H, W] at time t [] and the picture x0 foreseen there. After the last, x = x0."""

    step: int
    t: Tensor
    x: Tensor
    x0: Tensor


@dataclass(frozen=True)
class Sampler(ABC):
    """steps: moves from noise to data; grid: where they land; clip: keep each foreseen x0 within [-1, 1]."""

    steps: PositiveInt
    grid: Grid
    clip: bool

    def times(self, schedule: Schedule) -> Tensor:
        """[n + 1] float64: where the grid lands. Raises ConfigError where it cannot on this schedule."""
        try:
            times = self.grid.times(self.steps, schedule)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if not (times[0] <= 1 and times[-1] == 0 and (times.diff() < 0).all()):
            near = ", ".join(f"{t:.6g}" for t in times[:4].tolist())
            raise ConfigError(
                f"sampler.grid: {self.steps} steps of {type(self.grid).__name__} do not fall from 1 or below to 0 on "
                f"this schedule (t = {near} ...): take fewer steps, or ends within the schedule"
            )
        return times

    @property
    def varied(self) -> bool:
        """Whether it asks for learned variances, and is given a Varied."""
        return False

    def start(self, schedule: Schedule, noise: Tensor) -> Tensor:
        """Where the walk begins: noise [B, C, H, W] of unit scale -> x at the grid's first time."""
        return float(schedule.sigma(self.times(schedule)[0])) * noise

    def goal(self, schedule: Schedule) -> Callable[[Tensor], Tensor] | None:
        """Which time a question at t [] is to lead to, for networks that are told two; None: t itself."""
        return None

    def length(self, schedule: Schedule) -> int | None:
        """How many moves a walk makes; None where it finds out as it goes."""
        return len(self.times(schedule)) - 1

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, noise: Noise) -> Iterator[State]:
        """States from x [B, C, H, W] at the grid's first time down to t = 0: one for each of its times."""
        times = self.times(schedule)
        yield from self.moves(clipped(denoise) if self.clip else denoise, schedule, x, times, noise)

    @abstractmethod
    def moves(self, ask: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise) -> Iterator[State]:
        """The rule itself: times [n + 1] float64, falling to 0, or to an earlier end where a walk is made of pieces.

        A state at each time; the last is State(n, times[-1], x, x). ask(x, t) is never asked at t = 0.
        """


def last(states: Iterator[State]) -> State:
    """Runs a walk to its end."""
    for state in states:  # noqa: B007
        pass
    return state
