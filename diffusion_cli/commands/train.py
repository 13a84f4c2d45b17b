"""diffusion-train: a composed config becomes a run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from diffusion_cli import cli, config, launching
from diffusion_cli.errors import UserError
from diffusion_cli.status import note_failure, status_of
from diffusion_cli.sweeps.jobs import figure

ABOUT = """diffusion-train trains an image diffusion model and writes outputs/<name>: checkpoints, samples, TensorBoard logs.
Told nothing, it trains on bundled handwritten digits, on a CPU, for about a minute. Run again, it goes on where it stopped."""

GROUPS = (
    "experiment", "dataset", "schedule", "prediction", "loss", "model", "optimizer", "ema", "sampler", "guidance", "objective",
    "codec", "texts", "perceptual", "adapter", "features", "distributed", "sweep", "hydra/launcher", "hydra/sweeper",
)  # fmt: skip

EXAMPLES = (
    ("diffusion-train", "digits on a CPU, about a minute, ends with a grid"),
    ("diffusion-train dataset=cifar10 model=unet_attn", "another data set and network"),
    ("diffusion-train experiment=cifar10_ddpm100 name=mine", "a recipe; the same command again goes on"),
    ("diffusion-train schedule=cosine prediction=v trainer.steps=5000", "another process, a longer run"),
    ("diffusion-train dataset=folder dataset.path=DIR preview=data", "look at what the network will see"),
    ("diffusion-train init=outputs/digits dataset.classes=[3,5]", "train a trained model on (adapter=lora: beside it)"),
    ("diffusion-train -m schedule=cosine,vp prediction=eps,v", "a sweep: four runs and a table"),
)


def main() -> None:
    page = lambda: cli.help_page("diffusion-train", "train", ABOUT, GROUPS, EXAMPLES)  # noqa: E731
    cli.run("diffusion-train", "train", task, page, _named_sweep)


def _named_sweep(argv: list[str]) -> list[str]:
    """A sweep's runs lie in one folder, so it has a name from the start; one asked for by name needs no -m."""
    words = cli.overrides(argv)
    said = dict(word.split("=", 1) for word in words if "=" in word)
    sweep = said.get("sweep", "null")
    if said.get("hydra.mode") == "RUN" or not (cli.is_multirun(argv) or sweep != "null"):
        return argv
    flag = ["-m"] * (len(words) == len(argv))  # no flag of Hydra's own stands there
    return [*flag, *argv, *([] if "name" in said else [f"name={'sweep' if sweep == 'null' else sweep}"])]


def task(composed: DictConfig) -> float | None:
    """One run: Hydra calls it once, or its launchers once for each job of a sweep. Returns the figure that a sweep seeks."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    node = config.plain(composed)
    if node.get("name") is None:
        node["name"] = _name(hydra.runtime.choices, list(hydra.overrides.task), node["init"])
    try:
        found = figure(_train(node, list(hydra.overrides.task)), None)
    except UserError as error:
        if hydra.mode == RunMode.MULTIRUN:  # the sweep reads how it ended, also of a job that failed before it was a run
            folder = Path(str(node["outputs"])) / str(node["name"])
            if status_of(folder).get("state") != "preempted":
                note_failure(folder, str(error))
        raise
    return found[1] if found else None


def _train(node: dict[str, Any], words: list[str]) -> dict[str, float]:
    plan = config.planned(node, words)
    return launching.start(plan)


def _name(choices: Mapping[str, Any], words: list[str], init: str | None) -> str:
    """The experiment or data set, the options that were asked for by name, and what it begins from."""
    first = choices.get("experiment") or choices["dataset"]
    silent = {"experiment", "dataset", "sampler", "guidance", "features", "sweep", "codec", "texts", "distributed"}
    asked = [word.partition("=") for word in words]
    groups = [value for key, _, value in asked if key in choices and key.partition("/")[0] not in silent and value != "null"]
    place = "" if init is None else re.sub(r"@.*|[^\w.+-]", "", Path(str(init)).name)
    return "-".join([str(first), *groups, *(["from", place] if place else [])])
