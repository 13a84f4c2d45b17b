"""Pictures that an evaluation makes for itself: as diffusion-sample makes them, but each label is drawn from the training data,
and each caption from the pictures that the samples are compared with.

Picture i depends on the seed and its number alone, its label too. Repeated draws are further numbers, so they have no picture
in common.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffusion_cli.assembly import Stages
from diffusion_cli.codecs import Codec
from diffusion_cli.conditioning import trimmed
from diffusion_cli.data import Pictures
from diffusion_cli.data.pixels import to_float, to_uint8
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.devices import Compute
from diffusion_cli.evaluation.reconstruction import errors
from diffusion_cli.features import Extractor
from diffusion_cli.guidance import Guidance
from diffusion_cli.objectives.captions import encoded
from diffusion_cli.objectives.denoising import gather
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Sampler, last
from diffusion_cli.walking import walk

DIRECTIONS = 256  # of the sliced Wasserstein distance


@dataclass(frozen=True)
class Samples:
    """shares [K] float64: of each label among the training pictures, cumulated; None where the model is told none. captions:
    of the pictures that stages.texts reads; none where it reads nothing."""

    denoiser: Denoiser
    stages: Stages
    sampler: Sampler
    guidance: Guidance
    helper: nn.Module | None
    shares: Tensor | None
    captions: Sequence[str]
    seed: int
    compute: Compute

    def labels(self, ids: Tensor) -> Tensor | None:
        """[B] for pictures of these numbers."""
        if self.shares is None:
            return None
        drawn = Source(self.seed, ids.cpu()).uniform("label of an evaluation").double()
        return torch.searchsorted(self.shares, drawn, right=True).clamp(max=len(self.shares) - 1)

    def prompts(self, ids: Tensor) -> list[str]:
        """B captions for pictures of these numbers."""
        drawn = Source(self.seed, ids.cpu()).uniform("caption of an evaluation").double() * len(self.captions)
        return [self.captions[int(k)] for k in drawn]

    def told(self, ids: Tensor) -> Tensor | None:
        if self.stages.texts is None or not self.captions:
            return self.labels(ids)
        return trimmed(encoded(self.stages.texts, self.prompts(ids)))

    def pixels(self, ids: Tensor) -> Tensor:
        """uint8 [B, C, H, W] on the device."""
        source = Source(self.seed, ids.to(self.compute.device))
        with torch.inference_mode(), self.compute.precision():
            states = walk(self.denoiser, self.sampler, source, self.told(ids), self.guidance, helper=self.helper)
            return to_uint8(self.stages.codec.pictures(last(states).x))


def shares_of(pictures: Pictures) -> Tensor:
    """[K] float64: the cumulated shares of the labels of pictures."""
    assert pictures.labels is not None
    return torch.bincount(pictures.labels).double().cumsum(0) / len(pictures)


@dataclass(frozen=True)
class Look:
    """What is kept of a picture: its features, and its projections on fixed random directions, as far as they are asked for."""

    extractor: Extractor | None
    directions: Tensor | None  # [C H W, P], unit columns

    @property
    def name(self) -> str | None:
        """Of the features."""
        return None if self.extractor is None else self.extractor.name

    def columns(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [B, C, H, W] -> columns [B, ...] on the host."""
        kept: dict[str, Tensor] = {}
        if self.extractor is not None:
            seen = self.extractor(images)
            kept["features"] = seen.features
            if seen.logits is not None:
                kept["logits"] = seen.logits
        if self.directions is not None:
            kept["projections"] = (to_float(images).flatten(1) @ self.directions).cpu()
        return kept


def directions(pixels: int, device: torch.device) -> Tensor:
    """[pixels, P]: the same on every machine."""
    drawn = Source(0, torch.arange(DIRECTIONS)).normal("directions", (pixels,))
    return (drawn / drawn.norm(dim=1, keepdim=True)).T.contiguous().to(device)


@dataclass
class Calls:
    """Pictures that the denoiser, and the second model of the guidance, were asked about."""

    pictures: dict[str, int] = field(default_factory=lambda: {"nfe": 0, "nfe_helper": 0})


@contextmanager
def counted(denoiser: nn.Module, helper: nn.Module | None) -> Iterator[Calls]:
    """Counts while the block runs: a picture asked about with and without its label counts twice."""
    calls = Calls()

    def count(word: str, x: Tensor) -> None:
        calls.pictures[word] += len(x)

    named = {"nfe": denoiser, **({} if helper is None else {"nfe_helper": helper})}
    handles = [
        model.register_forward_pre_hook(lambda module, given, word=word: count(word, given[0])) for word, model in named.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def rows_of_reconstructions(
    codec: Codec, pictures: Pictures, look: Look, compute: Compute, ids: Tensor
) -> Mapping[str, Tensor]:
    """What an autoencoder gives back of the pictures of these numbers, by the mean of their latents: its errors, and all that
    is kept of it; real_...: the same of the pictures themselves."""
    images = gather(pictures, ids).to(compute.device)  # [B, C, H, W]
    x = to_float(images)
    with torch.no_grad(), compute.precision():
        y = codec.decode(codec.encode(x)).clamp(-1, 1)
    columns = {name: values.cpu() for name, values in errors(x, y).items()} | look.columns(to_uint8(y))
    if pictures.labels is not None:
        columns["labels"] = pictures.labels[ids]
    return columns | {f"real_{name}": values for name, values in look.columns(images).items()}


def rows_of_samples(samples: Samples, look: Look, ids: Tensor) -> Mapping[str, Tensor]:
    """All that is kept of the samples of these numbers; nfe, nfe_helper [B]: calls per picture."""
    with counted(samples.denoiser, samples.helper) as calls:
        images = samples.pixels(ids)
    columns = look.columns(images)
    if samples.captions and look.extractor is not None and look.extractor.read is not None:
        columns["texts"] = look.extractor.read(samples.prompts(ids)).float().cpu()
    labels = samples.labels(ids)
    if labels is not None:
        columns["labels"] = labels
    each = {word: torch.full((len(ids),), count / len(ids)) for word, count in calls.pictures.items()}
    return columns | each
