"""Several processes train one model: each works off its own slots of every batch, and all have the same weights.

    gradient = mean over processes of the gradients of their parts        Li et al. 2020, "PyTorch Distributed", section 3.2

Whatever decides over the way of a run (a step that is skipped, its end, a signal) is made of numbers that all of them have, so
all go the same way. The first one evaluates and writes.

A process that is gone or hangs leaves the others waiting in a collective: pulse.py sees that, and ends them.
"""

import os
import re
import signal
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffusion_cli import storage
from diffusion_cli.data import Batch
from diffusion_cli.distributed import Process, process
from diffusion_cli.errors import Lost, OutOfMemory, StorageError, UserError
from diffusion_cli.objectives import Objective, Tally
from diffusion_cli.pulse import PULSE, Pulse, end_sibling
from diffusion_cli.randomness import Source
from diffusion_cli.ranges import PositiveFloat, PositiveInt
from diffusion_cli.stall import stacks
from diffusion_cli.status import note_failure

LEAVE = 5  # seconds from an error to the end of the process
LONGEST = timedelta(minutes=30)  # that a collective may wait, for a process that lives: the first one may be evaluating
CAUTIOUS = 2  # first steps, in which memory may turn out too small: the second one has the optimizer's state too
_BROKEN = re.compile(r"gloo|nccl|connection|peer|timed out|broken pipe|store", re.IGNORECASE)


@dataclass(frozen=True)
class Distributed(ABC):
    """processes: that the command starts on this machine; None: those that are there; patience: seconds."""

    processes: PositiveInt | None
    patience: PositiveFloat

    @abstractmethod
    def several(self, me: Process) -> "Several":
        """This process among the others."""

    @contextmanager
    def joined(self) -> Iterator["Group"]:
        """The group of all processes for as long as the block runs. What ends the block early ends all of them."""
        me = process()
        group = Group(me) if me.world == 1 else self.several(me)
        try:
            yield group
        except BaseException as error:
            group.broken(error)
            raise
        group.part()


class DDP(Distributed):
    """All that is trained is on every process."""

    def several(self, me: Process) -> "Several":
        return Several(me, self.patience)


class Group:
    """One process alone, for which nothing is to be agreed upon. step: where training is, for messages; folder: of the
    run, once it is written; watch: around each step."""

    def __init__(self, me: Process = Process()):  # noqa: B008 (frozen)
        self.me = me
        self.step = 0
        self.folder: Path | None = None
        self.watch: AbstractContextManager[object] = nullcontext()
        self.speaking = threading.Lock()  # who writes how the run ended

    def decide(self, number: int, *words: bool) -> tuple[int, ...]:
        """The largest number of all, and the words of the first process."""
        return (number, *words)

    def same(self, what: str, number: int) -> None:
        """StorageError where not all processes have this number."""

    def lacking(self, reason: str) -> str:
        """Why memory was too small in a step, here or elsewhere; "" where it was not."""
        return reason

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process runs the block, then the others: what it fetched or made they find there."""
        yield

    def share(self, objective: Objective, averages: Sequence[Objective], device: torch.device) -> None:
        """All go to the device. From now on these gradients are those of all."""
        self.objective: nn.Module = Loss(objective.to(device))
        for average in averages:
            average.to(device)

    def compile(self, network: nn.Module) -> None:
        """Before it is shared."""
        network.compile()

    def loss(self, batch: Batch, source: Source) -> tuple[Tensor, dict[str, Tally]]:
        """As the objective's; its gradients will be averaged over the processes, but for those within `apart`."""
        found: tuple[Tensor, dict[str, Tally]] = self.objective(batch, source)
        return found

    def apart(self, last: bool) -> AbstractContextManager[object]:
        """Around loss and backward of a part: without communication but for the last."""
        return nullcontext()

    def average(self, weights: list[nn.Parameter]) -> None:
        """After the last part, if it was done without communication."""

    def total(self, tensors: list[Tensor]) -> list[Tensor]:
        """Sums over all processes."""
        return tensors

    def norm(self, tensors: list[Tensor]) -> Tensor:
        """[] of all of them as one vector."""
        return nn.utils.get_total_norm(tensors)

    def clip(self, weights: list[nn.Parameter], largest: float) -> Tensor:
        """Shortens the gradient to that norm; the norm [] that it had."""
        return nn.utils.clip_grad_norm_(weights, largest)

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of what the processes hold parts of: for the first one, none for the others."""
        return tensors

    def own(self, tensor: Tensor, like: Tensor | None) -> Tensor:
        """What this process holds of a whole tensor, as it does of `like`."""
        return tensor

    @contextmanager
    def judged(self, average: Objective, wanted: bool) -> Iterator[Objective]:
        """The average as the first process can ask it, where all want that."""
        yield average

    def part(self) -> None:
        """The end that all come to: from here each goes on alone."""

    def broken(self, error: BaseException) -> None:
        """The end that this process came to, of which the others learn. May not come back."""

    def hangs(self) -> None:
        """A step does not end: says so and where, and ends the process. A thread."""
        self._end(Lost.code, self._hanging(f"step {self.step:,} hangs", self.me.rank), silent=False, hangs=True)

    def _hanging(self, what: str, rank: int) -> str:
        return f"{what}: the same command goes on; what its threads did is in {self._stacks(rank)}"

    def _stacks(self, rank: int) -> Path:
        assert self.folder is not None, "steps are in a run"
        return self.folder / f"stalled_{rank}.txt"

    def _gone(self, rank: int) -> str:
        return f"rank {rank} of {self.me.world} is gone or hangs, at step {self.step:,}: the same command goes on"

    def _end(self, code: int, said: str, silent: bool, pid: int | None = None, hangs: bool = False) -> None:
        """Ends the process. silent: another one says why; pid: of a process that was given up; hangs: this one or another,
        and each leaves what its threads do."""
        if hangs:
            with suppress(StorageError):
                storage.write(self._stacks(self.me.rank), stacks().encode())
        if not silent:
            print(f"diffusion-train: {said}", file=sys.stderr, flush=True)
        if self.me.world > 1:
            time.sleep(2 * PULSE)  # for who spoke, and for all to read it
        speaks = self.me.first or (self.me.rank == 1 and said.startswith(self._gone(0).partition(",")[0]))
        if self.folder is not None and speaks:
            with suppress(StorageError):
                self.speaking.acquire()  # for good: the last word, where the other thread noted what broke by this
                note_failure(self.folder, said, "preempted" if code > 128 else "failed", code=code)
        if pid is not None:  # else torchrun would wait half a minute for one that is stopped
            end_sibling(pid)
        os._exit(code)


class Loss(nn.Module):
    """loss() as forward(), around which processes work together."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch, source: Source) -> tuple[Tensor, dict[str, Tally]]:
        loss, tallies = self.objective.loss(batch, source)
        return loss, dict(tallies)


class Several(Group):
    """One of several processes."""

    def __init__(self, me: Process, patience: float):
        super().__init__(me)
        self.steps = 0  # that were cautious
        self.turn = 0
        self.store, _, _ = next(dist.rendezvous("env://", me.rank, me.world))
        self.pulse = Pulse(me, self.store, patience, self._gone, self._end)
        backend = "gloo"
        if me.local < torch.cuda.device_count():
            torch.cuda.set_device(me.local)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(
            backend, store=dist.PrefixStore("run", self.store), rank=me.rank, world_size=me.world, timeout=LONGEST
        )
        self.pulse.met()

    # -- agreement -----------------------------------------------------------------------------------------------------

    def _all(self, *numbers: int) -> list[list[int]]:
        """The numbers of every process."""
        mine = torch.tensor(numbers)
        rows = [torch.empty_like(mine) for _ in range(self.me.world)]
        dist.all_gather(rows, mine)
        return [row.tolist() for row in rows]

    def decide(self, number: int, *words: bool) -> tuple[int, ...]:
        rows = self._all(number, *words)
        return (max(row[0] for row in rows), *rows[0][1:])

    def same(self, what: str, number: int) -> None:
        numbers = [row[0] for row in self._all(number)]
        if len(set(numbers)) > 1:
            raise StorageError(f"{what} is not the same for all processes, {numbers} by rank: do all see the same files?")

    @property
    def cautious(self) -> bool:
        return self.steps < CAUTIOUS

    def lacking(self, reason: str) -> str:
        if self.cautious:
            lacking = [rank for rank, (flag,) in enumerate(self._all(bool(reason))) if flag]
            return reason or (f"rank {lacking[0]}" if lacking else "")
        if reason:  # the others wait in the midst of the step, so it cannot be done again
            raise OutOfMemory(f"out of memory ({reason}): try a larger trainer.accumulate; the same command goes on")
        return ""

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        self.turn += 1
        key = f"turn/{self.turn}"
        while not self.me.first and not self.store.check([key]):
            time.sleep(PULSE / 10)
        yield
        if self.me.first:
            self.store.set(key, "over")

    # -- gradients -----------------------------------------------------------------------------------------------------

    def share(self, objective: Objective, averages: Sequence[Objective], device: torch.device) -> None:
        super().share(objective, averages, device)
        for tensor in objective.state_dict().values():
            dist.broadcast(tensor, 0)

    def apart(self, last: bool) -> AbstractContextManager[object]:
        ddp = self.objective
        return ddp.no_sync() if isinstance(ddp, nn.parallel.DistributedDataParallel) and not last else nullcontext()

    def average(self, weights: list[nn.Parameter]) -> None:
        if not self.cautious:
            return
        grads = [weight.grad for weight in weights if weight.grad is not None]
        for grad, total in zip(grads, self.total(grads), strict=True):
            grad.copy_(total / self.me.world)
        self.steps += 1
        if not self.cautious:
            # what a loss changes besides gradients is made of the whole batch (collectives.py): buffers need not be sent
            with warnings.catch_warnings():  # torch 2.13 renames an argument
                warnings.simplefilter("ignore", FutureWarning)
                self.objective = nn.parallel.DistributedDataParallel(
                    self.objective, broadcast_buffers=False, find_unused_parameters=len(grads) < len(weights)
                )

    def total(self, tensors: list[Tensor]) -> list[Tensor]:
        if not tensors:
            return tensors
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        return [part.view_as(tensor) for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]

    # -- ends ----------------------------------------------------------------------------------------------------------

    def part(self) -> None:
        if not self.pulse.over.is_set():
            self._all(0)
            self.pulse.stop()
            # gloo's destructor and its own threads may miss each other right after a collective, and wait for ever (torch 2.13)
            time.sleep(PULSE)
            closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
            closing.start()
            closing.join(self.pulse.patience)

    def broken(self, error: BaseException) -> None:
        if self.pulse.over.is_set():
            return
        for number in (signal.SIGTERM, signal.SIGINT):  # of who sees that another has ended: no news
            signal.signal(number, signal.SIG_IGN)
        if _is_broken(error):  # by the end of another
            self.pulse.hurry()
        code = getattr(error, "code", 1)
        said = str(error) or type(error).__name__
        where = f"rank {self.me.rank} of {self.me.world}, step {self.step:,}"
        self.pulse.over.set()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LEAVE)  # the interpreter's end may wait for gloo's threads for ever, and torchrun for that half a minute
        with suppress(RuntimeError):
            first = self.pulse.word(self.me.rank, code, f"{where}: {said}")
            time.sleep(2 * PULSE)  # for all to read it, where the store ends with this process
            if first["rank"] != self.me.rank:  # who has spoken
                raise SystemExit(first["code"])
        if isinstance(error, UserError) and (self.me.rank or self.step):
            error.args = (f"{where}: {said}",)
        elif not isinstance(error, UserError):
            error.add_note(where)

    def hangs(self) -> None:
        behind, world = self.pulse.behind(), self.me.world
        who = f"rank {behind[0]} of {world} hangs" if len(behind) == 1 else f"all {world} processes hang"
        said = self._hanging(f"{who}, at step {self.step:,}", behind[0])
        first = self.pulse.word(self.me.rank, Lost.code, said, hangs=True)
        self._end(first["code"], first["said"], silent=first["rank"] != self.me.rank, hangs=first["hangs"])


def _is_broken(error: BaseException | None) -> bool:
    """Whether a collective found another process gone, just now or before what came of it."""
    if error is None or isinstance(error, UserError):
        return False
    return (isinstance(error, RuntimeError) and bool(_BROKEN.search(str(error)))) or _is_broken(error.__context__)
