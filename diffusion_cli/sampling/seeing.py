"""Looking at walks: what a sampler had in hand, x_t, beside what it foresaw, x0.

    trajectory.png   rows of both for a few pictures, a column for each of nine states evenly spread over the walk
    trajectory.gif   both side by side, up to forty states (or .webp)
    snapshots.png    for each of the asked steps x_t, x0, and |x0 - the finished picture|: what is still to change

x_t is divided by its spread where that is above 1, so that an exploding process is drawn in the range of a picture.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from diffusion_cli import drawing, storage
from diffusion_cli.codecs import Codec
from diffusion_cli.data.pixels import to_uint8
from diffusion_cli.errors import ConfigError
from diffusion_cli.samplers import State
from diffusion_cli.settings import Sample
from diffusion_cli.walking import pictured

FRAMES = 40  # of an animation at most
COLUMNS, ROWS = 9, 4  # of the strip: states, pictures
SEEN = 16  # pictures that are watched: a square of the animation
ABREAST = 8  # pictures of a sheet of snapshots


class Seen(NamedTuple):
    """A state as it is drawn: x, x0 uint8 [<= SEEN, C, H, W]."""

    step: int
    t: float
    x: Tensor
    x0: Tensor

    @staticmethod
    def of(state: State, codec: Codec) -> "Seen":
        shown = pictured(state, codec, SEEN)
        return Seen(state.step, float(state.t), to_uint8(shown.x).cpu(), to_uint8(shown.x0).cpu())


@dataclass
class Film:
    """Keeps what is to be drawn of one walk, however long it turns out to be.

    moving: the form of the animation, None for no trajectory; steps: the snapshots asked for.
    """

    moving: str | None = None
    steps: tuple[int, ...] = ()
    frames: list[Seen] = field(default_factory=list)  # every stride-th state, at most 2 FRAMES
    stride: int = 1
    shots: dict[int, Seen] = field(default_factory=dict)
    last: Seen | None = None
    count: int = 0

    @staticmethod
    def of(settings: Sample, length: int | None) -> "Film":
        """length: moves of the walk, None where it is not known. Raises ConfigError for a step that there is not."""
        film = Film(settings.animation if settings.trajectory else None, settings.snapshots)
        if length is not None:
            film._refuse([step for step in film.steps if step > length], length)
        return film

    @property
    def wanted(self) -> bool:
        return self.moving is not None or bool(self.steps)

    def see(self, state: State, codec: Codec) -> None:
        """The next state of the walk: frames are thinned to every second one whenever there are too many."""
        if not self.wanted:
            return
        self.last = seen = Seen.of(state, codec)
        if self.moving is not None and self.count % self.stride == 0:
            self.frames.append(seen)
            if len(self.frames) > 2 * FRAMES:
                self.frames, self.stride = self.frames[::2], 2 * self.stride
        if state.step in self.steps:
            self.shots[state.step] = seen
        self.count += 1

    def draw(self, folder: Path) -> None:
        """Writes what was asked for. Raises ConfigError where a step never came."""
        if self.last is None:
            return
        self._refuse([step for step in self.steps if step not in self.shots], self.last.step)
        if self.moving is not None:
            frames = self.frames if self.frames[-1] is self.last else [*self.frames, self.last]
            few = [frames[i] for i in drawing.evenly(COLUMNS, len(frames))]
            many = [frames[i] for i in drawing.evenly(FRAMES, len(frames))]
            storage.write(folder / "trajectory.png", drawing.png(strip(few)))
            animation = drawing.ANIMATIONS[self.moving]([beside(seen) for seen in many])
            storage.write(folder / f"trajectory.{self.moving}", animation)
        if self.steps:
            shots = [self.shots[step] for step in dict.fromkeys(self.steps)]
            storage.write(folder / "snapshots.png", drawing.png(sheet(shots, self.last)))

    def _refuse(self, missing: list[int], length: int) -> None:
        if missing:
            raise ConfigError(f"snapshots={list(self.steps)}: this walk has steps 0 to {length}, no {missing[0]}")


def strip(states: list[Seen]) -> Image.Image:
    """Rows of x_t and of the foreseen x0 for the first pictures, a column for each of these states."""
    named: dict[str, Tensor] = {}
    for i in range(min(ROWS, len(states[0].x))):
        named[f"{i + 1}  x_t"] = torch.stack([seen.x[i] for seen in states])
        named[f"{i + 1}  x0"] = torch.stack([seen.x0[i] for seen in states])
    return drawing.rows(named, [f"t={seen.t:.2f}" for seen in states])


def beside(seen: Seen) -> Image.Image:
    """x_t at the left, the foreseen x0 at the right."""
    left, right = drawing.grid(seen.x).convert("RGB"), drawing.grid(seen.x0).convert("RGB")
    frame = Image.new("RGB", (left.width + right.width + 16, left.height), (255, 255, 255))
    frame.paste(left, (0, 0))
    frame.paste(right, (left.width + 16, 0))
    return frame


def sheet(shots: list[Seen], last: Seen) -> Image.Image:
    """Three rows for each snapshot: x_t, x0, and how far x0 is from the finished picture (white: from end to end)."""
    named: dict[str, Tensor] = {}
    for shot in shots:
        name = f"step {shot.step}, t={shot.t:.2f}"
        away = (shot.x0.int() - last.x.int()).abs().to(torch.uint8)
        named |= {f"{name}: x_t": shot.x[:ABREAST], f"{name}: x0": shot.x0[:ABREAST], f"{name}: to change": away[:ABREAST]}
    return drawing.rows(named, [f"{i + 1}" for i in range(min(ABREAST, len(last.x)))])
