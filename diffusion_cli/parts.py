"""A batch is worked off in parts, and in more of them where memory is too small: the same gradients but for rounding.

A part is a stretch of slots, and times and noise are drawn by slot, so they stay what they were; only dropout draws anew. What
a loss changes besides gradients (a history of losses, a codebook) is put back before the next attempt. Where it changes such
things, or where pictures of a part are compared with each other, more parts are other mathematics: then the user decides.
"""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from diffusion_cli.errors import OutOfMemory, lacks_memory
from diffusion_cli.runs import say

Made = TypeVar("Made")


class Parts:
    """count: parts now; batch: pictures of this process, both before any doubling; coupled: whether the loss of a picture
    depends on the others of its part; lacking: why memory was too small here -> here or in another process."""

    def __init__(self, module: nn.Module, count: int, batch: int, coupled: bool, lacking: Callable[[str], str] = str):
        self.module, self.count, self.batch, self.coupled, self.lacking = module, count, batch, coupled, lacking
        self._watched = list(module.buffers())
        for inside in module.modules():  # a codebook that is no part of the gradient lies beside its buffers
            if next(inside.buffers(recurse=False), None) is not None:
                self._watched += [weight for weight in inside.parameters() if not weight.requires_grad]
        self._moving = set(range(len(self._watched)))  # which of them a loss changes: after the first step it is known
        self._before: dict[int, Tensor] = {}

    @property
    def size(self) -> int:
        """Pictures in a part."""
        return self.batch // self.count

    def work(self, once: Callable[[int], Made], times: int = 1) -> Made:
        """once(parts), with more of them after each time that memory was too small; of a batch so many times as large, so many
        times the parts, which stay as large as they were. Raises OutOfMemory."""
        self._before = {k: self._watched[k].detach().clone() for k in self._moving}
        count, reason = self.count, ""
        while True:
            here = ""
            versions = [tensor._version for tensor in self._watched]
            try:
                made = once(count * times)
            except Exception as error:
                if not lacks_memory(error):
                    raise
                here = str(error).partition("\n")[0] or "MemoryError"
            lacking = self.lacking(here)
            if not lacking:
                break
            reason = lacking
            # outside the except, for what was raised holds the tensors of the attempt
            self.undo()
            self.module.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
            more = next((n for n in range(2 * count, self.batch + 1) if self.batch % n == 0), None)
            if more is None or self.coupled:
                raise _too_large(reason)
            count = more
        self._moving = {k for k, version in enumerate(versions) if self._watched[k]._version != version}
        if count > self.count:
            if self._moving:
                raise _too_large(reason)
            say(f"out of memory ({reason}): from now on batches are done in {count} parts, as trainer.accumulate={count} does")
            self.count = count
        return made

    def undo(self) -> None:
        """What the loss changed besides gradients, as it was before `work`."""
        with torch.no_grad():
            for k, before in self._before.items():
                self._watched[k].copy_(before)


def _too_large(reason: str) -> OutOfMemory:
    return OutOfMemory(f"out of memory ({reason}): try a smaller trainer.batch, a larger trainer.accumulate or a smaller model")
