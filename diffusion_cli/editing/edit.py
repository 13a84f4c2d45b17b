"""The edits: what each knows of a picture. How the walk is bound to it is the method's business.

`init` is the picture that is known. A walk that starts from it and not from pure noise (strength below 1) starts from `guess`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as nnf
from torch import Tensor

from diffusion_cli.codecs import Codec, Pixels
from diffusion_cli.editing.known import Blocks, Grey, Known, Operator, Seen
from diffusion_cli.editing.method import Method, Question
from diffusion_cli.editing.original import Original
from diffusion_cli.ranges import Fraction, NonNegativeFloat, PositiveInt
from diffusion_cli.samplers import Noise, Sampler, State
from diffusion_cli.schedules import Schedule


@dataclass(frozen=True)
class Edit(ABC):
    """noise: standard deviation of the noise in what is known, in units in which a picture lies within [-1, 1]; 0: the picture
    that is made agrees with it exactly."""

    original: Original
    method: Method
    noise: NonNegativeFloat = 0.0
    codec: Codec = Pixels()  # noqa: RUF009 (has no state)

    def __post_init__(self) -> None:
        _ = self.known  # what cannot be is said now

    @cached_property
    def pictured(self) -> Known:
        """What is known of the picture."""
        return Known(*self.problem(), self.noise)

    @cached_property
    def known(self) -> Known:
        """The same of what is diffused. Of latents those are known of which all pixels are."""
        if self.codec.bounded:
            return self.pictured
        seen = self.pictured.operator
        if not isinstance(seen, Seen):
            raise ValueError(
                f"{type(self).__name__.lower()} knows means of pixels, and this network works in latents: choose edit=inpaint "
                "or outpaint"
            )
        y = self.start[None]  # [1, c, h, w]
        whole = seen.mask.expand(self.original.size, -1)[None, None].float()
        mask = (1 - nnf.max_pool2d(1 - whole, self.original.size // y.shape[-1]))[0, 0] == 1
        return Known(Seen(mask), torch.where(mask, y, 0), self.noise)

    @property
    def guess(self) -> Tensor:
        """[C, H, W]: the picture of least norm that agrees with what is known."""
        return self.pictured.operator.back(self.pictured.y)[0]

    @cached_property
    def start(self) -> Tensor:
        """[C, H, W]: the guess, as it is diffused."""
        with torch.no_grad():
            return self.codec.encode(self.guess[None].to(self.codec.device))[0].cpu()

    def finished(self, pictures: Tensor) -> Tensor:
        """Pictures [B, C, H, W] that agree with what is known, decoded latents too."""
        if self.codec.bounded or self.noise:
            return pictures
        return self.pictured.to(pictures).agree(pictures)

    def walk(self, question: Question, schedule: Schedule, sampler: Sampler, x: Tensor, noise: Noise) -> Iterator[State]:
        """The bound states from x [B, C, H, W] at the first time of the sampler's grid."""
        for state in self.method.walk(self.known, question, schedule, sampler, x, noise):
            if state.t == 0 and self.noise == 0 and self.codec.bounded:
                x = in_range(self.known.to(x), state.x)
                state = State(state.step, state.t, x, x)
            yield state

    @abstractmethod
    def problem(self) -> tuple[Operator, Tensor]:
        """A, and y [1, ...]. ValueError where the network cannot make such pictures."""


@dataclass(frozen=True)
class Inpaint(Edit):
    """What is white in a mask, or lies in a box, is made anew; the rest stays.

    mask: a picture's file. box: left, upper, right and lower end, in pixels of the picture that is made, or in shares of its
    side where all are at most 1.
    """

    mask: str | None = None
    box: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] | None = None

    def problem(self) -> tuple[Operator, Tensor]:
        size = self.original.size
        if (self.mask is None) == (self.box is None):
            raise ValueError("say what is made anew: mask=mask.png (what is white in it) or box=[0,0.5,1,1] (the lower half)")
        anew = self.original.white() if self.box is None else inside(self.box, size)
        if not anew.any():
            raise ValueError(f"at {size} x {size} pixels nothing is made anew: the mask has no white, or the box is empty")
        seen = Seen(~anew)
        return seen, seen.measure(self.original.pixels(size))

    @property
    def guess(self) -> Tensor:
        """What is to be made anew, too, starts as it was."""
        return self.original.pixels(self.original.size)[0]


@dataclass(frozen=True)
class Outpaint(Edit):
    """The picture is shrunk to `scale` of the side, its surroundings are made. at: where it lies, 0 (left, upper) to 1."""

    scale: Fraction = 0.5
    at: tuple[Fraction, Fraction] = (0.5, 0.5)

    def problem(self) -> tuple[Operator, Tensor]:
        size = self.original.size
        inner = round(size * self.scale)
        if not 0 < inner < size:
            raise ValueError(
                f"scale is {self.scale}: of {size} pixels the picture would fill {inner}, and must some, but not all"
            )
        left, upper = (round((size - inner) * share) for share in self.at)
        mask, y = torch.zeros(size, size, dtype=torch.bool), torch.zeros(1, self.original.channels, size, size)
        mask[upper : upper + inner, left : left + inner] = True
        y[..., upper : upper + inner, left : left + inner] = self.original.pixels(inner)
        return Seen(mask), y

    @property
    def guess(self) -> Tensor:
        """The whole picture lies beneath."""
        operator, y = self.problem()
        return operator.agree(self.original.pixels(self.original.size), y)[0]


@dataclass(frozen=True)
class Colour(Edit):
    """The mean of the three channels is known; the colours are made."""

    def problem(self) -> tuple[Operator, Tensor]:
        if self.original.channels == 1:
            raise ValueError("colour needs a network that makes colours, and this one makes grey pictures")
        grey = Grey(self.original.channels)
        return grey, grey.measure(self.original.pixels(self.original.size))


@dataclass(frozen=True)
class Upscale(Edit):
    """A picture `factor` times smaller is known, whose every pixel is the mean of factor x factor pixels of the one made."""

    factor: PositiveInt = 2

    def problem(self) -> tuple[Operator, Tensor]:
        size = self.original.size
        if size % self.factor or not 1 < self.factor <= size:
            fits = ", ".join(str(k) for k in range(2, size + 1) if size % k == 0)
            raise ValueError(f"factor is {self.factor}: pictures of {size} x {size} pixels can be enlarged by {fits}")
        return Blocks(self.factor), self.original.pixels(size // self.factor)


def in_range(known: Known, x: Tensor) -> Tensor:
    """A picture near x [B, C, H, W] that agrees with y and lies within [-1, 1], by projecting on both in turn: a file clips
    what is outside, and the mean of a block would then be another."""
    for _ in range(40):
        x = known.agree(x.clamp(-1, 1))
    return x


def inside(box: tuple[float, float, float, float], size: int) -> Tensor:
    """bool [size, size]: the pixels in a box of pixels or shares. ValueError where it is turned round or leaves the picture."""
    whole = size if max(box) <= 1 else 1
    left, upper, right, lower = (round(whole * end) for end in box)
    if not (left < right <= size and upper < lower <= size):
        raise ValueError(
            f"box is {list(box)}: left, upper, right, lower is {left}, {upper}, {right}, {lower} of {size} pixels, "
            "and must rise from left to right and from upper to lower within the picture"
        )
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[upper:lower, left:right] = True
    return mask
