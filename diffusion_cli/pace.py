"""How many pictures each step sees, as a function of the step: a batch, doubled each time that so many have been seen.

A larger batch has less noise in its gradient, as a smaller learning rate has (Smith et al. 2018, "Don't decay the learning
rate, increase the batch size"): many small steps early, when any of them is right, and few sure ones late.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Pace:
    """batch: pictures in the first step; doublings: pictures seen, rising, after each of which the batch is twice as large."""

    batch: int
    doublings: tuple[int, ...] = ()

    @classmethod
    def of(cls, trainer: Mapping[str, Any]) -> "Pace":
        """Of the settings of a training. Those of an older program know no doublings."""
        return cls(trainer["batch"], tuple(trainer.get("batch_doublings", ())))

    @cached_property
    def stretches(self) -> list[tuple[int, int, int]]:
        """Of each batch its first step, the pictures seen before that, and its size."""
        found = [(0, 0, self.batch)]
        for images in self.doublings:
            step, seen, batch = found[-1]
            steps = -(-max(images - seen, 0) // batch)
            found.append((step + steps, seen + steps * batch, 2 * batch))
        return found

    def size(self, step: int) -> int:
        """Pictures in step number `step`."""
        return self._at(step)[2]

    def times(self, step: int) -> int:
        """How many times the first batch that is."""
        return self.size(step) // self.batch

    def seen(self, step: int) -> int:
        """Pictures in all steps before step number `step`."""
        first, seen, batch = self._at(step)
        return seen + (step - first) * batch

    def steps(self, images: int) -> int:
        """The fewest steps that see so many pictures."""
        first, seen, batch = [stretch for stretch in self.stretches if stretch[1] < images or stretch[0] == 0][-1]
        return first + -(-max(images - seen, 0) // batch)

    def _at(self, step: int) -> tuple[int, int, int]:
        return next(stretch for stretch in reversed(self.stretches) if stretch[0] <= step)
