"""How a walk is bound to agree with what is known of the picture: the contract, and going back in time.

A bound walk asks for x0 given x_t and y. Where that answer is only nearly right, the walk gets better by going back: having
walked `jump` steps it is noised up again and walks them anew, `resample` times in all (Lugmayr et al. 2022, "RePaint",
section 4.2), which lets the new parts and the known ones fit each other:

    x_t = (alpha_t / alpha_s) x_s + sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) z
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from diffusion_cli.editing.known import Known
from diffusion_cli.ranges import PositiveInt
from diffusion_cli.samplers import Denoise, Noise, Sampler, State, last
from diffusion_cli.schedules import Schedule

Question = Callable[[], Denoise]  # a new question, which remembers nothing of others


class Method(ABC):
    def check(self, sampler: Sampler) -> None:
        """ConfigError for a sampler that it does not go with."""
        return

    def walk(
        self, known: Known, question: Question, schedule: Schedule, sampler: Sampler, x: Tensor, noise: Noise
    ) -> Iterator[State]:
        """The sampler's states from x [B, C, H, W] at its grid's first time. Where y is exact, the picture agrees with it."""
        self.check(sampler)
        known = known.to(x)
        for state in self.moves(known, question, schedule, sampler, x, noise):
            if state.t == 0 and known.noise == 0:
                x = known.agree(state.x)
                state = State(state.step, state.t, x, x)
            yield state

    @abstractmethod
    def moves(
        self, known: Known, question: Question, schedule: Schedule, sampler: Sampler, x: Tensor, noise: Noise
    ) -> Iterator[State]:
        """The rule itself. Answers are not clipped yet, though the sampler may want it."""


@dataclass(frozen=True)
class Binding(Method):
    """A method that changes the answer x0 alone, and so goes with every sampler. A piece of a walk that is walked more than
    once begins without the memory of a multistep sampler or of guidance. The states are those of each piece's last turn."""

    resample: PositiveInt = 1
    jump: PositiveInt = 1

    @abstractmethod
    def foresee(self, known: Known, ask: Denoise, schedule: Schedule, x: Tensor, t: Tensor, clip: bool) -> Tensor:
        """x0 [B, C, H, W], given x_t and y. clip: keep what the network says within [-1, 1]."""

    def moves(
        self, known: Known, question: Question, schedule: Schedule, sampler: Sampler, x: Tensor, noise: Noise
    ) -> Iterator[State]:
        def bound() -> Denoise:
            ask = question()
            return lambda x, t: self.foresee(known, ask, schedule, x, t, sampler.clip)

        times = sampler.times(schedule)
        end = len(times) - 1
        jump = self.jump if self.resample > 1 else end
        for first in range(0, end, jump):
            piece = times[first : first + jump + 1]
            for turn in range(self.resample):
                if turn:
                    x = noised_up(schedule, x, piece[-1], piece[0], noise(first, -turn))
                states = sampler.moves(bound(), schedule, x, piece, self._fresh(noise, first, turn))
                if turn < self.resample - 1:
                    x = last(states).x
            for state in states:
                if state.t > piece[-1] or state.t == times[-1]:
                    yield State(first + state.step, *state[1:])
            x = state.x

    def _fresh(self, noise: Noise, first: int, turn: int) -> Noise:
        """The noise of one turn of a piece: none of it is that of another."""
        return lambda step, which=0: noise(first + step, which * self.resample + turn)


def noised_up(schedule: Schedule, x: Tensor, s: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """x [B, C, H, W] at s with as much of the noise z as takes it to t > s, whatever the picture."""
    ratio = float(schedule.alpha(t)) / float(schedule.alpha(s))
    added = float(schedule.sigma(t)) ** 2 - (ratio * float(schedule.sigma(s))) ** 2
    return ratio * x + math.sqrt(max(added, 0.0)) * z
