"""Numbers that left the finite do no harm: such a step is skipped, with weights and average as they were, to the bit.

A step applies its gradient only where the loss of every picture, the norm of the gradient and that of the weights are finite.
Five skipped in a row, or a weight that is not finite, send the run back to its newest good checkpoint; where that was tried
already, it ends. One batch that is not finite would be in the weights and in the average for good (clipping by a norm that is
not a number spreads it), so the question comes before the optimizer. It is the one moment in which a step waits for its device.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_cli.runs import say

ROW = 5  # skipped steps that are no accident any more
WINDOW, LEAST = 128, 32  # losses that a spike is seen against, and how many of them at least
SPIKE = 10  # times the median


class Diverged(Exception):
    """The weights are not worth going on with. The message says what was seen and where."""


class Guard:
    """weights: what is trained; undo: puts back what a loss changed besides gradients; norm: of tensors as one vector.

    skipped: steps so far; suspects: the pictures of those in a row that were skipped just now, by step.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        scaler: torch.amp.GradScaler,
        undo: Callable[[], None],
        norm: Callable[[list[Tensor]], Tensor] = nn.utils.get_total_norm,
    ):
        self.weights, self.scaler, self.undo, self.norm = list(weights), scaler, undo, norm
        self.skipped = 0
        self.suspects: dict[int, list[int]] = {}
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def accepts(self, step: int, ids: Tensor, losses: Tensor, norm: Tensor) -> bool:
        """Whether the gradient may be applied. ids, losses [B] of the batch; norm of its gradient. Raises Diverged."""
        loss, gradient, weight = torch.stack([losses.sum().float(), norm.float(), self._norm()]).tolist()
        if math.isfinite(loss) and math.isfinite(gradient) and math.isfinite(weight):
            self.suspects.clear()
            self._look_for_a_spike(step, ids, losses, loss / len(losses))
            return True
        self.undo()
        if not self._norm().isfinite():
            raise Diverged(f"a weight is not finite at step {step:,}")
        if math.isfinite(loss) and self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
            return False  # fp16 looks for its scale like this, and halves it
        self.skipped += 1
        self.suspects[step] = (ids if math.isfinite(loss) else ids[~losses.isfinite()]).tolist()
        what = f"the {'gradient' if math.isfinite(loss) else 'loss'} is not finite"
        if len(self.suspects) == ROW:
            raise Diverged(f"{what} in {ROW} steps in a row, {step - ROW + 1:,} to {step:,} (pictures {self.pictures})")
        say(f"step {step:>7,}  {what} (pictures {_few(self.suspects[step])}): skipped, nothing is changed by it")
        return False

    def _norm(self) -> Tensor:
        return self.norm(self.weights).float()

    @property
    def pictures(self) -> str:
        return _few(list(dict.fromkeys(i for ids in self.suspects.values() for i in ids)))

    def _look_for_a_spike(self, step: int, ids: Tensor, losses: Tensor, loss: float) -> None:
        # one that is below 0, as with a learned weight or a dispersive term, has no multiples that say anything
        if len(self.recent) >= LEAST and 0 < SPIKE * statistics.median(self.recent) < loss:
            largest = ids[losses.argsort(descending=True)[:4]].tolist()
            say(f"step {step:>7,}  the loss is {loss:.4g}, {SPIKE} times its median or more (pictures {_few(largest)} most)")
        self.recent.append(loss)

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "suspects": list(self.suspects.items())}

    def load(self, state: Mapping[str, Any]) -> None:
        """What a checkpoint remembers; one of an earlier program nothing."""
        self.skipped, self.suspects = state.get("skipped", 0), dict(state.get("suspects", []))


def _few(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:8])) + f" and {len(ids) - 8} more" * (len(ids) > 8)
