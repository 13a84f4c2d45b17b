"""The one door from config to objects.

A node names a class and exactly its constructor's arguments. It is checked against the signature, then against the class that
was really found: defined in this package, or in one that the user trusts on the command line, and of the expected kind. A
config from a checkpoint comes through the same door and is trusted with nothing else.
"""

import importlib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from diffusion_cli.errors import ConfigError
from diffusion_cli.signatures import OWN, check, node_of, target_of

T = TypeVar("T")


def build(
    node: Mapping[str, Any],
    expected: type[T],
    path: str,
    given: Mapping[str, object] | None = None,
    trust: Collection[str] = (),
) -> T:
    """The object of a plain node. path: its place in the config, for messages; given: arguments from the program itself.

    Raises ConfigError: a class that is not ours or not an `expected`, unknown or missing keys, values out of range, and what
    the constructor refuses with a ValueError.
    """
    given = given or {}
    wrong = check(node, f"{expected.__module__}.{expected.__qualname__}", path, given, trust)
    if wrong:
        raise ConfigError("\n".join(wrong))
    found = target_of(node, path, trust)
    module, _, name = found.name.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    if not isinstance(cls, type) or not issubclass(cls, expected) or cls.__module__.partition(".")[0] not in (OWN, *trust):
        raise ConfigError(f"{path}._target_ is {node['_target_']}: not a {expected.__name__} of this package")
    if any(getattr(getattr(cls, name, None), "__isabstractmethod__", False) for name in dir(cls)):
        raise ConfigError(f"{path}._target_ is {node['_target_']}: only a base class, name one that descends from it")
    arguments = dict(given)
    for key, value in node.items():
        if key != "_target_":
            kind = found.parameters[key].kind
            arguments[key] = _value(kind, value, f"{path}.{key}", trust)
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _value(kind: object, value: Any, path: str, trust: Collection[str]) -> object:
    inner = node_of(kind)
    if inner is not None and value is not None:
        module, _, name = inner.base.rpartition(".")
        return build(value, getattr(importlib.import_module(module), name), path, trust=trust)
    return tuple(value) if isinstance(value, list) else value
