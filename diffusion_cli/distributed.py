"""Several processes at one command: which of them this one is, as torchrun and Slurm's launchers say it in the environment.

RANK 0 .. WORLD_SIZE - 1, and LOCAL_RANK among those of the same machine
"""

import os
from dataclasses import dataclass

from diffusion_cli.errors import ConfigError


@dataclass(frozen=True)
class Process:
    """rank: number of this process among `world`; local: its number on this machine, and so of its GPU."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether it is the one that speaks, and writes what there is once."""
        return self.rank == 0

    def device(self, word: str) -> str:
        """device=auto and device=cuda mean this process's own GPU, where there are several processes and GPUs."""
        if self.world == 1 or word not in ("auto", "cuda"):
            return word
        import torch

        return f"cuda:{self.local}" if torch.cuda.is_available() else word


def process() -> Process:
    """This process. Raises ConfigError where the environment contradicts itself."""
    words = {key: os.environ.get(key, default) for key, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    words["LOCAL_RANK"] = os.environ.get("LOCAL_RANK", words["RANK"])
    if not all(word.isdecimal() for word in words.values()) or int(words["RANK"]) >= int(words["WORLD_SIZE"]):
        said = " ".join(f"{key}={word}" for key, word in words.items())
        raise ConfigError(
            f"{said} in the environment: RANK must be a number below WORLD_SIZE; torchrun sets both, or unset them"
        )
    return Process(int(words["RANK"]), int(words["WORLD_SIZE"]), int(words["LOCAL_RANK"]))
