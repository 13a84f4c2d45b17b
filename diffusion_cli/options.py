"""The name by which a user chose a node of the config: {_target_: ...Betas, curve: cosine, ...} is schedule=cosine.

Free of torch. Nothing is kept for it: of the group's files with that target, it is the one that agrees with most of the
node's values, so that runs of any age and changed values have names too.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

CONFIGS = next(path for path in (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs") if path.is_dir())


def option_of(group: str, node: Mapping[str, Any]) -> str:
    """group: schedule, sampler/grid ...; the class in small letters where no file of the group makes it."""
    target = str(node["_target_"])
    known = _options(group) if group in _groups() else {}
    alike = {name: _agreeing(group, values, node) for name, values in known.items() if values["_target_"] == target}
    return max(alike, key=alike.__getitem__) if alike else target.rpartition(".")[2].lower()


def named(node: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """A whole config with the option's name in place of each class."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        inside = f"{group}/{key}" if group else str(key)
        found[str(key)] = named(value, inside) if isinstance(value, Mapping) else value
    return {**found, "_target_": option_of(group, node)} if "_target_" in node else found


def _agreeing(group: str, option: Mapping[str, Any], node: Mapping[str, Any]) -> tuple[int, bool]:
    """How many values are equal, less those that are not. `steps` says how long, and `lr` how fast, and not what: so steps
    only decide between options that agree alike."""
    said = [key for key in option.keys() & node.keys() if key not in ("_target_", "steps", "lr")]
    theirs, own = (
        {key: option_of(f"{group}/{key}", part) if _builds(part := values[key]) else part for key in said}
        for values in (option, node)
    )
    return sum(1 if theirs[key] == own[key] else -1 for key in said), option.get("steps") == node.get("steps")


def _builds(part: object) -> bool:
    return isinstance(part, Mapping) and "_target_" in part


@cache
def _groups() -> frozenset[str]:
    return frozenset(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*") if path.is_dir())


@cache
def _options(group: str) -> dict[str, dict[str, Any]]:
    """What each file of a group says, of those that build something: values, and the names of options for its parts."""
    found = {file.stem: _said(group, file.stem) for file in sorted((CONFIGS / group).glob("*.yaml"))}
    return {name: values for name, values in found.items() if "_target_" in values}


def _said(group: str, name: str) -> dict[str, Any]:
    """A file with what it is made of: `defaults: [unet, {grid: own}, _self_]`."""
    values = dict(yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text(encoding="utf-8")) or {})
    made_of: dict[str, Any] = {}
    for part in values.pop("defaults", []):
        made_of |= part if isinstance(part, Mapping) else _said(group, part) if part != "_self_" else {}
    numbers = [key for key, value in values.items() if key in made_of and isinstance(value, Mapping) and not _builds(value)]
    return made_of | {key: value for key, value in values.items() if key not in numbers}
