"""A model of a disk that loses its power: what POSIX promises of files and folders whose sync has not come back, and no more.

A `Disk` watches a folder through every operation of storage.py. After it, `states` draws what could be found after a power cut
at any moment: data that was not synced is missing, torn, zeroed or there; names that their folder's sync has not reached are
there or not, each for itself.
"""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from diffusion_cli import storage

Change = tuple[tuple[str, int | None], ...]  # names and what they point to from now on, together or not at all


@dataclass
class Thing:
    """A file or a folder. What the disk has for sure, and what happened to it since."""

    folder: bool
    data: bytes = b""
    later: list[bytes] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)


class Disk:
    """Everything that happened below `root`, as a list of events; root itself is on the disk from the start."""

    def __init__(self, root: Path):
        self.root, self.events, self.marks = root, list[tuple[str, int, object]](), list[tuple[int, object]]()
        self._numbers: dict[int, int] = {}  # of inodes: one that is free again is another thing
        self._count = 0
        self._seen: dict[int, dict[str, int] | bytes] = {}
        self._look(False)

    def record(self, work: Callable[[], None]) -> None:
        fsync, replace = os.fsync, os.replace

        def synced(descriptor: int) -> None:
            self._look(False)
            fsync(descriptor)
            self.events.append(("sync", self._numbers[os.fstat(descriptor).st_ino], None))

        def renamed(source: Path, target: Path) -> None:
            self._look(False)
            replace(source, target)
            self._look(True)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "watch", lambda operation, path: self._look(False))
            patch.setattr(os, "fsync", synced)
            patch.setattr(os, "replace", renamed)
            work()
        self._look(False)

    def mark(self, what: object) -> None:
        """Something that must hold from here on, whatever happens."""
        self._look(False)
        self.marks.append((len(self.events), what))

    def _look(self, together: bool) -> None:
        """What changed since the last look; together: by a rename, which is one change."""
        now: dict[int, dict[str, int] | bytes] = {}
        alive: dict[int, int] = {}

        def visit(path: Path) -> int:
            inode = path.stat().st_ino
            number = self._numbers.get(inode)
            if number is None:
                number, self._count = self._count, self._count + 1
            alive[inode] = number
            now[number] = {p.name: visit(p) for p in sorted(path.iterdir())} if path.is_dir() else path.read_bytes()
            return number

        visit(self.root)
        for number, what in now.items():
            if number not in self._seen:
                self.events.append(("new", number, isinstance(what, dict)))
            before = self._seen.get(number, {} if isinstance(what, dict) else b"")
            if isinstance(what, bytes):
                if what != before:
                    self.events.append(("data", number, what))
                continue
            assert isinstance(before, dict)
            self._names(number, before, what, together)
        for number, gone in self._seen.items():
            if number not in now and isinstance(gone, dict):
                self._names(number, gone, {}, False)
        self._seen, self._numbers = now, alive

    def _names(self, number: int, before: dict[str, int], now: dict[str, int], together: bool) -> None:
        changed = tuple((name, now.get(name)) for name in {**before, **now} if before.get(name) != now.get(name))
        for change in [changed] if together and changed else [(one,) for one in changed]:
            self.events.append(("names", number, change))

    def states(self, count: int, rng: random.Random) -> list[tuple[dict[str, bytes | None], list[object]]]:
        """So many states: (files by path, None for a folder; what was marked before), the cuts spread over all events."""
        found = []
        for k in range(count):
            cut = round(k * len(self.events) / (count - 1))
            found.append((self._after_a_cut(cut, rng), [what for place, what in self.marks if place <= cut]))
        return found

    def _after_a_cut(self, cut: int, rng: random.Random) -> dict[str, bytes | None]:
        things = {0: Thing(True)}
        for kind, number, what in self.events[:cut]:
            thing = things.setdefault(number, Thing(bool(what))) if kind == "new" else things[number]
            if kind == "data":
                thing.later.append(what)  # type: ignore[arg-type]
            elif kind == "names":
                thing.changes.append(what)  # type: ignore[arg-type]
            elif kind == "sync":
                thing.data, thing.later = (thing.later or [thing.data])[-1], []
                for change in thing.changes:
                    _apply(thing.names, change)
                thing.changes = []
        share = rng.choice([0.0, 0.5, 1.0])  # of what was not synced: nothing, some of it, all of it is there
        files: dict[str, bytes | None] = {}

        def settle(number: int, path: str) -> None:
            thing = things[number]
            if not thing.folder:
                files[path] = _data(thing, share, rng)
                return
            files[path] = None
            names = dict(thing.names)
            for change in thing.changes:
                if rng.random() < share:
                    _apply(names, change)
            for name, inside in names.items():
                settle(inside, f"{path}/{name}" if path else name)

        settle(0, "")
        return files


def _apply(names: dict[str, int], change: Change) -> None:
    for name, number in change:
        if number is None:
            names.pop(name, None)
        else:
            names[name] = number


def _data(thing: Thing, share: float, rng: random.Random) -> bytes:
    if not thing.later or rng.random() < 0.3 * (1 - share):
        return thing.data
    newest = rng.choice(thing.later)
    torn = newest[: rng.randrange(len(newest) + 1)]
    page = rng.randrange(len(newest) + 1) & ~4095
    holed = newest[:page] + bytes(len(newest[page : page + 4096])) + newest[page + 4096 :]
    return rng.choice([b"", torn, bytes(len(newest)), holed, newest]) if share < 1 else rng.choice([torn, newest, newest])
