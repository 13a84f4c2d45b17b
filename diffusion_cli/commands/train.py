"""diffusion-train: a composed config becomes a run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from diffusion_cli import cli, config
from diffusion_cli.commands.sweep import note_failure, print_table, write_table
from diffusion_cli.errors import Stopped, UserError

# from the parent of a sweep to its jobs, which may be other processes
_SWEPT, _FOLDER = "DIFFUSION_SWEPT_KEYS", "DIFFUSION_SWEEP_FOLDER"

ABOUT = """diffusion-train trains an image diffusion model and writes outputs/<name>: checkpoints, samples, TensorBoard logs.
Told nothing, it trains on bundled handwritten digits, on a CPU, for about a minute. Run again, it goes on where it stopped."""

GROUPS = (
    "experiment", "dataset", "schedule", "prediction", "loss", "model", "optimizer", "ema", "sampler", "guidance", "objective",
    "features", "sweep",
)  # fmt: skip

EXAMPLES = (
    ("diffusion-train", "digits on a CPU, about a minute, ends with a grid"),
    ("diffusion-train dataset=cifar10 model=unet_attn", "another data set and network"),
    ("diffusion-train experiment=cifar10_ddpm100 name=mine", "a recipe; the same command again goes on"),
    ("diffusion-train schedule=cosine prediction=v trainer.steps=5000", "another process, a longer run"),
    ("diffusion-train dataset=folder dataset.path=DIR preview=data", "look at what the network will see"),
    ("diffusion-train -m schedule=cosine,vp prediction=eps,v", "a sweep: four runs and a table"),
)


def main() -> None:
    page = lambda: cli.help_page("diffusion-train", "train", ABOUT, GROUPS, EXAMPLES)  # noqa: E731
    try:
        cli.run("diffusion-train", "train", task, page, _named_sweep)
    finally:
        print_table(os.environ.get(_FOLDER))


def _named_sweep(argv: list[str]) -> list[str]:
    """A sweep's runs lie in one folder, so it has a name from the start."""
    words = cli.overrides(argv)
    sweep = next((word.partition("=")[2] for word in words if word.startswith("sweep=")), None)
    if not cli.is_multirun(argv) and sweep in (None, "null"):
        return argv
    os.environ[_SWEPT] = ",".join(sorted(cli.swept_keys(argv)))
    said = dict(word.split("=", 1) for word in words)
    name = said.get("name") or sweep or "sweep"
    os.environ[_FOLDER] = str(Path(said.get("outputs", "outputs")) / name)
    return argv if "name" in said else [*argv, f"name={name}"]


def task(composed: DictConfig) -> float | None:
    """One run: Hydra calls it once, or once for each job of a sweep. Returns the figure that a sweeper minimises."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    node = config.plain(composed)
    sweeping = hydra.mode == RunMode.MULTIRUN
    words = list(hydra.overrides.task)
    if node.get("name") is None:
        node["name"] = _name(hydra.runtime.choices, words)
    elif sweeping:
        swept = {*filter(None, os.environ.get(_SWEPT, "").split(",")), *(hydra.sweeper.get("params") or {})}
        varied = [word for word in words if word.partition("=")[0] in swept] or [f"job={hydra.job.num}"]
        node["name"] = f"{node['name']}/{cli.folder_name(varied)}"
        print(f"\njob {hydra.job.num}: {' '.join(varied)}", flush=True)
    if not sweeping:
        return _metric(_train(node))
    folder, sweep = Path(str(node["outputs"])) / node["name"], Path(hydra.sweep.dir)
    try:
        return _metric(_train(node))
    except UserError as error:
        print(f"job {hydra.job.num}: {error}", flush=True)
        note_failure(folder, str(error))
        if isinstance(error, Stopped):
            raise SystemExit(error.code) from None  # a signal ends the sweep, and not this job alone
        raise
    finally:
        write_table(sweep)


def _train(node: dict[str, Any]) -> dict[str, float]:
    plan = config.check_train(node)
    from diffusion_cli.training import train  # torch, now that the config is known to be right

    return train(plan)


def _metric(figures: Mapping[str, float]) -> float | None:
    """What a sweeper minimises, on held-out pictures if there are: the error of the foreseen picture at fixed noise levels, or
    the cross-entropy of a classifier."""
    names = [f"{where}/{name}" for where in ("evaluate", "evaluate_on_train") for name in ("x0_mse", "cross_entropy")]
    return next((figures[name] for name in names if name in figures), None)


def _name(choices: Mapping[str, Any], words: list[str]) -> str:
    """The experiment or data set, and the options that were asked for by name."""
    first = choices.get("experiment") or choices["dataset"]
    silent = {"experiment", "dataset", "sampler", "guidance", "features", "sweep"}
    asked = [word.partition("=") for word in words]
    groups = [value for key, _, value in asked if key in choices and key.partition("/")[0] not in silent and value != "null"]
    return "-".join([str(first), *groups])
