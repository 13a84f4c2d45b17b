"""The best figure of a run so far, which decides what checkpoint is kept and when nothing better is expected any more.

It is part of the trainer's state: a resumed run knows it as the uninterrupted one does.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffusion_cli.evaluation.words import higher_is_better


@dataclass
class Best:
    """figure: its name, None where none is watched; step, value: where it was best; worse: evaluations since then."""

    figure: str | None
    step: int | None = None
    value: float | None = None
    worse: int = 0

    @classmethod
    def of_state(cls, figure: str | None, state: Mapping[str, Any]) -> "Best":
        """What a checkpoint's state remembers of this figure; nothing where it remembers none, or another."""
        before = state.get("best")  # a checkpoint of an earlier program has none
        return cls(**before) if before is not None and before["figure"] == figure else cls(figure)

    def hear(self, step: int, figures: Mapping[str, float]) -> bool:
        """Whether these figures are the best so far. Equal is not better, and what is no number never is."""
        if self.figure is None or self.figure not in figures:
            return False
        value = figures[self.figure]
        ahead = self.value is None or (value > self.value if higher_is_better(self.figure) else value < self.value)
        if math.isfinite(value) and ahead:
            self.step, self.value, self.worse = step, value, 0
            return True
        self.worse += 1
        return False

    def given_up(self, patience: int | None) -> bool:
        """Whether as many evaluations as that brought nothing better."""
        return patience is not None and self.worse >= patience

    def state(self) -> dict[str, Any]:
        return asdict(self)
