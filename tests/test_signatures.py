"""The signature of a class, read from its source, is its node's schema: every kind of value, what is said of a wrong one."""

import importlib
import inspect
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffusion_cli import signatures
from diffusion_cli.config import CONFIGS
from diffusion_cli.errors import ConfigError
from diffusion_cli.settings import frozen_changes
from diffusion_cli.signatures import (
    Choice,
    Either,
    Nothing,
    Object,
    Scalar,
    Sequence,
    check,
    check_values,
    default_of,
    did_you_mean,
    signature,
)

SOURCE = '''
from __future__ import annotations
from dataclasses import dataclass, field
from typing import ClassVar, Literal
from diffusion_cli.ranges import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Rate
from diffusion_cli.schedules import Schedule
from elsewhere import Tensor

class Part: ...
class Other: ...

@dataclass(frozen=True)
class Small(Part):
    factor: PositiveFloat = 1.0

class Thing:
    def __init__(
        self, whole: int, real: float, flag: bool, word: str, count: PositiveInt, index: NonNegativeInt, scale: PositiveFloat,
        share: Fraction, rate: Rate, mode: Literal["a", "b", 3], pair: tuple[int, Rate], many: tuple[int, ...],
        listed: list[str], maybe: int | None, either: bool | Literal["auto"], part: Part, quoted: "PositiveInt | None",
        tensor: Tensor, bare, *, keyed: int = 1, other: Part | None = None,
    ): ...

@dataclass
class Parent:
    a: int
    b: float = 0.5
    shared: ClassVar[int] = 3
    hidden: int = field(init=False, default=1)

@dataclass
class Child(Parent):
    c: str = "x"

class Quiet(Parent):
    """Inherits all of it."""

class Loud(Parent):
    def __init__(self, only: int): ...
'''
VALUES: dict[str, tuple[list[Any], list[Any]]] = {  # parameter: what it takes, what it refuses
    "whole": ([0, -3, 10**30], [1.0, True, "1", None, [1], math.nan, {}]),
    "real": ([0, -2.5, 1e-300], [True, "1", None, math.nan, math.inf, -math.inf, [1.0]]),
    "flag": ([True, False], [0, 1, "true", None]),
    "word": (["", "x"], [1, True, None, ["x"]]),
    "count": ([1, 5], [0, -1, 1.5, True, math.nan, math.inf]),
    "index": ([0, 5], [-1, 0.0, False]),
    "scale": ([1e-9, 1, 2.5], [0, 0.0, -1, math.nan, math.inf, "1"]),
    "share": ([0, 1, 0.5], [-1e-9, 1.0000001, math.nan, True]),
    "rate": ([0, 0.999], [1, 1.0, -0.1]),
    "mode": (["a", "b", 3], ["c", "A", 3.0, None, True]),
    "pair": ([[1, 0.5], (1, 0)], [[1], [1, 0.5, 2], [1, 1.0], ["1", 0], 1, "10", None]),
    "many": ([[], [1], [1, 2, 3]], [1, [1.5], [1, None], "12"]),
    "listed": ([[], ["a", "b"]], ["ab", [1]]),
    "maybe": ([None, 3], [0.5, "", [], math.nan]),
    "either": ([True, False, "auto"], ["yes", 1, None]),
    "part": ([], [None, 1, "Small", []]),  # nodes: below
    "quoted": ([None, 1], [0, "1"]),
}
_names = (f"signed_{i}" for i in itertools.count())


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own, on the path under a name never used before, not imported."""
    name = next(_names)
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def thing(module: str, **values: object) -> list[str]:
    found = signature(f"{module}.Thing")
    chosen = {name: p for name, p in found.parameters.items() if name in values}
    return check_values(values, signatures.Signature(found.name, found.lineage, chosen), "node", trust=[module])


@pytest.mark.parametrize("name", VALUES)
def test_kind_takes_and_refuses(module: str, name: str) -> None:
    takes, refuses = VALUES[name]
    for value in takes:
        assert thing(module, **{name: value}) == [], value
    for value in refuses:
        (line,) = thing(module, **{name: value})
        assert line.startswith(f"node.{name} is ") and "it must be" in line, line
    assert module not in sys.modules


def test_every_kind_is_recognised(module: str) -> None:
    kinds = {name: p.kind for name, p in signature(f"{module}.Thing").parameters.items()}
    assert {name: type(kind) for name, kind in kinds.items()} == {
        **dict.fromkeys(["whole", "real", "flag", "word", "count", "index", "scale", "share", "rate", "keyed"], Scalar),
        **dict.fromkeys(["pair", "many", "listed"], Sequence),
        **dict.fromkeys(["maybe", "either", "quoted", "other"], Either),
        "mode": Choice, "part": Object, "tensor": signatures.Anything, "bare": signatures.Anything,
    }  # fmt: skip
    assert kinds["part"] == Object(f"{module}.Part")
    assert kinds["other"] == Either((Object(f"{module}.Part"), Nothing()))


def test_required_and_optional(module: str) -> None:
    needed = {name for name, p in signature(f"{module}.Thing").parameters.items() if p.required}
    assert set(signature(f"{module}.Thing").parameters) - needed == {"keyed", "other"}
    assert "node.whole is missing: Thing needs it" in check_values({}, signature(f"{module}.Thing"), "node")
    assert len(check_values({}, signature(f"{module}.Thing"), "node")) == len(needed)


def test_inherited_constructors(module: str) -> None:
    assert list(signature(f"{module}.Child").parameters) == ["a", "b", "c"]
    assert list(signature(f"{module}.Quiet").parameters) == ["a", "b"]
    assert list(signature(f"{module}.Loud").parameters) == ["only"]
    assert signature(f"{module}.Quiet").lineage == (f"{module}.Quiet", f"{module}.Parent")


def test_nested_nodes_are_checked_with_their_full_path(module: str) -> None:
    small = {"_target_": f"{module}.Small", "factor": 2.0}
    assert thing(module, part=small) == []
    assert thing(module, part={**small, "factor": -1}) == ["node.part.factor is -1: it must be a number > 0"]
    (line,) = thing(module, part={**small, "facto": 1})
    assert line == "node.part.facto is not an option of Small: did you mean factor?"
    (line,) = thing(module, part={"_target_": f"{module}.Other"})
    assert line == f"node.part._target_ is {module}.Other: not a Part"
    (line,) = thing(module, part={"factor": 1})
    assert "node.part: a node with _target_ is expected" in line


def test_unknown_key_and_missing_value(module: str) -> None:
    assert thing(module, whole="???") == ["node.whole is missing: write node.whole=... (a whole number)"]
    node = {"_target_": "diffusion_cli.schedules.VP", "beta_mni": 0.1, "beta_max": 20.0}
    lines = check(node, "diffusion_cli.schedules.Schedule", "schedule")
    assert lines[0] == "schedule.beta_mni is not an option of VP: did you mean beta_min?"


def test_wrong_lineage_is_refused() -> None:
    node = {"_target_": "diffusion_cli.schedules.Flow"}
    assert check(node, "diffusion_cli.schedules.Schedule", "schedule") == []
    (line,) = check(node, "diffusion_cli.samplers.Sampler", "sampler")
    assert line == "sampler._target_ is diffusion_cli.schedules.Flow: not a Sampler"


def test_arguments_of_the_program_cannot_be_overridden() -> None:
    model = {"_target_": "diffusion_cli.models.UNetBasic", "widths": [8], "kernel_size": 3}
    given = ("channels", "image_size", "num_classes")
    assert check(model, "diffusion_cli.models.Network", "model", given) == []
    (line,) = check({**model, "channels": 7}, "diffusion_cli.models.Network", "model", given)
    assert line.startswith("model.channels is not an option of UNetBasic")


def test_reading_imports_nothing(module: str) -> None:
    before = set(sys.modules)
    for name in ("Thing", "Child", "Loud", "Quiet", "Small"):
        signature(f"{module}.{name}")
    for target in ("torch.nn.Linear", "xml.dom.minidom.Document", "sqlite3.Connection", "wave.Wave_read"):
        with pytest.raises(ConfigError):
            signatures.target_of({"_target_": target}, "node")
        assert check({"_target_": target}, "diffusion_cli.schedules.Schedule", "node", trust=[target.split(".")[0]])
    assert set(sys.modules) - before == set()


def nodes(value: object) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value] * ("_target_" in value) + [node for v in value.values() for node in nodes(v)]
    return []


FILES = sorted(file for file in CONFIGS.rglob("*.yaml") if file.relative_to(CONFIGS).parts[0] != "hydra")  # those are Hydra's
TARGETS = sorted({node["_target_"] for file in FILES for node in nodes(yaml.safe_load(file.read_text()))})


def test_yaml_files_name_classes() -> None:
    assert len(TARGETS) > 40


@pytest.mark.parametrize("target", TARGETS)
def test_source_agrees_with_inspect(target: str) -> None:
    module, _, name = target.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    found = signature(target)
    assert found.name == f"{cls.__module__}.{cls.__qualname__}"
    true = {n: p for n, p in inspect.signature(cls).parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    assert list(found.parameters) == list(true)
    assert {n: p.required for n, p in found.parameters.items()} == {n: p.default is p.empty for n, p in true.items()}
    ours = [f"{c.__module__}.{c.__qualname__}" for c in cls.__mro__ if c.__module__.startswith("diffusion_cli.")]
    assert set(found.lineage) == set(ours)
    kinds = [p.kind for name, p in found.parameters.items()]
    assert not [kind for kind in kinds if isinstance(kind, signatures.Anything)], "a config could write anything here"


@given(st.text(min_size=1), st.lists(st.text(min_size=1)))
def test_did_you_mean_always_answers(word: str, words: list[str]) -> None:
    assert did_you_mean(word, words)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    )
)
def test_check_never_crashes(value: object) -> None:
    """Whatever YAML or JSON can hold, in place of a node or of its values."""
    for node in (value, {"_target_": value}, {"_target_": "diffusion_cli.schedules.VP", "beta_min": value, "beta_max": value}):
        lines = check(node, "diffusion_cli.schedules.Schedule", "schedule")
        assert all(isinstance(line, str) and line for line in lines)
    if not isinstance(value, int | float) or isinstance(value, bool):
        assert lines


def test_a_run_from_before_a_key_is_none_with_other_settings() -> None:
    """A node that does not say a key means the constructor's default; any other value is a change."""
    now = {"model": {"_target_": "diffusion_cli.models.UNet", "width": 8, "time": "add", "resize": "conv"}, "seed": 0}
    before = {"model": {"_target_": "diffusion_cli.models.UNet", "width": 8}, "seed": 0}
    assert frozen_changes(before, now) == []
    other = {**now, "model": {**now["model"], "resize": "block"}}  # type: ignore[dict-item]
    assert frozen_changes(before, other) == ["model.resize: conv in the run, block now"]
    assert default_of("diffusion_cli.models.UNet", "multipliers") == [1, 2, 2, 2]
    assert default_of("diffusion_cli.models.UNet", "channels") is None and default_of("torch.nn.Linear", "bias") is None
