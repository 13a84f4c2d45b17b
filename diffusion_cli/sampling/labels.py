"""Which class each picture has: picture i of a question takes label i of the list, around and around, whatever n is."""

from diffusion_cli.assembly import Facts
from diffusion_cli.errors import ConfigError
from diffusion_cli.signatures import did_you_mean

Label = str | int | tuple[str | int, ...] | None


def classes_of(label: Label, facts: Facts) -> list[int] | None:
    """Labels that the pictures take in turn; None where nothing is told. Raises ConfigError.

    label: a class by number or name, some of them, `all` or None for all. facts: of the model that is told.
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


def rows_of(label: Label, classes: list[int] | None, facts: Facts) -> list[str] | None:
    """Names of the classes in turn, where the question was for a row of each: `all`, or some of them."""
    if classes is None or len(classes) < 2 or label is None:
        return None
    return [facts["classes"][k] for k in classes]


def _number(label: str | int, facts: Facts) -> int:
    names = facts["classes"]
    number = names.index(str(label)) if str(label) in names else label
    if number in facts["taught"]:
        return int(number)
    raise ConfigError(f"label={label}: {did_you_mean(str(label), [names[k] for k in facts['taught']])}")


def _said(label: Label) -> str:
    return f"[{','.join(map(str, label))}]" if isinstance(label, tuple) else str(label)
