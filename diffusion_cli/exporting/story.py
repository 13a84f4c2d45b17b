"""What a run says of itself, for its model card: from its checkpoint, its status, its evaluations and its previews.

Figures are taken where they are of this very checkpoint and of the weights that are exported, and nowhere else.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from diffusion_cli.assembly import Facts
from diffusion_cli.exporting.parcel import Model
from diffusion_cli.runs import status_of

Rows = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Figure:
    """value and its standard error, if one is known. of: what was measured; how: on what, in words."""

    name: str
    value: float
    error: float | None
    of: str
    how: str
    split: str | None


@dataclass(frozen=True)
class Story:
    """data, process, network, training: (what, how) rows. picture: PNG of samples. dataset, base: the hub's names of its data
    and of the model that it began from. reads: does it read texts?"""

    name: str
    step: int
    weights: str | float
    licence: str | None
    data: Rows
    process: Rows
    network: Rows
    training: Rows
    figures: tuple[Figure, ...]
    dataset: str | None
    base: str | None
    picture: bytes | None
    reads: bool

    @property
    def digest(self) -> str:
        return sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()


def story_of(model: Model) -> Story:
    node, found = model.node, model.found
    run = found.run
    name = str(node.get("name") or run.resolve().name).rpartition("/")[2]
    repo = node["dataset"].get("repo")
    return Story(
        name,
        found.step,
        model.settings.weights,
        model.settings.licence,
        _data(model),
        _process(model),
        _network(model),
        _training(model),
        (*_evaluated(model), *_of_status(model)),
        repo if isinstance(repo, str) else None,
        m["name"] if (m := re.match(r"hf:/+(?P<name>[^@]+)", str(node.get("init")))) else None,
        _picture(model),
        "texts" in model.facts,
    )


def words(node: Mapping[str, Any]) -> str:
    """A node as words: Betas (curve cosine, steps 1000)."""
    name = str(node.get("_target_", "")).rpartition(".")[2]
    parts = [f"{key} {_value(value)}" for key, value in node.items() if key != "_target_"]
    return f"{name} ({', '.join(parts)})" if name and parts else name or ", ".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return words(value)
    if isinstance(value, list):
        return " ".join(map(_value, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()


def _data(model: Model) -> Rows:
    node, facts = model.node["dataset"], model.facts
    channels, height, width = model.shape
    place = node.get("repo") or (Path(str(node["path"])).name if node.get("path") else None)
    sizes = model.found.config.get("pictures") or {}
    counts = ", ".join(f"{count:,} {split}" for split, count in sizes.items() if count)
    names = facts["classes"]
    few = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    rows = [
        ("set", node["_target_"].rpartition(".")[2] + (f", {place}" if place else "")),
        ("pictures", counts or "not noted"),
        ("size", f"{height} x {width}, {'grey' if channels == 1 else 'RGB'}, values in [-1, 1]"),
        ("classes", few or "none"),
        ("told to the network", _told(facts)),
        ("fingerprint", f"`{facts['fingerprint']}`"),
    ]
    return tuple(rows)


def _told(facts: Facts) -> str:
    if "texts" in facts:
        return f"captions, {facts['texts']['length']} tokens of {facts['texts']['width']} numbers at most"
    return f"{len(facts['taught'])} of {len(facts['classes'])} classes" if facts["taught"] else "no class"


def _process(model: Model) -> Rows:
    node, keys = model.node, ("schedule", "prediction", "loss", "objective", "sampler")
    rows = [(key if key != "sampler" else "sampler of the previews", words(node[key])) for key in keys]
    if "codec" in model.facts:
        shape = " x ".join(map(str, model.facts["codec"]["shape"]))
        rows.insert(0, ("diffused", f"latents, {shape}, of an autoencoder of digest `{model.facts['codec']['digest'][:16]}`"))
    return tuple(rows)


def _network(model: Model) -> Rows:
    weights = sum(p.numel() for p in model.denoiser.network.parameters())
    return ("network", words(model.node["model"])), ("parameters", f"{weights:,}")


def _training(model: Model) -> Rows:
    node, found = model.node, model.found
    averaged = f"their average, {words(node['ema'])}"
    length = f"their average of relative length {model.settings.weights}, made after training"
    which = {"ema": averaged, "raw": "as trained"}.get(model.settings.weights, length)
    images, seconds = found.state.get("images"), found.state.get("seconds")
    rows = [
        ("weights", which),
        *_begun(node),
        ("optimizer", words(node["optimizer"])),
        ("steps", f"{found.step:,}"),
        ("batch", f"{node['trainer']['batch']}"),
        ("pictures seen", f"{images:,}" if isinstance(images, int) else "not noted"),
        ("time", f"{seconds:,.0f} s" if isinstance(seconds, int | float) else "not noted"),
        ("precision", str(node.get("precision", "not noted"))),
        ("seed", str(node.get("seed", "not noted"))),
    ]
    return tuple(rows)


def _begun(node: Mapping[str, Any]) -> Rows:
    """What the run began from, if it did not begin at random."""
    if not node.get("init"):
        return ()
    place = str(node["init"]) if str(node["init"]).startswith("hf:") else Path(str(node["init"])).name
    added = (("added to it", words(node["adapter"])),) if node.get("adapter") else ()
    return ("begun from", f"{place}, of digest `{node['init_digest']}`"), *added


def _evaluated(model: Model) -> Iterator[Figure]:
    """Of RUN/evaluated/*.json: {"figures": {NAME: {"value", "error", "of"}}, "made_by": {...}}."""
    for path in sorted((model.found.run / "evaluated").glob("*.json")):
        try:
            text = json.loads(path.read_text(encoding="utf-8"))
            made_by, figures = dict(text["made_by"]), dict(text["figures"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another file of the user's
        if made_by.get("checkpoint") != model.found.digest or made_by.get("weights") != model.settings.weights:
            continue
        how = ", ".join(f"{key} {made_by[key]}" for key in ("n", "split", "seed") if key in made_by)
        for name, figure in figures.items():
            if isinstance(figure, Mapping) and _is_number(figure.get("value")):
                error = figure.get("error")
                of, split = str(figure.get("of") or ""), made_by.get("split")
                yield Figure(name, figure["value"], error if _is_number(error) else None, of, how, split)


def _of_status(model: Model) -> Iterator[Figure]:
    """What the run measured of its average at its end, where it ended at this checkpoint."""
    status = status_of(model.found.run)
    if status.get("step") != model.found.step or model.settings.weights != "ema":
        return
    for name, value in dict(status.get("figures") or {}).items():
        kind, _, figure = name.partition("/")
        if kind in ("evaluate", "evaluate_on_train") and _is_number(value):
            split = {"evaluate": "test", "evaluate_on_train": "train"}[kind]
            yield Figure(
                figure, value, None, "", f"while training, {model.node['trainer']['evaluate']} pictures at most", split
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _picture(model: Model) -> bytes | None:
    """The newest grid of samples that was drawn no later than this checkpoint; of an exported folder, its own."""
    run, step = model.found.run, model.found.step
    drawn = [path for path in sorted(run.glob("samples/samples_*.png")) if path.stem.partition("_")[2] <= f"{step:08d}"]
    path = drawn[-1] if drawn else run / "samples.png"
    return path.read_bytes() if path.is_file() else None
