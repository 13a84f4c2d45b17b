"""Where the walks of a question begin and what binds them: the words init, strength, vary, between and the group edit."""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_cli.assembly import Facts
from diffusion_cli.build import build
from diffusion_cli.codecs import Codec
from diffusion_cli.data.decoding import Unreadable, decode
from diffusion_cli.editing import Between, Edit, FromPicture, Original, PureNoise, Start, Varied, adds_noise
from diffusion_cli.errors import ConfigError, DataError
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Sampler, Tail
from diffusion_cli.schedules import Schedule
from diffusion_cli.settings import Request

# x0 [K, C, H, W] and the numbers of what they are told -> the noises [K, C, H, W] of unit scale that the sampler makes them of
Invert = Callable[[Tensor, list[int] | None], Tensor]


@dataclass(frozen=True)
class Space:
    """Where a walk goes: codec: between pictures and it; shape: of one point [C, H, W]."""

    codec: Codec
    shape: tuple[int, int, int]

    def of(self, original: Original) -> Tensor:
        """[1, *shape]: the point of a picture."""
        with torch.no_grad():
            picture = original.pixels(original.size)
            return self.codec.encode(picture.to(self.codec.device)).cpu()


@dataclass(frozen=True)
class Beginning:
    """classes: of the pictures, in turn; None: they are told nothing, or of the corners that they lie between. corners: the
    numbers of those. asked: the question in words, with the digests of the files that were given."""

    start: Start
    edit: Edit | None
    sampler: Sampler
    classes: list[int] | None
    corners: list[int] | None
    asked: Mapping[str, Any]


def beginning(
    request: Request,
    facts: Facts,
    space: Space,
    schedule: Schedule,
    sampler: Sampler,
    classes: list[int] | None,
    invert: Invert,
) -> Beginning:
    """classes: the numbers of what pictures are told in turn, where they are told anything. Raises UserError."""
    settings = request.root
    asked = {"init": None, "strength": None, "vary": None, "between": None, "edit": None}
    free = Beginning(PureNoise(), None, sampler, classes, None, asked)
    if settings.between is not None:
        return _between(request, facts, space, schedule, free, invert)
    if settings.init is None:
        return free
    original = Original(_encoded(settings.init, "init"), None, facts["channels"], facts["image_size"])
    asked["init"] = digest(original.picture)
    if settings.vary is not None:
        return _varied(request, space.of(original), schedule, free, invert)
    if request.edit is None:
        return _noised(free, space.of(original)[0], 0.5 if settings.strength is None else settings.strength)
    edit, node = _edit(request.edit, original, space.codec, settings.trust)
    edit.method.check(sampler)
    bound = replace(free, edit=edit, asked={**asked, "edit": node})
    return bound if settings.strength is None else _noised(bound, edit.start, settings.strength)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _noised(free: Beginning, picture: Tensor, strength: float) -> Beginning:
    """SDEdit: from x0 [C, H, W], noised up to the time `strength`."""
    sampler = replace(free.sampler, grid=Tail(free.sampler.grid, strength))
    return replace(free, start=FromPicture(picture), sampler=sampler, asked={**free.asked, "strength": strength})


def _edit(node: Mapping[str, Any], original: Original, codec: Codec, trust: Collection[str]) -> tuple[Edit, dict[str, Any]]:
    """The edit, and its words with the digest of its mask."""
    mask = node.get("mask")
    if mask is not None:
        original = replace(original, mask=_encoded(mask, "edit.mask"))
        assert original.mask is not None
        node = {**node, "mask": digest(original.mask)}
    return build(node, Edit, "edit", {"original": original, "codec": codec}, trust), dict(node)


def _varied(request: Request, x0: Tensor, schedule: Schedule, free: Beginning, invert: Invert) -> Beginning:
    share = request.root.vary
    assert share is not None
    _check_circle("vary", schedule, free.sampler)
    classes = free.classes if request.root.tells else None
    if classes is not None and len(classes) > 1:
        raise ConfigError("vary needs what the picture shows: one label= or prompt=, or none")
    _check_way_back("vary", schedule, free.sampler)
    start = Varied(invert(x0, classes)[0], share)
    return replace(free, start=start, classes=classes, asked={**free.asked, "vary": share})


def _between(request: Request, facts: Facts, space: Space, schedule: Schedule, free: Beginning, invert: Invert) -> Beginning:
    settings = request.root
    assert settings.between is not None
    _check_circle("between", schedule, free.sampler)
    numbers = [end for end in settings.between if isinstance(end, int)]
    if numbers:
        ends = schedule.noise(Source(settings.seed, torch.tensor(numbers)), "start", space.shape)
        labels = None if free.classes is None else [free.classes[k % len(free.classes)] for k in numbers]
        if labels is not None and settings.label is None and settings.tells:
            labels = _each(free.classes or [], len(numbers))  # of prompts each end has its own
        said: list[Any] = numbers
    else:
        _check_way_back("between", schedule, free.sampler)
        files = [_encoded(str(end), "between") for end in settings.between]
        labels = None if not settings.tells or free.classes is None else _each(free.classes, len(files))
        points = [space.of(Original(file, None, facts["channels"], facts["image_size"])) for file in files]
        ends = invert(torch.cat(points), labels)
        said = [digest(file) for file in files]
    one = labels is None or len(set(labels)) == 1  # then no picture lies between labels
    return replace(
        free,
        start=Between(ends, settings.n),
        classes=labels[:1] if labels and one else None,
        corners=None if one else labels,
        asked={**free.asked, "between": {"ends": said, "n": settings.n}},
    )


def _check_way_back(word: str, schedule: Schedule, sampler: Sampler) -> None:
    """ConfigError where the noise of a picture cannot be found."""
    if sampler.length(schedule) is None:
        raise ConfigError(
            f"{word} walks a picture back to its noise, and {type(sampler).__name__} chooses its steps as it goes: choose "
            "a sampler whose steps are fixed, as heun or ddim"
        )


def _each(classes: list[int], ends: int) -> list[int]:
    """The label of each end, of one for all or one for each."""
    if len(classes) not in (1, ends):
        raise ConfigError(
            f"between has {ends} ends, and label or prompt {len(classes)}: give one for each, one for all, or none"
        )
    return classes * (ends // len(classes))


def _check_circle(word: str, schedule: Schedule, sampler: Sampler) -> None:
    """ConfigError unless pictures are made of their first noise alone, and that is Gaussian."""
    if not schedule.gaussian:
        name = type(schedule).__name__.lower()
        raise ConfigError(
            f"{word} goes on great circles between Gaussian noises, and the noise of schedule={name} is not Gaussian"
        )
    if adds_noise(sampler, schedule):
        raise ConfigError(
            f"{word} needs a sampler that adds no noise on its way, and {type(sampler).__name__} does here: "
            "choose sampler=heun, or ddim with sampler.eta=0"
        )


def _encoded(path: str, word: str) -> bytes:
    """A picture's file, seen to be readable. Raises DataError."""
    try:
        encoded = Path(path).expanduser().read_bytes()
        decode(encoded, size=1, channels=1, resize="crop")
    except (OSError, Unreadable) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{word}={path} cannot be read as a picture: {reason}") from None
    return encoded
