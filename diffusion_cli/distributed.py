"""Several processes at one command: which of them this one is, as torchrun and Slurm's launchers say it in the environment.

RANK 0 .. WORLD_SIZE - 1, and LOCAL_RANK among those of the same machine
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


# objectives whose weights are asked by their loss and changed by the optimizer alone
_SHARDED = ("diffusion_cli.objectives.Denoising", "diffusion_cli.objectives.Classifying")


def misfits(node: Mapping[str, Any]) -> list[str]:
    """What a training run's config asks for and so many processes cannot do."""
    wrong, several, here = [], node["distributed"]["processes"], process().world
    if several and here not in (1, several):
        wrong.append(f"distributed.processes is {several}, and there are {here} already (WORLD_SIZE): leave it out")
    batch, parts = node["trainer"]["batch"], node["trainer"]["accumulate"]
    world = max(here, several or 1)
    if world > 1 and batch % (world * parts):
        each = f" in {parts} parts each" if parts > 1 else ""
        wrong.append(f"trainer.batch is {batch}: {world} processes{each} share it equally, so it must be a multiple")
    if node["distributed"]["_target_"] != "diffusion_cli.sharding.FSDP":
        return wrong
    ddp = "choose distributed=ddp"
    if world == 1:
        wrong.append(f"distributed=fsdp, and one process: give distributed.processes=2 or more, or use torchrun, or {ddp}")
    if node["precision"] == "fp16":
        wrong.append(f"distributed=fsdp with precision=fp16: its scale is sought on every process alone; take bf16, or {ddp}")
    if node["objective"]["_target_"] not in _SHARDED:
        name = node["objective"]["_target_"].rpartition(".")[2].lower()
        wrong.append(f"distributed=fsdp shards objective=denoising and classifying, and this is {name}: {ddp}")
    return wrong
