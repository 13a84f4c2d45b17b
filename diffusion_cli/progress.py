"""What a run counts, beside its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion_cli.objectives import Tally


@dataclass
class Progress:
    """Steps made, seconds of work, sums since the last report. owed: what is due at this step, in order."""

    step: int = 0
    seconds: float = 0.0  # of training, over all attempts
    owed: list[str] = field(default_factory=list)
    tallies: dict[str, Tally] = field(default_factory=dict)

    def add(self, name: str, tally: Tally) -> None:
        old = self.tallies.get(name)
        self.tallies[name] = tally if old is None else Tally(old.sums + tally.sums, old.counts + tally.counts)

    def merge(self, total: Callable[[list[Tensor]], list[Tensor]]) -> None:
        """The sums of all processes instead of this one's."""
        sums = iter(total([tensor for tally in self.tallies.values() for tensor in tally]))
        self.tallies = {name: Tally(next(sums), next(sums)) for name in self.tallies}

    def leave(self) -> None:
        """What was merged, and another process keeps."""
        for tally in self.tallies.values():
            for tensor in tally:
                tensor.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """The sums, for a checkpoint."""
        return {f"{name}/{part}": value for name, tally in self.tallies.items() for part, value in tally._asdict().items()}

    def load(self, sums: Mapping[str, Tensor], device: torch.device) -> None:
        """Those of a checkpoint instead."""
        names = dict.fromkeys(key.rpartition("/")[0] for key in sums)
        self.tallies = {name: Tally(*(sums[f"{name}/{part}"].to(device) for part in Tally._fields)) for name in names}
