"""The gradient of a batch, added up part by part; on one GPU all but the first of a process repeat a recording (capture.py).

The first batch is worked off as it is: what is compiled is compiled, and memory that is too small shows. The second one is
recorded, on the pictures of the first, and compared with itself as it is: where they differ, or where something cannot be
recorded, a line says so and nothing is recorded any more.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion_cli.capture import Lessons, Record, Recorded, proven
from diffusion_cli.data import Batch
from diffusion_cli.devices import Compute
from diffusion_cli.group import Group
from diffusion_cli.objectives import Objective, Tally
from diffusion_cli.randomness import Source, word_of
from diffusion_cli.runs import say


@dataclass
class Gradients:
    """record: how work becomes repeatable, None where it does not."""

    objective: Objective
    group: Group
    compute: Compute
    scaler: torch.amp.GradScaler
    seed: int
    record: Record[Lessons] | None = None
    recorded: Recorded | None = field(default=None, init=False)
    parts: int = field(default=0, init=False)  # of the batch that the recording is of a part of
    last: tuple[Batch, Source] | None = field(default=None, init=False)  # the first part of the batch before

    def of(self, batch: Batch, step: int, parts: int) -> tuple[Tensor, list[tuple[str, Tally]]]:
        """Adds it to that of the weights: losses [B], and the tallies of each part. It becomes that of all processes with the
        last part."""
        own, losses, tallies = len(batch.x), list[Tensor](), list[tuple[str, Tally]]()
        size, slots = own // parts, self.group.me.rank * own + torch.arange(own, device=batch.x.device)  # [B]
        for part in range(parts):
            place = self.group.me.rank * parts + part  # as one process alone would have it with more parts
            word, here = word_of(self.seed, "dropout", step, place), slice(part * size, (part + 1) * size)
            piece, source = batch.part(here), Source(self.seed, slots[here], step)
            if part == 0 and self.record is not None and self.objective.repeats:
                self._prepare(piece, source, word, parts)
            torch.manual_seed(word)
            with self.group.apart(part == parts - 1):
                if self.recorded is None:
                    loss, found = self._work(piece, source, parts)
                else:
                    loss, found = self.recorded(piece, source, part == 0)
            losses.append(loss)
            tallies += [("loss", Tally(loss.sum(), torch.full_like(loss[0], size))), *found.items()]
        return torch.cat(losses), tallies

    def _work(self, batch: Batch, source: Source, parts: int) -> Lessons:
        with self.compute.precision():
            loss, found = self.group.loss(batch, source)
        self.scaler.scale(loss.mean() / parts).backward()
        return Lessons(loss.detach(), found)

    def _prepare(self, batch: Batch, source: Source, word: int, parts: int) -> None:
        """Before the first part: makes the recording, where the part before was of the same size."""
        if self.recorded is not None and (parts != self.parts or not self.recorded.fits(batch)):  # it is of another step
            self.recorded = None
        if self.recorded is None and self.last is not None and len(self.last[0].x) == len(batch.x):
            assert self.record is not None
            work = lambda batch, source: self._work(batch, source, parts)  # noqa: E731
            try:
                self.parts, self.recorded = parts, proven(work, self.objective, self.last, (batch, source), word, self.record)
            except Exception as error:  # of CUDA, of its memory, of the compiler, of a network that is the user's
                reason = str(error).partition("\n")[0] or type(error).__name__
                self.record = None
                say(f"no CUDA graph is made of a step, which goes on kernel by kernel ({reason})")
        self.last = None if self.record is None or self.recorded is not None else (batch, source)
