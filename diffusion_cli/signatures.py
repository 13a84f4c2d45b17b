"""Constructor signatures, read from the source without importing it: the signature of a class is the schema of its config node.

A node is {_target_: package.Class, key: value, ...}. `check` finds unknown and missing keys, wrong types and bad values in
a few milliseconds, before torch is imported; `build.py` asks it again when objects are made, also for a checkpoint's config.
"""

import ast
import importlib.util
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, get_args

from diffusion_cli import ranges
from diffusion_cli.errors import ConfigError

OWN = "diffusion_cli"


# -- kinds of value ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scalar:
    """int, float, bool or str, with a range for the numbers."""

    type: type
    range: ranges.Range | None = None

    def holds(self, value: object) -> bool:
        if isinstance(value, bool) or self.type in (bool, str):
            return isinstance(value, self.type) and isinstance(value, bool) == (self.type is bool)
        if not isinstance(value, int | float) or (self.type is int and not isinstance(value, int)):
            return False
        return abs(value) <= sys.float_info.max and (self.range is None or self.range.holds(value))  # not-a-number is not

    def __str__(self) -> str:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
        return names[self.type] + (f" {self.range}" if self.range else "")


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    words: tuple[object, ...]

    def holds(self, value: object) -> bool:
        return any(value == word and type(value) is type(word) for word in self.words)

    def __str__(self) -> str:
        return "one of " + ", ".join(map(str, self.words))


@dataclass(frozen=True)
class Sequence:
    """A list; of any length, or of as many kinds as stated."""

    kinds: tuple[Any, ...]
    endless: bool

    def holds(self, value: object) -> bool:
        if not isinstance(value, list | tuple):
            return False
        kinds = self.kinds * len(value) if self.endless else self.kinds
        return len(kinds) == len(value) and all(kind.holds(v) for kind, v in zip(kinds, value, strict=True))

    def __str__(self) -> str:
        return (
            f"a list, each {self.kinds[0]}"
            if self.endless
            else f"a list of {len(self.kinds)}: " + "; ".join(map(str, self.kinds))
        )


@dataclass(frozen=True)
class Either:
    """Any of some kinds; None among them is written null."""

    kinds: tuple[Any, ...]

    def holds(self, value: object) -> bool:
        return any(kind.holds(value) for kind in self.kinds)

    def __str__(self) -> str:
        return ", or ".join(map(str, self.kinds))


@dataclass(frozen=True)
class Nothing:
    def holds(self, value: object) -> bool:
        return value is None

    def __str__(self) -> str:
        return "null"


@dataclass(frozen=True)
class Object:
    """A node of its own, for a class or a descendant of it."""

    base: str

    def holds(self, value: object) -> bool:
        return isinstance(value, Mapping)

    def __str__(self) -> str:
        return f"a {self.base.rpartition('.')[2]}: a node with _target_"


@dataclass(frozen=True)
class Anything:
    """A type that no config can write (a tensor, say)."""

    def holds(self, value: object) -> bool:
        return True


def node_of(kind: object) -> Object | None:
    """The class that a node of this kind becomes, if it may be a node."""
    return next((k for k in (kind.kinds if isinstance(kind, Either) else (kind,)) if isinstance(k, Object)), None)


# -- signatures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """default: where it is a literal, as YAML has it, which knows no tuples."""

    kind: Any
    required: bool
    default: object = ...


@dataclass(frozen=True)
class Signature:
    """name: where the class is defined; lineage: it and its ancestors, as far as their source is at hand."""

    name: str
    lineage: tuple[str, ...]
    parameters: dict[str, Parameter]


class _Unreadable(Exception):
    """No such class, or its source is not Python that can be read."""


@dataclass(frozen=True, eq=False)
class _Module:
    name: str
    is_package: bool
    classes: dict[str, ast.ClassDef]
    imports: dict[str, str]  # local name -> dotted name

    def dotted(self, name: str) -> str:
        return self.imports.get(name, f"{self.name}.{name}")


@cache
def _module(name: str) -> _Module | None:
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top) if top.isidentifier() else None  # of a top-level name: imports nothing
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    path = Path(spec.origin)
    for part in rest:
        if path.name != "__init__.py" or not part.isidentifier():
            return None
        package = path.parent / part / "__init__.py"
        path = package if package.is_file() else path.parent / f"{part}.py"
        if not path.is_file():
            return None
    is_package = path.name == "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    imports: dict[str, str] = {}
    for item in tree.body:
        if isinstance(item, ast.ImportFrom):
            up = name.split(".")[: len(name.split(".")) - item.level + is_package] if item.level else []
            source = ".".join([*up, *([item.module] if item.module else [])])
            imports |= {alias.asname or alias.name: f"{source}.{alias.name}" for alias in item.names}
        elif isinstance(item, ast.Import):
            imports |= {alias.asname: alias.name for alias in item.names if alias.asname}
    classes = {item.name: item for item in tree.body if isinstance(item, ast.ClassDef)}
    return _Module(name, is_package, classes, imports)


def _find(dotted: str, hops: int = 8) -> tuple[_Module, ast.ClassDef]:
    """The class of that name, followed through the imports of packages."""
    module_name, _, name = dotted.rpartition(".")
    module = _module(module_name) if module_name else None
    if module is None:
        raise _Unreadable(f"there is no module {module_name or dotted}")
    if name in module.classes:
        return module, module.classes[name]
    if name in module.imports and hops:
        return _find(module.imports[name], hops - 1)
    raise _Unreadable(f"{module_name} has no class {name}")


def _is_dataclass(item: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in item.decorator_list)


def _kind(node: ast.expr, module: _Module) -> Any:
    match node:
        case ast.Constant(value=None):
            return Nothing()
        case ast.Constant(value=str() as text):
            return _kind(ast.parse(text, mode="eval").body, module)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            sides = [_kind(left, module), _kind(right, module)]
            return Either(tuple(k for side in sides for k in (side.kinds if isinstance(side, Either) else (side,))))
        case ast.Subscript(value=ast.Name(id="Literal"), slice=words):
            elements = words.elts if isinstance(words, ast.Tuple) else [words]
            return Choice(tuple(ast.literal_eval(word) for word in elements))
        case ast.Subscript(value=ast.Name(id="tuple" | "list"), slice=inside):
            elements = inside.elts if isinstance(inside, ast.Tuple) else [inside]
            kinds = tuple(_kind(e, module) for e in elements if not (isinstance(e, ast.Constant) and e.value is ...))
            return Sequence(kinds, endless=len(kinds) < len(elements) or ast.unparse(node).startswith("list"))
        case ast.Name(id="int" | "float" | "bool" | "str" as name):
            return Scalar({"int": int, "float": float, "bool": bool, "str": str}[name])
        case ast.Name(id=name):
            dotted = module.dotted(name)
            if dotted.startswith(f"{ranges.__name__}."):
                base, extent = get_args(getattr(ranges, name))
                return Scalar(base, extent)
            try:
                found, item = _find(dotted)
            except _Unreadable:
                return Anything()
            return Object(f"{found.name}.{item.name}")
        case _:
            return Anything()


def _own_init(item: ast.ClassDef) -> ast.FunctionDef | None:
    return next((f for f in item.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)


def _literal(node: ast.expr | None) -> object:
    try:
        found = ... if node is None else ast.literal_eval(node)
    except ValueError:
        return ...
    return list(found) if isinstance(found, tuple) else found


@cache
def signature(dotted: str) -> Signature:
    """The signature of the class of that name; raises _Unreadable."""
    module, item = _find(dotted)
    ancestors: list[Signature] = []
    for base in item.bases:
        if isinstance(base, ast.Name):
            try:
                ancestors.append(signature(module.dotted(base.id)))
            except _Unreadable:
                continue  # a class of torch or of the standard library
    parameters: dict[str, Parameter] = {}
    init = _own_init(item)
    if init is not None:
        arguments = [*init.args.posonlyargs, *init.args.args][1:]
        free = len(arguments) - len(init.args.defaults)
        for i, argument in enumerate(arguments):
            kind = _kind(argument.annotation, module) if argument.annotation else Anything()
            parameters[argument.arg] = (
                Parameter(kind, True) if i < free else Parameter(kind, False, _literal(init.args.defaults[i - free]))
            )
        for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
            kind = _kind(argument.annotation, module) if argument.annotation else Anything()
            parameters[argument.arg] = Parameter(kind, default is None, _literal(default))
    else:
        for ancestor in reversed(ancestors):
            parameters |= ancestor.parameters
        if _is_dataclass(item):
            for field in item.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    said = ast.unparse(field.value) if field.value else ""
                    if "ClassVar" not in ast.unparse(field.annotation) and "init=False" not in said:
                        kind = _kind(field.annotation, module)
                        parameters[field.target.id] = Parameter(kind, field.value is None, _literal(field.value))
    name = f"{module.name}.{item.name}"
    lineage = dict.fromkeys([name, *(step for ancestor in ancestors for step in ancestor.lineage)])
    return Signature(name, tuple(lineage), parameters)


def default_of(dotted: str, argument: str) -> object:
    """What a class takes where nothing is said; ... where its source does not say."""
    try:
        return signature(dotted).parameters[argument].default
    except (_Unreadable, KeyError):
        return ...


# -- checking a node ---------------------------------------------------------------------------------------------------


def did_you_mean(word: str, words: Collection[str]) -> str:
    """'; did you mean x?', or what there is."""
    close = get_close_matches(word, words, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return "there is " + ", ".join(sorted(words)) if words else "there is none"


def _line(text: str) -> str:
    """In one line, and without signs that a terminal would act on."""
    return text if text.isprintable() else repr(text)[1:-1]


def target_of(node: object, path: str, trust: Collection[str] = ()) -> Signature:
    """The signature of a node's class; a ConfigError unless it is ours or of a trusted package."""
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(target, str):
        raise ConfigError(f"{path}: a node with _target_ is expected here, not {node!r}")
    if target.partition(".")[0] not in (OWN, *trust):
        raise ConfigError(
            f"{path}._target_ is {_line(target)}: only classes of {OWN} are built, or of a package named by trust=[package]"
        )
    try:
        return signature(target)
    except _Unreadable as error:
        raise ConfigError(f"{path}._target_ is {_line(target)}: {_line(str(error))}") from None


def check(node: object, base: str, path: str, given: Collection[str] = (), trust: Collection[str] = ()) -> list[str]:
    """What is wrong with a node that should become a `base`: one line each, none if it can be built.

    given: names of the arguments that the program itself supplies.
    """
    try:
        found = target_of(node, path, trust)
    except ConfigError as error:
        return [str(error)]
    assert isinstance(node, Mapping)
    root = signature(base)
    if root.name not in found.lineage:
        return [f"{path}._target_ is {node['_target_']}: not a {root.name.rpartition('.')[2]}"]
    return check_values(node, found, path, given, trust)


def check_values(
    node: Mapping[str, object], found: Signature, path: str, given: Collection[str] = (), trust: Collection[str] = ()
) -> list[str]:
    """What is wrong with the values of a node as arguments of a class; path is "" at the root."""
    wrong = []
    free = {name: p for name, p in found.parameters.items() if name not in given}
    short, dot = found.name.rpartition(".")[2], f"{path}." if path else ""
    for key, value in node.items():
        if key == "_target_":
            continue
        if key not in free:
            wrong.append(f"{dot}{key} is not an option of {short}: {did_you_mean(str(key), free)}")
        elif value == "???":
            wrong.append(f"{dot}{key} is missing: write {dot}{key}=... ({free[key].kind})")
        elif (inner := node_of(free[key].kind)) and inner.holds(value):
            wrong += check(value, inner.base, f"{dot}{key}", trust=trust)
        elif not free[key].kind.holds(value):
            wrong.append(f"{dot}{key} is {shown(value)}: it must be {free[key].kind}")
    wrong += [f"{dot}{name} is missing: {short} needs it" for name, p in free.items() if p.required and name not in node]
    return wrong


def shown(value: object) -> str:
    """A value as the command line writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
