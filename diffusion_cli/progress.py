"""What a run counts, beside its weights."""

from collections.abc import Callable
from dataclasses import dataclass, field

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
