"""What sampling asks of a trained model, wherever it comes from: a checkpoint of a run, or a pipeline of another library.

A pipeline is put into our own words, a config and facts as a run's checkpoint holds them. So every sampler, edit and guidance
works on it, and nothing but the reader knows where the words came from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from diffusion_cli.checkpoint import Damaged

GROUPS = {"ema": "average", "raw": "weights"}  # the words of the command line -> the tensors of a checkpoint


def group_of(weights: str | float) -> str:
    """The tensors that they are, or in whose place they stand where they are made after training."""
    return GROUPS[weights] if isinstance(weights, str) else "average"


def suffix(weights: str | float) -> list[str]:
    """A word for names of files, where they are not the averaged ones."""
    return [] if weights == "ema" else [weights if isinstance(weights, str) else f"ema_{weights:g}"]


class Trained(Protocol):
    """config: {"config": nodes, "facts": facts of the data}. digest: names these very weights. See checkpoint.Checkpoint."""

    @property
    def folder(self) -> Path:
        """Where its files lie."""

    @property
    def run(self) -> Path:
        """Where what is made with it goes."""

    @property
    def step(self) -> int: ...

    @property
    def digest(self) -> str: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def mark(self) -> str:
        """A word for names of files: which state of the model this is."""

    @property
    def said(self) -> str:
        """What finds it again."""

    def groups(self) -> list[str]:
        """weights, average or both."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Raises checkpoint.Damaged."""


@dataclass(frozen=True)
class Pretrained:
    """A pipeline of another library in our words, or an autoencoder. said: the place as the user would name it, its revision
    included; home: a folder of the user's, never that of the files. read: the tensors by the names that a checkpoint has for
    them. step is 0: the files do not say it."""

    folder: Path
    home: Path
    said: str
    digest: str
    config: dict[str, Any]
    read: Callable[[], Mapping[str, Tensor]]
    step: int = 0

    @property
    def run(self) -> Path:
        return self.home

    @property
    def mark(self) -> str:
        return f"pipeline_{self.digest[:8]}"

    def groups(self) -> list[str]:
        return ["average"]  # published weights are the averaged ones as a rule, and no others are there

    def tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return dict(self.read())
        except (ValueError, KeyError, IndexError, RuntimeError) as error:  # tensors of other names or shapes than the config's
            raise Damaged(f"{self.said}: {error}") from None
