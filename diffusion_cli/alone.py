"""A checkpoint for asking alone: the weights of one part, without optimizer and trainer, and no path of this machine."""

import re
from collections.abc import Mapping
from typing import Any

from diffusion_cli import checkpoint
from diffusion_cli.averages import weights_of
from diffusion_cli.checkpoint import Checkpoint
from diffusion_cli.pretrained.trained import Trained, group_of


def alone(found: Trained, part: str, weights: str | float) -> dict[str, bytes]:
    """The files of a checkpoint that holds that part of the model. config.json says under `origin` of what it is a copy."""
    group = group_of(weights)
    own = {name: value for name, value in weights_of(found, weights, quiet=True).items() if name.startswith(f"{part}.")}
    known = found.state if isinstance(found, Checkpoint) else {}
    state: dict[str, Any] = {key: known[key] for key in ("step", "images", "seconds") if key in known}
    config = {**found.config, "config": portable(found.config["config"]), "origin": found.config.get("origin", found.digest)}
    return checkpoint.packed(found.step, {group: own}, config, state)


def portable(node: Mapping[str, Any]) -> dict[str, Any]:
    """The same config without the folders of this machine: /home/me/pictures becomes pictures."""
    return {key: _without_folders(value) for key, value in node.items()}


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return portable(value)
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    if isinstance(value, str) and re.match(r"[/~\\]|[A-Za-z]:[/\\]", value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value
