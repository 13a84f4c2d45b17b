"""A step that does not end: a thread counts how long it takes, and has it ended when that is far too long.

A disk that does not answer, a lock, a process that waits for another one: all threads live, nothing happens, and nobody looks.
(A process that stands still as a whole is missed by the others, group.py.) Counted are looks, not seconds: of a program that
was stopped with Ctrl-Z, or on a busy machine, they come late too.
"""

import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK = 0.5  # seconds
LONGER = 10  # times than the step before it: the network may be large and the machine slow


class Watch:
    """A context around each step."""

    def __init__(self) -> None:
        self.passed = 0  # times that a step began or ended: odd within one
        self.over = threading.Event()

    def __enter__(self) -> None:
        self.passed += 1

    def __exit__(self, *raised: object) -> None:
        self.passed += 1

    def look(self, limit: float, hangs: Callable[[], None]) -> None:
        """Calls hangs() when a step takes longer than `limit` seconds and than LONGER times the one before. A thread."""
        seen, looks, before = 0, 0, limit / LOOK  # so the first one, which may compile, gets LONGER times the limit
        while not self.over.wait(LOOK):
            now = self.passed
            if now != seen:
                if now - seen >= 2 + seen % 2:
                    before = 0  # a whole step between two looks
                elif seen % 2:
                    before = looks
                seen, looks = now, 0
            elif now % 2:
                looks += 1
                if looks > max(limit / LOOK, LONGER * before):
                    return hangs()


@contextmanager
def watching(limit: float, hangs: Callable[[], None]) -> Iterator[Watch]:
    """What to put around each step while the block runs."""
    watch = Watch()
    thread = threading.Thread(target=watch.look, args=(limit, hangs), daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()


def stacks() -> str:
    """What every thread of this process does just now."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = ((names.get(number, str(number)), traceback.format_stack(frame)) for number, frame in sys._current_frames().items())
    return "\n".join(f"{name}\n{''.join(lines)}" for name, lines in found)
