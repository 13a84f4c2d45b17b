"""Numbers that left the finite do no harm: such a step is skipped, with weights and average as they were, to the bit.

A step applies its gradient only where the loss of every picture, the norm of the gradient and that of the weights are finite.
Five skipped in a row, or a weight that is not finite, send the run back to its newest good checkpoint; where that was tried
already, it ends. One batch that is not finite would be in the weights and in the average for good (clipping by a norm that is
not a number spreads it), so the question comes before the optimizer. It is the one moment in which a step waits for its device.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_cli.runs import say

ROW = 5  # skipped steps that are no accident any more
WINDOW, LEAST = 128, 32  # losses that a spike is seen against, and how many of them at least
SPIKE = 10  # times the median


class Diverged(Exception):
    """The weights are not worth going on with. The message says what was seen and where."""


@dataclass
class Guard:
    """skipped: steps so far; suspects: the pictures of those in a row that were skipped just now, by step."""

    skipped: int = 0
    suspects: dict[int, list[int]] = field(default_factory=dict)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def accepts(
        self, step: int, ids: Tensor, losses: Tensor, norm: Tensor, weights: Sequence[Tensor], scaler: torch.amp.GradScaler
    ) -> bool:
        """Whether the gradient may be applied. ids, losses [B] of the batch; norm of its gradient. Raises Diverged."""
        asked = {"loss": losses.sum(), "gradient": norm, "weight": nn.utils.get_total_norm(weights)}
        values = dict(zip(asked, torch.stack([value.float() for value in asked.values()]).tolist(), strict=True))
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if not wrong:
            self.suspects.clear()
            self._look_for_a_spike(step, ids, losses, values["loss"] / len(losses))
            return True
        if "weight" in wrong:
            raise Diverged(f"a weight is not finite at step {step:,}")
        if wrong == ["gradient"] and scaler.is_enabled() and scaler.get_scale() >= 1:
            return False  # fp16 looks for its scale like this, and halves it
        self.skipped += 1
        self.suspects[step] = (ids[~losses.isfinite()] if "loss" in wrong else ids).tolist()
        what = f"the {wrong[0]} is not finite"
        if len(self.suspects) == ROW:
            raise Diverged(f"{what} in {ROW} steps in a row, {step - ROW + 1:,} to {step:,} (pictures {self.pictures})")
        say(f"step {step:>7,}  {what} (pictures {_few(self.suspects[step])}): skipped, nothing is changed by it")
        return False

    @property
    def pictures(self) -> str:
        return _few(list(dict.fromkeys(i for ids in self.suspects.values() for i in ids)))

    def _look_for_a_spike(self, step: int, ids: Tensor, losses: Tensor, loss: float) -> None:
        if len(self.recent) >= LEAST and loss > SPIKE * statistics.median(self.recent):
            largest = ids[losses.argsort(descending=True)[:4]].tolist()
            say(f"step {step:>7,}  the loss is {loss:.4g}, {SPIKE} times its median or more (pictures {_few(largest)} most)")
        self.recent.append(loss)

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "suspects": list(self.suspects.items())}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "Guard":
        """What a checkpoint remembers; one of an earlier program nothing."""
        before = state.get("guard", {"skipped": 0, "suspects": []})
        return cls(before["skipped"], dict(before["suspects"]))


def _few(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:8])) + f" and {len(ids) - 8} more" * (len(ids) > 8)
