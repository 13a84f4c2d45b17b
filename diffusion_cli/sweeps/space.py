"""What a sweep varies: lists of values and ranges, from a file's params and from the command line, in one form.

optimizer.lr=1e-4,3e-4                 schedule=choice(vp,cosine)        seed=range(0,5)        model=glob(unet*)
optimizer.lr=interval(1e-5,1e-2)       tag(log, interval(1e-5, 1e-2))    int(interval(8, 64))
optimizer.lr: {low: 1e-5, high: 1e-2, log: true}      model.width: [16, 24, 32]       in a file
"""

import itertools
import math
import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from diffusion_cli.errors import ConfigError
from diffusion_cli.signatures import check_values, did_you_mean, shown, signature

CASE = "case"  # the key whose values are cases: sets of words, each with a name
CORNERS = 64  # combinations that are all tried before a search begins; of more, each value once


@dataclass(frozen=True)
class Choice:
    """Values as the command line writes them."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """low <= value <= high, even in the logarithm if log, on low + k step if step; a whole number if whole."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"goes from {self.low:g} to {self.high:g}: the lower end comes first")
        if self.log and self.low <= 0:
            raise ValueError(f"starts at {self.low:g}: a logarithm needs low > 0")
        if self.log and self.step is not None:
            raise ValueError("has both log and step: leave one out")

    @property
    def values(self) -> tuple[str, ...]:
        """All of them where there is a step, else the ends alone."""
        count = 1 if self.step is None else int((self.high - self.low) / self.step + 1e-9)
        stride = self.step or self.high - self.low
        return tuple(self.text(self.low + k * stride) for k in range(count + 1))

    def at(self, u: float) -> str:
        """The value at u in [0, 1): uniform where u is."""
        if self.step is not None:
            return self.values[int(u * len(self.values))]
        if self.whole and not self.log:
            return self.text(self.low + math.floor(u * (self.high - self.low + 1)))
        value = self.low * (self.high / self.low) ** u if self.log else self.low + u * (self.high - self.low)
        return self.text(min(max(float(f"{value:.6g}"), self.low), self.high))  # six digits: what a folder's name can bear

    def text(self, value: float) -> str:
        return str(round(value)) if self.whole else repr(float(f"{value:.12g}"))


Space = Mapping[str, Choice | Interval]


def parse(
    params: object, words: Sequence[str], loader: ConfigLoader | None = None, cases: Collection[str] = ()
) -> tuple[list[str], dict[str, Choice | Interval]]:
    """(words that hold for every job, what is varied). params: of the sweep's file; words: key=value, and they win;
    cases: the values of the key `case`, all of them where none is said.

    Raises ConfigError with a line for everything that is wrong.
    """
    if not isinstance(params, Mapping):
        raise ConfigError(f"hydra.sweeper.params is {shown(params)}: it must be a list of key: values")
    said = [_parsed(word, word, loader) for word in words]
    keys = {override.input_line.partition("=")[0] for override in said if override.input_line}
    wrong: list[str] = []
    space: dict[str, Choice | Interval] = {CASE: Choice(tuple(cases))} if cases else {}
    fixed: list[str] = []
    for key, value in params.items():
        if key not in keys:
            try:
                space |= {str(key): _of_file(str(key), value, loader)}
            except ConfigError as error:
                wrong += str(error).splitlines()
    for override in said:
        assert override.input_line is not None
        key = override.input_line.partition("=")[0]
        if key == CASE and cases and not override.is_sweep_override():
            space[CASE] = Choice((str(override.value()),))
        elif override.is_sweep_override():
            try:
                space[key] = _of_override(override)
            except ValueError as error:
                wrong.append(f"{override.input_line}: {error}")
        else:
            fixed.append(override.input_line)
    named = space[CASE].values if CASE in space and cases else ()
    wrong += [f"case={name}: {did_you_mean(name, cases)}" for name in named if name not in cases]
    wrong += [f"{key} cannot be swept: it says where the sweep lies" for key in ("name", "outputs") if key in space]
    if wrong:
        raise ConfigError("\n".join(wrong))
    return fixed, space


def read_cases(cases: Mapping[Any, Any]) -> dict[str, tuple[str, ...]]:
    """The words of each case by its name. Raises ConfigError with a line for everything that is wrong."""
    wrong = [
        f"hydra.sweeper.cases.{name} is {shown(words)}: a case is a name and a list of words, as in muon: [optimizer=muon]"
        for name, words in cases.items()
        if not (
            re.fullmatch(r"[\w.+-]+", str(name)) and isinstance(words, list) and all(isinstance(word, str) for word in words)
        )
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    return {str(name): tuple(words) for name, words in cases.items()}


def grid(space: Space) -> list[dict[str, str]]:
    """Every combination, the last key fastest. Raises ConfigError for a range without a step."""
    for key, choices in space.items():
        if isinstance(choices, Interval) and choices.step is None:
            raise ConfigError(
                f"{key} is a range, and a grid needs values: list them, give it a step, or draw from it with "
                "hydra/sweeper=random or hydra/sweeper=optuna"
            )
    every = itertools.product(*(choices.values for choices in space.values()))
    return [dict(zip(space, values, strict=True)) for values in dict.fromkeys(every)]


def draws(space: Space, seed: int, count: int) -> list[dict[str, str]]:
    """`count` different draws, or as many as are found where there are hardly more combinations."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for number in range(20 * count):
        values = draw(space, seed, number)
        found.setdefault(tuple(values.values()), values)
        if len(found) == count:
            break
    return list(found.values())


def draw(space: Space, seed: int, number: int) -> dict[str, str]:
    """Draw `number` of that seed: the same whatever the other keys and the number of draws are."""
    uniform = {key: random.Random(f"{seed}/{number}/{key}").random() for key in space}
    return {
        key: choices.at(uniform[key])
        if isinstance(choices, Interval)
        else choices.values[int(uniform[key] * len(choices.values))]
        for key, choices in space.items()
    }


def corners(space: Space) -> list[dict[str, str]]:
    """What to check before a search: every combination of values and ends, or each value once where these are too many."""
    lists = {
        key: choices.values if isinstance(choices, Choice) else (choices.values[0], choices.values[-1])
        for key, choices in space.items()
    }
    if math.prod(map(len, lists.values())) <= CORNERS:
        return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    first = {key: values[0] for key, values in lists.items()}
    return [first, *({**first, key: value} for key, values in lists.items() for value in values[1:])]


def written(value: object) -> str:
    """A value of a YAML file as the command line writes it."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(written, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{written(inside)}" for key, inside in value.items()) + "}"
    if isinstance(value, str) and not re.fullmatch(r"[\w./+-]+", value):
        return QuotedString(text=value, quote=Quote.single).with_quotes()
    return shown(value)


def _of_file(key: str, value: Any, loader: ConfigLoader | None) -> Choice | Interval:
    name = f"hydra.sweeper.params.{key}"
    if isinstance(value, Mapping):
        wrong = check_values(value, signature("diffusion_cli.sweeps.settings.Interval"), name)
        if wrong:
            raise ConfigError("\n".join(wrong))
        ends = [value["low"], value["high"], *([value["step"]] if value.get("step") is not None else [])]
        try:
            return Interval(**value, whole=all(isinstance(end, int) for end in ends))
        except ValueError as error:
            raise ConfigError(f"{name} {error}") from None
    if isinstance(value, list):
        if not value:
            raise ConfigError(f"{name} is empty: list its values")
        return Choice(tuple(map(written, value)))
    override = _parsed(f"{key}={shown(value)}", f"{name} is {shown(value)}", loader)
    if not override.is_sweep_override():
        return Choice((f"{shown(value)}",))
    try:
        return _of_override(override)
    except ValueError as error:
        raise ConfigError(f"{name} {error}") from None


def _of_override(override: Override) -> Choice | Interval:
    if override.is_discrete_sweep():
        values = tuple(override.sweep_string_iterator())
        if not values:
            raise ValueError("finds nothing to sweep over")
        return Choice(values)
    interval = override.value()
    assert isinstance(interval, IntervalSweep) and interval.start is not None and interval.end is not None
    whole = isinstance(interval.start, int) and isinstance(interval.end, int)
    return Interval(interval.start, interval.end, "log" in interval.tags, None, whole)


def _parsed(word: str, shown_as: str, loader: ConfigLoader | None) -> Override:
    try:
        return OverridesParser.create(config_loader=loader).parse_override(word)
    except HydraException:
        raise ConfigError(f"{shown_as}: the value cannot be read") from None
