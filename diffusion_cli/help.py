"""`--help`: what the command does, commands to copy, every setting, and every group with a line for each option."""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

_COMMENT = re.compile(r"^# (?!@package)(.*)$", re.M)
_SETTING = re.compile(r"^(\s*)([\w]+): *([^#\n]*?) *(?:# (.*))?$")


def text(command: str, primary: Path, about: str, groups: tuple[str, ...], examples: tuple[tuple[str, str], ...]) -> str:
    """The whole page. primary: the YAML file whose settings and defaults are shown; groups: folders beside it."""
    lines = [about, "", "COMMANDS TO COPY", ""]
    width = max(len(example) for example, _ in examples)
    lines += [f"  {example:<{width}}   {meaning}" for example, meaning in examples]
    lines += ["", "SETTINGS (key=value; the value shown is the default)", ""]
    lines += [f"  {key + '=' + value:<34} {meaning}" for key, value, meaning in _settings(primary)]
    chosen = _defaults(primary)
    for group in groups:
        options = list(_options(primary.parent / group))
        if not options:
            continue
        lines += ["", f"{group}=" + (f"  (default: {chosen[group]})" if chosen.get(group) else "")]
        for name, meaning in options:
            lines += textwrap.wrap(f"{name:<16} {meaning}", 118, initial_indent="  ", subsequent_indent=" " * 19)
    lines += [
        "",
        "MORE",
        "",
        f"  {command} --cfg job              the whole config as it would run; add overrides to see what they do",
        f"  {command} -m key=a,b             a sweep: every combination, one run each",
        f'  eval "$({command} -sc install=bash)"    completion of words and values with TAB (also zsh, fish)',
        f"  {command} --config-dir DIR ...   options of your own: DIR/schedule/mine.yaml becomes schedule=mine",
    ]
    return "\n".join(lines)


def _settings(primary: Path) -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of the file's commented settings, nested ones with their full name."""
    inside, started = "", False
    for line in primary.read_text(encoding="utf-8").splitlines():
        found = _SETTING.match(line)
        if line.startswith("defaults:"):
            started = False
        if not found or (line.startswith((" ", "\t")) and not inside):
            continue
        indent, key, value, meaning = found.groups()
        if not indent:
            started = key not in ("defaults", "hydra")
            inside = key if not value else ""
        if started and value:
            yield (f"{inside}.{key}" if indent else key), value.replace("???", ""), meaning or ""


def _defaults(primary: Path) -> dict[str, str]:
    """The option that each group starts with."""
    found = re.findall(r"^  - ([\w/]+): (\w+)$", primary.read_text(encoding="utf-8"), re.M)
    return {group: option for group, option in found if option != "null"}


def _options(folder: Path) -> Iterator[tuple[str, str]]:
    """(option, its first comment) of a group, then of its parts."""
    for path in sorted(folder.glob("*.yaml")):
        comment = _COMMENT.search(path.read_text(encoding="utf-8"))
        yield path.stem, comment[1] if comment else ""
    for part in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []:
        for name, meaning in _options(part):
            yield f"{part.name}: {name}", meaning
