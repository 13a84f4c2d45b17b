"""One walk from noise to pictures: a start, a guided question, and a sampler that goes freely or is bound by an edit."""

from collections.abc import Iterator

from torch import Tensor

from diffusion_cli.denoiser import Denoiser
from diffusion_cli.editing import Edit, Free, PureNoise, Start
from diffusion_cli.guidance import Guidance, Unguided
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Sampler, State


def walk(
    denoiser: Denoiser,
    sampler: Sampler,
    source: Source,
    labels: Tensor | None = None,
    guidance: Guidance = Unguided(),  # noqa: B008 (frozen)
    start: Start = PureNoise(),  # noqa: B008
    edit: Edit = Free(),  # noqa: B008
) -> Iterator[State]:
    """The states of the pictures that the slots of source number: picture i depends on its slot and the seed alone.

    labels [B] or None.
    """
    schedule, network = denoiser.schedule, denoiser.network
    shape = (network.channels, network.image_size, network.image_size)

    def fresh(step: int, which: int = 0) -> Tensor:
        return schedule.noise(source.at(step), f"fresh {which}" if which else "fresh", shape)

    ask = guidance.guide(denoiser, None if labels is None else labels.to(source.slots.device))
    return edit.walk(ask, schedule, sampler, start.x(ask, schedule, sampler, source, shape), fresh)
