"""Loss and gradient of a batch, recorded once as a CUDA graph and repeated: thousands of kernels start as one.

A graph repeats the same kernels on the same memory, so all that differs from step to step has to lie there: the batch is
copied to where the recorded one lay, and draws read their keys from a `Dial`. Whatever else Python decides is repeated as it
was recorded, which `Objective.repeats` allows. What follows, the guard's question and the optimizer, is outside.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from diffusion_cli.data import Batch
from diffusion_cli.devices import Compute
from diffusion_cli.errors import ConfigError
from diffusion_cli.objectives import Tally
from diffusion_cli.randomness import Source

Made = TypeVar("Made")
# makes a function repeatable: what it made, and what makes it again in the same places
Record = Callable[[Callable[[], Made]], tuple[Made, Callable[[], None]]]
STREAMS = 64  # of draws in a step, at most
WARM_UP = 2
ALIKE = 0.05  # how far a repeated loss and gradient may be off: a GPU adds up in any order, and bf16 has 8 bits
FAINT = 1e-3  # of all gradients together: how far one may be off that is almost nothing


class Lessons(NamedTuple):
    """losses [B]; found: the tallies of an objective."""

    losses: Tensor
    found: Mapping[str, Tally]


Work = Callable[[Batch, Source], Lessons]  # adds to the gradients of weights


class Unrepeatable(RuntimeError):
    """A step does something that a recorded one cannot do again."""


class Dial:
    """The keys of a step's draws, int64 [STREAMS] on a device: turned to another step, what reads them draws for that one."""

    def __init__(self, source: Source):
        self.source, self.places, self.closed = source, dict[str, int](), False
        self.keys = torch.zeros(STREAMS, dtype=torch.int64, device=source.slots.device)
        self.host = torch.zeros(STREAMS, dtype=torch.int64, pin_memory=self.keys.is_cuda)

    def turn(self, source: Source) -> None:
        """To the seed and the step of another source."""
        for stream, place in self.places.items():
            self.host[place] = source.key(stream)
        self.keys.copy_(self.host, non_blocking=True)
        self.source = source

    def key(self, stream: str) -> Tensor:
        """[]. Raises Unrepeatable."""
        if stream not in self.places:
            if self.closed or len(self.places) == STREAMS:
                raise Unrepeatable(f"it draws {stream!r} in some steps alone")
            self.places[stream] = len(self.places)
            self.turn(self.source)
        return self.keys[self.places[stream]]


@dataclass(frozen=True)
class Dialled(Source):
    """A source of keys that are read from the dial. Raises Unrepeatable when it is asked for another step."""

    dial: Dial | None = None

    def key(self, stream: str) -> Tensor:
        assert self.dial is not None
        if (self.seed, self.step) != (self.dial.source.seed, self.dial.source.step):
            raise Unrepeatable(f"it draws {stream!r} for a step that it counts itself")
        return self.dial.key(stream)


class Recorded:
    """work: the lessons of a batch, whose gradients it adds to those that the weights have. It is called several times, with
    this batch and source. Raises what work and record raise, and Unrepeatable."""

    def __init__(
        self,
        work: Work,
        weights: Iterable[nn.Parameter],
        batch: Batch,
        source: Source,
        record: Record[Lessons],
    ):
        self.places, self.slots = [None if one is None else one.clone() for one in _tensors(batch)], source.slots.clone()
        self.dial = Dial(source)
        dialled = Dialled(source.seed, self.slots, source.step, self.dial)
        again = lambda: work(Batch(*self.places), dialled)  # type: ignore[arg-type]  # noqa: E731
        again()  # which draws it makes, and which weights have a gradient of it
        self.dial.closed = True
        self.gradients = [(weight, torch.zeros_like(weight)) for weight in weights if weight.grad is not None]
        self._lay()
        self.lessons, self.replay = record(again)

    def fits(self, batch: Batch) -> bool:
        return list(map(_shape, self.places)) == list(map(_shape, _tensors(batch)))

    def __call__(self, batch: Batch, source: Source, first: bool) -> Lessons:
        """Of another batch that fits. first: gradients begin at zero."""
        if first:
            self._lay()
        for place, tensor in zip([*self.places, self.slots], [*_tensors(batch), source.slots], strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor, non_blocking=True)
        self.dial.turn(source)
        self.replay()
        losses, found = self.lessons
        return Lessons(losses.clone(), {name: Tally(*(part.clone() for part in tally)) for name, tally in found.items()})

    def _lay(self) -> None:
        """Zero, where the recorded gradients are added."""
        for weight, gradient in self.gradients:
            weight.grad = gradient
        torch._foreach_zero_([gradient for _, gradient in self.gradients])


def proven(
    work: Work, module: nn.Module, last: tuple[Batch, Source], here: tuple[Batch, Source], seed: int, record: Record[Lessons]
) -> Recorded:
    """Recorded on one batch and source, compared on another with work as it is, seeded alike. The module is left as it was,
    without gradients. Raises Unrepeatable where they differ, and what work and record raise."""
    weights, buffers = [weight for weight in module.parameters() if weight.requires_grad], list(module.buffers())
    before = [buffer.clone() for buffer in buffers]

    def restore() -> None:
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    try:
        made = Recorded(work, weights, *last, record)
        found = []
        for once in (work, lambda batch, source: made(batch, source, first=True)):
            restore()
            torch.manual_seed(seed)
            losses = once(*here).losses
            found.append([losses, *(weight.grad.clone() for weight in weights if weight.grad is not None)])
    finally:
        restore()
    if not _alike(*found):
        raise Unrepeatable("repeated, it is another one")
    return made


def _alike(one: list[Tensor], two: list[Tensor]) -> bool:
    """Losses and gradients of one step, tensor by tensor; what is not finite is so in both, and the guard's."""
    if [tensor.isfinite().all().item() for tensor in one] != [tensor.isfinite().all().item() for tensor in two]:
        return False
    pairs = [(a.float(), b.float()) for a, b in zip(one, two, strict=True) if a.isfinite().all()]
    floor = FAINT * float(nn.utils.get_total_norm([a for a, _ in pairs]))
    return all(float((a - b).norm()) <= ALIKE * float(a.norm()) + floor for a, b in pairs)


def recorder(word: bool | Literal["auto"], compute: Compute, alone: bool) -> Record[Lessons] | None:
    """The word `cuda_graph`. alone: of one process, whose activations are kept. ConfigError: true where there can be none."""
    able = compute.device.type == "cuda" and alone
    if word is True and not able:
        raise ConfigError("cuda_graph=true is for one process on a GPU, and recompute=false: choose cuda_graph=auto")
    return cuda_graph if able and word else None


def cuda_graph(work: Callable[[], Lessons]) -> tuple[Lessons, Callable[[], None]]:
    """On the current device, after some calls on a stream of its own, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # waits for the device, and gives back what memory it can
        made = work()
    return made, graph.replay


_tensors = operator.attrgetter(*(field.name for field in fields(Batch)))


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
