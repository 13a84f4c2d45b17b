"""Which of several processes is gone or hangs, so that none waits for it in a collective for ever.

Each counts up a number in the store where they met, its pulse, and watches that of the next one; whoever ends early says why
there. On such a word, or where a pulse stands still for `patience` seconds, a process ends at once, as after a kill: what was
saved is whole. With its pulse each says how many collectives it has begun: where all pulses go on and a step does not end
(stall.py), that one is meant which began fewer than the others, who wait for it in the next.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from diffusion_cli.distributed import Process
from diffusion_cli.errors import Lost

PULSE = 0.5  # seconds
SHORT = 2.0  # seconds of patience when a collective has broken already


class End(Protocol):
    """Ends the process with that code. silent: another one says why; pid: of one that was given up; hangs: one of them does."""

    def __call__(self, code: int, said: str, silent: bool, pid: int | None = None, hangs: bool = False) -> None: ...


class Pulse:
    """Two threads from here to `over`. store: a dist.Store; gone(rank): the line of a process that is gone."""

    def __init__(self, me: Process, store: Any, patience: float, gone: Callable[[int], str], end: End):
        self.me, self.store, self.patience, self.gone, self.end = me, store, patience, gone, end
        self.over = threading.Event()
        self.after, self.heard, self.rounds, self.pids = (me.rank + 1) % me.world, -1, 0, dict[int, int]()
        store.set(f"pid/{me.rank}", str(os.getpid()))
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._asker = threading.Thread(target=self._ask, args=(store.clone(),), daemon=True)
        self._watcher.start()
        self._asker.start()

    def met(self) -> None:
        """All have come."""
        self.pids = {rank: int(self.store.get(f"pid/{rank}")) for rank in (0, self.after)}

    def word(self, rank: int, code: int, said: str, hangs: bool = False) -> dict[str, Any]:
        """The first word of an end, this or that of another: its rank, code, said and hangs."""
        mine = json.dumps({"rank": rank, "code": code, "said": said, "hangs": hangs})
        first: dict[str, Any] = json.loads(self.store.compare_set("end", "", mine))
        return first

    def behind(self) -> list[int]:
        """Who began the fewest collectives."""
        time.sleep(SHORT)  # for all to have said how many
        at = [int(self.store.get(f"at/{rank}")) for rank in range(self.me.world)]
        return [rank for rank, count in enumerate(at) if count == min(at)]

    def hurry(self) -> None:
        """A collective has broken: waits until it is named who is gone, but not long."""
        self.patience = min(self.patience, SHORT)
        self._watcher.join(self.patience + 4 * PULSE)

    def stop(self) -> None:
        self.over.set()
        self._watcher.join()
        self._asker.join(self.patience)

    def _ask(self, store: dist.Store) -> None:
        """Counts up, and asks how far the next process is and whether one has ended. A thread."""
        me = self.me
        try:
            while not self.over.wait(PULSE):
                store.add(f"pulse/{me.rank}", 1)
                store.set(f"at/{me.rank}", str(_collectives()))
                self.heard = store.add(f"pulse/{self.after}", 0)
                self.rounds += 1
                if store.check(["end"]) and not self.over.is_set():  # over: the word may be of this process, which tells more
                    end = json.loads(store.get("end"))
                    self.end(end["code"], end["said"], silent=True, hangs=end["hangs"])
        except RuntimeError:  # the store is the first one's
            if not self.over.is_set():
                self.end(Lost.code, self.gone(0), silent=me.rank != 1)

    def _watch(self) -> None:
        """Ends the process where the next one stands still, or the store. A thread: a store that hangs does not answer."""
        heard, rounds, looks = self.heard, self.rounds, 0  # looks, not seconds: they come slowly too on a busy machine
        while not self.over.wait(PULSE):
            if self.heard != heard or not dist.is_initialized():  # or not all have come
                heard, rounds, looks = self.heard, self.rounds, 0
                continue
            looks += 1
            if looks * PULSE >= self.patience:
                answers = self.rounds > rounds + 1
                gone = self.after if answers else 0
                said = self.gone(gone)
                if answers:
                    with suppress(RuntimeError):
                        self.word(gone, Lost.code, said)
                self.end(Lost.code, said, silent=not answers and self.me.rank != 1, pid=self.pids.get(gone))


def end_sibling(pid: int) -> None:
    """Kills a process that the same parent started, so that it is of this run and of this machine."""
    with suppress(OSError, ValueError):
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if parent == os.getppid():
            os.kill(pid, signal.SIGKILL)


def _collectives() -> int:
    """How many this process has begun."""
    world: Any = dist.group.WORLD
    return int(world._get_sequence_number_for_group()) if dist.is_initialized() else 0
