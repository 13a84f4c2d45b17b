"""The second model that a guidance asks: found, loaded, and compared with the first before any picture is made."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from diffusion_cli.assembly import Facts
from diffusion_cli.checkpoint import folders
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.errors import ConfigError
from diffusion_cli.finding import find, load_classifier, load_denoiser
from diffusion_cli.guidance import Helper
from diffusion_cli.noisy_classifier import NoisyClassifier
from diffusion_cli.pretrained.trained import Trained

_LOAD = {Denoiser: load_denoiser, NoisyClassifier: load_classifier}


class Second(NamedTuple):
    """A helper that was found, with the facts of its data; digest: names its checkpoint."""

    model: nn.Module
    facts: Facts
    digest: str


def second_of(wanted: Helper, first: Trained, weights: str | float, trust: tuple[str, ...]) -> Second:
    """weights: those of the first model. Raises UserError where there is no such model or it does not fit."""
    found = _find(wanted, first)
    model = _LOAD[wanted.kind](found, wanted.weights, trust)
    if (found.digest, wanted.weights) == (first.digest, weights):
        raise ConfigError(
            f"guidance would ask the very model that it guides ({found.folder}, weights={weights}): name another with "
            "guidance.ckpt, guidance.step or guidance.weights"
        )
    one, two = first.config["facts"], found.config["facts"]
    for key in ("channels", "image_size"):
        if one[key] != two[key]:
            sizes = f"{key} is {two[key]} there and {one[key]} in this run"
            raise ConfigError(f"guidance.ckpt={found.folder} is for other pictures: {sizes}")
    if two["taught"] and not one["taught"] and wanted.kind is Denoiser:
        raise ConfigError(f"guidance.ckpt={found.folder} is told labels, and this run is not: choose one without labels")
    if one["taught"] and two["taught"] and one["classes"] != two["classes"]:
        raise ConfigError(
            f"guidance.ckpt={found.folder} knows the classes {_some(two['classes'])}, and this run {_some(one['classes'])}: "
            "they must be of the same data"
        )
    return Second(model, two, found.digest)


def _find(wanted: Helper, first: Trained) -> Trained:
    if wanted.ckpt is not None and wanted.step is None:
        return find(wanted.ckpt, "guidance.ckpt")
    if wanted.step is None:
        return first
    run = first.folder.parent if wanted.ckpt is None else Path(wanted.ckpt).expanduser()
    parent = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    folder = parent / f"step_{wanted.step:08d}"
    if not folder.is_dir():
        there = ", ".join(str(int(path.name.removeprefix("step_"))) for path in reversed(folders(parent)))
        raise ConfigError(
            f"guidance.step={wanted.step}: {parent} has no such checkpoint; there is {there or 'none'} "
            "(trainer.save_every= and trainer.keep= decide how many stay)"
        )
    return find(folder, "guidance.ckpt")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" ... ({len(names)})" if len(names) > 3 else "")
