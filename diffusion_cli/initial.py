"""init=PLACE: training begins from a trained model, another run's or a pipeline of others.

The model brings what its weights mean: the nodes SUPPLIED, which stand above the defaults and a recipe, and below the words of
the command line. Where one of them names the group (schedule=cosine), the model's node is not taken; where it names a key of it
(model.dropout=0), that key alone is changed. A run that has a checkpoint goes on from that, and PLACE is not read again.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_cli import checkpoint
from diffusion_cli.assembly import Facts, Stages
from diffusion_cli.checkpoint import Checkpoint
from diffusion_cli.errors import ConfigError
from diffusion_cli.finding import KINDS, find, plain_weights
from diffusion_cli.objectives import Objective
from diffusion_cli.pretrained.trained import Trained
from diffusion_cli.stages import carried

SUPPLIED = ("schedule", "prediction", "model", "sampler", "objective", *Stages.NAMES)
_OUT = re.compile(r".*\.(conv_out|patches_out)\.(weight|bias)")  # of a network's last layer: its rows are channels of F
_TABLE = "class_embedding.weight"  # how the name of a network's table of classes ends (models/network.py)
_SPAN = ".span."  # in the names of what tells a network its second time (models/time_embedding.py)


def adopted(node: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The config of a run with an init, its model's nodes in it and init_digest filled in. words: those of the command line.

    Raises UserError: no such model, other weights than init_digest says, pictures of another size or number of channels.
    """
    source = _own(node)
    if source is None:
        found = find(node["init"], "init")
        _check_pictures(node, found)
        source, digest = {**found.config["config"], **carried(found)}, found.digest
        if node["init_digest"] not in (None, digest):
            raise ConfigError(f"init={node['init']} has the digest {digest}, and init_digest is {node['init_digest']}")
    else:
        digest = source["init_digest"]
    method = node["objective"].get("method")
    said = [word.partition("=")[0].partition("@")[0].replace("/", ".") for word in words]
    taken = {
        group: _with(source[group], node.get(group, {}), group, said) for group in SUPPLIED if _brings(source, group, said)
    }
    if method is not None:  # what few steps are learned by, and walked by, is the command's own
        taken.pop("sampler", None)
        taken["objective"] = {**taken.get("objective", node["objective"]), "method": method}
    if taken.get("sampler", {}).get("variance") == "learned" and not taken.get("objective", node["objective"]).get("term"):
        taken["sampler"]["variance"] = "small"  # a pipeline's: what is not trained on is not asked for
    return {**node, **taken, "init_digest": digest}


def _own(node: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config of the run's newest good checkpoint, if it has one and began from the same place."""
    folder = Path(str(node["outputs"])) / str(node["name"]) / "checkpoints"
    good = next((one for one in checkpoint.good(folder) if isinstance(one, Checkpoint)), None)
    own = None if good is None else good.config["config"]
    return own if own is not None and own.get("init") == node["init"] else None


def _brings(source: Mapping[str, Any], group: str, said: Sequence[str]) -> bool:
    """A pipeline, unlike a run, does not say how it was trained: then the objective is the command's own."""
    return source.get(group) is not None and group not in said and (group != "objective" or "dataset" in source)


def _with(theirs: Mapping[str, Any], ours: Mapping[str, Any], group: str, said: Sequence[str]) -> dict[str, Any]:
    """The model's node with the keys of it that were said: their values are in ours."""
    taken = dict(theirs)
    for key in {name.removeprefix(f"{group}.").partition(".")[0] for name in said if name.startswith(f"{group}.")}:
        deeper = isinstance(taken.get(key), Mapping) and f"{group}.{key}" not in said
        taken[key] = _with(taken[key], ours[key], f"{group}.{key}", said) if deeper else ours[key]
    return taken


def _check_pictures(node: Mapping[str, Any], found: Trained) -> None:
    facts, dataset = found.config["facts"], node["dataset"]
    for fact, key in (("channels", "channels"), ("image_size", "size")):
        if dataset.get(key, facts[fact]) != facts[fact]:
            raise ConfigError(
                f"init={found.said} knows pictures with {fact} {facts[fact]}, and dataset.{key} is {dataset[key]}: write "
                f"dataset.{key}={facts[fact]}"
            )
    if facts["taught"] and dataset.get("labels") is False:
        raise ConfigError(
            f"init={found.said} is told classes, and dataset.labels is false: write dataset.labels=true (a folder's "
            "subfolders are its classes, and one is enough)"
        )


def begin(objective: Objective, found: Trained, weights: str | None, facts: Facts) -> None:
    """Loads the weights of the model into an objective that was just made. weights: ema, raw, or None for the averaged ones
    where there are any. Raises UserError.

    Only the model's parts are taken: what a loss or a critic has learned belongs to the old training. A class has the row of
    the same name; one that the model does not know begins as its null row, or as zeros where it had no classes, so that at
    first the network answers as before. Channels of a variance are left out, or begin as zeros. One of two times that begins
    from one of one learns its time anew (denoiser.PACE).
    """
    group = weights or ("ema" if "average" in found.groups() else "raw")
    given = {name: value for name, value in plain_weights(found, group).items() if name.partition(".")[0] in KINDS}
    own = objective.state_dict()
    for name in own:
        if name.endswith(_TABLE) and name.partition(".")[0] in KINDS:
            given[name] = _table(given.get(name), own[name], found.config["facts"]["classes"], facts["classes"])
    for name in [name for name in given if name in own and _OUT.fullmatch(name)]:
        given[name] = _rows(given[name], own[name])
    given = {name: value for name, value in own.items() if _SPAN in name} | given
    wanted = {name: value.shape for name, value in own.items() if name.partition(".")[0] in KINDS}
    there = {name: value.shape for name, value in given.items()}
    strange = [name for name in {**wanted, **there} if wanted.get(name) != there.get(name)]
    if strange:
        shapes = [list(table[strange[0]]) if strange[0] in table else "none" for table in (there, wanted)]
        raise ConfigError(
            f"init={found.said} does not fit this network: {strange[0]} is {shapes[0]} there and {shapes[1]} here "
            f"({len(strange)} of {len(wanted)} tensors differ); leave out the words that change model or objective"
        )
    objective.load_state_dict({**own, **given})


def _rows(theirs: Tensor, ours: Tensor) -> Tensor:
    """[C, ...] or [2 C, ...], the latter with a variance -> as many rows as ours."""
    if len(theirs) == 2 * len(ours):
        return theirs[: len(ours)]
    return torch.cat([theirs, torch.zeros_like(theirs)]) if len(ours) == 2 * len(theirs) else theirs


def _table(theirs: Tensor | None, ours: Tensor, known: Sequence[str], classes: Sequence[str]) -> Tensor:
    """[N + 1, E]: the rows of these classes, then the null row."""
    if theirs is None:
        return torch.zeros_like(ours)
    null = len(theirs) - 1
    return theirs[[known.index(name) if name in known else null for name in classes] + [null]]
