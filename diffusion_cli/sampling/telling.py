"""What the network is told of each picture: picture i of a question takes number i of a list, around and around, whatever n is.

The numbers are those of classes, or of the prompts in their order.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from diffusion_cli.assembly import Facts
from diffusion_cli.conditioning import Conditioner, PromptCut, short, trimmed
from diffusion_cli.errors import ConfigError, DataError
from diffusion_cli.runs import say
from diffusion_cli.settings import Sample
from diffusion_cli.signatures import did_you_mean

Label = str | int | tuple[str | int, ...] | None


@dataclass(frozen=True)
class Told:
    """numbers: of the pictures in turn; None where nothing is told. names: of all numbers. rows: the names that have a row of
    the grid each. tokens: [K, L, D] of the prompts, away: [L, D] of the one that is not wanted; None where labels are told."""

    numbers: list[int] | None
    names: Sequence[str]
    rows: list[str] | None = None
    tokens: Tensor | None = None
    away: Tensor | None = None

    def of(self, numbers: Tensor) -> Tensor:
        """int64 [...] -> what the network is told: labels [...] or tokens [..., L, D]."""
        return numbers if self.tokens is None else self.tokens[numbers.to(self.tokens.device)]


def labelled(label: Label, facts: Facts) -> Told:
    """facts: of the model that is told of classes. Raises ConfigError."""
    numbers = classes_of(label, facts)
    rows = None if numbers is None or len(numbers) < 2 or label is None else [facts["classes"][k] for k in numbers]
    return Told(numbers, facts["classes"], rows)


def prompted(settings: Sample, texts: Conditioner | None) -> Told:
    """texts: None where there is nothing to read. Raises UserError."""
    prompts = prompts_of(settings)
    if texts is None:
        return Told(None, prompts)
    tokens = read(texts, prompts) if prompts else None
    away = None if settings.negative is None else read(texts, [settings.negative])[0]
    rows = [f"{k + 1}  {short(prompt)}" for k, prompt in enumerate(prompts)] if len(prompts) > 1 else None
    return Told(list(range(len(prompts))) or None, prompts, rows, tokens, away)


def prompts_of(settings: Sample) -> list[str]:
    """Those of the command line, or of the file. Raises DataError."""
    if settings.prompts is None:
        said = settings.prompt
        return [] if said is None else list(said) if isinstance(said, tuple) else [said]
    try:
        lines = Path(settings.prompts).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts={settings.prompts} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise DataError(f"prompts={settings.prompts} holds no prompt: a line for each is read")
    return found


def read(texts: Conditioner, prompts: Sequence[str]) -> Tensor:
    """[K, L, D], and a line for each prompt that is too long."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PromptCut)
        tokens = trimmed(texts.encode(prompts))
    for warning in caught:
        if issubclass(warning.category, PromptCut):
            say(str(warning.message))
    return tokens


def classes_of(label: Label, facts: Facts) -> list[int] | None:
    """Labels that the pictures take in turn; None where nothing is told. Raises ConfigError.

    label: a class by number or name, some of them, `all` or None for all.
    """
    names = facts["classes"]
    if not facts["taught"]:
        if label is not None:
            said = _said(label)
            raise ConfigError(f"label={said}: this network was trained without labels; train one with dataset.labels=true")
        return None
    if label is None or label == () or (label == "all" and "all" not in names):
        return facts["taught"]
    return [_number(one, facts) for one in (label if isinstance(label, tuple) else (label,))]


def _number(label: str | int, facts: Facts) -> int:
    names = facts["classes"]
    number = names.index(str(label)) if str(label) in names else label
    if number in facts["taught"]:
        return int(number)
    raise ConfigError(f"label={label}: {did_you_mean(str(label), [names[k] for k in facts['taught']])}")


def _said(label: Label) -> str:
    return f"[{','.join(map(str, label))}]" if isinstance(label, tuple) else str(label)
