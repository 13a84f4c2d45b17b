"""One walk from noise to pictures: a start, a guided question, and a sampler that goes freely or is bound by an edit."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffusion_cli.codecs import Codec
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.editing import Edit, PureNoise, Question, Start
from diffusion_cli.guidance import Guidance, Guided, Unguided
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Denoise, Sampler, State, Varied
from diffusion_cli.schedules import over_pictures


def walk(
    denoiser: Denoiser,
    sampler: Sampler,
    source: Source,
    told: Tensor | None = None,
    guidance: Guidance = Unguided(),  # noqa: B008 (frozen)
    start: Start = PureNoise(),  # noqa: B008
    edit: Edit | None = None,
    helper: nn.Module | None = None,
    shares: Tensor | None = None,
    untold: Tensor | None = None,
) -> Iterator[State]:
    """The states of the pictures that the slots of source number: picture i depends on its slot and the seed alone.

    told: labels [B], tokens [B, L, D] or None; [B, K] or [B, K, L, D] for pictures between K of them, with shares [B, K] of
    each. untold: tokens [L, D] of a text that guidance leads away from; None: the null condition. helper: the second model of
    the guidance, if it needs one.
    """
    schedule, network = denoiser.schedule, denoiser.network
    shape = (network.channels, network.image_size, network.image_size)

    def fresh(step: int, which: int = 0) -> Tensor:
        return schedule.noise(source.at(step), f"fresh {which}" if which else "fresh", shape)

    told = None if told is None else told.to(source.slots.device)
    denoiser = denoiser.leading(sampler.goal(schedule))
    said = [torch.zeros(1, 1, 1, 1, device=source.slots.device)]  # v with the last answer; before any, the posterior's own
    if sampler.varied:
        denoiser = denoiser.noting(lambda v: said.__setitem__(0, v))
    question = asking(denoiser, told, guidance, helper, shares, untold)
    x = start.x(schedule, sampler, source, shape)
    if edit is None:
        # where guidance asked two things at once, the first half is what is told
        ask = Varied(question(), lambda: said[0][: len(x)]) if sampler.varied else question()
        return sampler.walk(ask, schedule, x, fresh)
    return edit.walk(question, schedule, sampler, x, fresh)


def check_walk(denoiser: Denoiser, sampler: Sampler, bound: bool = False) -> None:
    """ValueError for learned variances where there are none. bound: by an edit, or between labels."""
    if sampler.varied and not denoiser.network.variance_channels:
        raise ValueError(
            "sampler.variance=learned: this network has learned none, as one trained with objective/term=hybrid has: choose "
            "sampler.variance=small or large"
        )
    if sampler.varied and bound:
        raise ValueError(
            "sampler.variance=learned is of a free walk: with an edit, or between labels, choose sampler.variance=small"
        )


def asking(
    denoiser: Denoiser,
    told: Tensor | None,
    guidance: Guidance,
    helper: nn.Module | None,
    shares: Tensor | None = None,
    untold: Tensor | None = None,
) -> Question:
    """Gives a new question each time: what guidance and hint remember belongs to one way through the times.

    Between conditions told [B, K, ...] the answer lies between those for each: x0 = sum_k shares[:, k] x0(x, t | told[:, k]).
    """

    def guided(told: Tensor | None) -> Denoise:
        cond = None if told is None else denoiser.condition(told, untold)
        return remembering(guidance.guide(denoiser, cond, helper))

    if shares is None:
        return lambda: guided(told)
    assert told is not None

    def question() -> Denoise:
        asks, parts = [guided(each) for each in told.unbind(1)], shares.unbind(1)
        return lambda x, t: sum(
            (over_pictures(part, x) * ask(x, t) for part, ask in zip(parts, asks, strict=True)), start=torch.zeros_like(x)
        )

    return question


def pictured(state: State, codec: Codec, count: int) -> State:
    """The first `count` of it as pictures, an x that explodes brought to the range of one."""
    x, x0 = state.x[:count].float(), state.x0[:count].float()
    spread = x.flatten(1).std(1).clamp(min=1)
    return State(state.step, state.t, codec.decode(x / over_pictures(spread, x)), codec.decode(x0))


def remembering(guided: Guided) -> Denoise:
    """The sampler's question, in which each answer is the hint of the next one (self-conditioning, Chen et al. 2022).

    Whatever the sampler asks counts: of two questions of one step, the second has the first's answer for a hint.
    """
    before: Tensor | None = None

    def ask(x: Tensor, t: Tensor) -> Tensor:
        nonlocal before
        x0 = guided(x, t, before)
        before = x0.detach()
        return x0

    return ask
