"""Training a denoiser: noise a picture to a random time, ask the network, compare with what it should have said.

What is diffused is x0 = encode(picture), the picture itself or its latents. The network is told its label or its caption; of a
share of the pictures it is not, as classifier-free guidance needs (Ho and Salimans 2022, algorithm 1). With
self-conditioning (Chen et al. 2022, "Analog bits", section 3.2) a share of the pictures is first foreseen without a hint,
and this x0, taken as given, is the hint of the question that is trained; the other pictures have none.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from PIL.Image import Image
from torch import Tensor, nn

from diffusion_cli import drawing
from diffusion_cli.codecs import Codec, Pixels
from diffusion_cli.conditioning import Conditioner, short
from diffusion_cli.data import Augment, Batch, Pictures
from diffusion_cli.data.pixels import to_float, to_uint8
from diffusion_cli.data.streaming import mended
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.evaluation.denoising import errors_by_level
from diffusion_cli.guidance import Guidance, Unguided
from diffusion_cli.losses import Loss, Term, Told
from diffusion_cli.objectives.captions import Captions, captions, told_of
from diffusion_cli.objectives.coupling import Coupling
from diffusion_cli.objectives.kept import kept
from diffusion_cli.objectives.method import Lesson, Method, Pairs
from diffusion_cli.objectives.noise_levels import BIN_NAMES, by_noise
from diffusion_cli.objectives.objective import Aside, Objective, Tally
from diffusion_cli.randomness import Source
from diffusion_cli.ranges import Fraction
from diffusion_cli.samplers import Sampler, State
from diffusion_cli.schedules import Schedule, over_pictures
from diffusion_cli.walking import check_walk, pictured, walk

SAMPLES = 4  # of a caption, in a preview


class Denoising(Objective):
    """A denoiser with its loss, and the sampler and guidance that preview it.

    taught: the labels that the network is told, none if it is not; previews: pictures in a preview; codec, texts: the frozen
    parts that it stands on. label_dropout: the share of pictures with the null label or caption, each on its own;
    self_conditioning: the share of pictures with a hint, each on its own; cache: latents and tokens of all pictures are made
    once (kept.py); coupling: of noise and pictures, None for chance; augment: how pictures are moved about; term: added to the
    loss; method, teacher: what is learned instead of the picture itself. ValueError: a guidance of previews or a term that this
    network cannot have, a coupling of texts, augmented latents, a method that cannot train it.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        loss: Loss,
        sampler: Sampler,
        taught: list[int],
        previews: int,
        guidance: Guidance = Unguided(),  # noqa: B008 (frozen)
        codec: Codec = Pixels(),  # noqa: B008 (has no state)
        texts: Conditioner | None = None,
        teacher: Denoiser | None = None,
        label_dropout: Fraction = 0.1,
        self_conditioning: Fraction = 0.0,
        cache: bool = True,
        coupling: Coupling | None = None,
        augment: Augment | None = None,
        term: Term | None = None,
        method: Method | None = None,
    ):
        super().__init__()
        if guidance.helper() is not None:
            raise ValueError("guidance of previews cannot ask a second model: choose guidance=none, and guide diffusion-sample")
        guidance.check(denoiser, label_dropout > 0)
        if augment is not None and codec.digest:
            raise ValueError(
                "objective/augment moves pictures about, and latents are diffused here: leave it out, or the codec"
            )
        if coupling is not None and texts is not None:
            raise ValueError(
                "objective/coupling exchanges noise among pictures of one label, and those with texts have none: leave it out"
            )
        if method is not None:
            method.check(denoiser, loss)
            if self_conditioning:
                raise ValueError("objective.self_conditioning and few steps do not go together: leave one out")
            if augment is not None or term is not None:
                raise ValueError(
                    f"objective/{'term' if augment is None else 'augment'} and few steps do not go together: leave one out"
                )
        self.denoiser = denoiser
        self.criterion = loss
        self.sampler = replace(sampler, clip=sampler.clip and codec.bounded)
        self.taught = taught
        self.previews = previews
        self.guidance = guidance
        self.label_dropout = label_dropout
        self.self_conditioning = self_conditioning
        self.cache = cache
        self.coupling, self.augment, self.term = coupling, augment, term
        self.coupled = coupling is not None or (term is not None and term.coupled)
        if term is not None:
            term.check(denoiser, loss)
        check_walk(denoiser, sampler)
        self.method = method
        self.repeats = coupling is None and method is None
        self._codec, self._texts = Aside(codec), Aside(texts)
        self._teacher = Aside(teacher)
        self._latents: Callable[[Tensor, Tensor | None], Tensor] | None = None  # (ids, mirrored) [B] each
        self._captions: Captions | None = None
        self._pairs: Pairs | None = None
        if texts is not None and not denoiser.null.is_meta:
            denoiser.null.copy_(texts.null())

    @property
    def codec(self) -> Codec:
        return self._codec.module

    @property
    def texts(self) -> Conditioner | None:
        return self._texts.module

    @property
    def example(self) -> str:  # type: ignore[override]
        if self.texts is None:
            return super().example
        return "diffusion-sample ckpt={run} prompt='...' guidance=cfg n=16 seed=1"

    @property
    def network(self) -> nn.Module:
        return self.denoiser.network

    def meet(self, pictures: Pictures, device: torch.device, flip: bool) -> None:
        self.codec.to(device)
        if self._teacher.module is not None:
            self._teacher.module.to(device)
        if self.method is not None:
            self._pairs = self.method.prepared(self._teacher.module, self.taught, self.cache, device)
        if self.texts is not None:
            self._captions = Captions(pictures, self.texts.to(device), self.cache, device)
        if self.cache and self.codec.digest:
            key, count = (self.codec.digest, pictures.fingerprint), len(pictures)
            shape = (count * (2 if flip else 1), *self.codec.shape(*pictures.images.shape[1:3]))

            def make(ids: Tensor) -> Tensor:
                x = to_float(gather(pictures, ids % count)).to(device)  # [B, C, H, W]
                return self.encode(torch.where((ids >= count)[:, None, None, None], x.flip(-1), x))

            rows = kept("latents", key, shape, make, device)
            self._latents = lambda ids, mirrored: rows(ids if mirrored is None else ids + mirrored * count)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """[B, C, H, W] -> what is diffused, [B, c, h, w]."""
        return self.codec.encode(pictures)

    def _x0(self, batch: Batch) -> Tensor:
        """[B, c, h, w]."""
        return self.encode(batch.x) if self._latents is None else self._latents(batch.ids, batch.mirrored)

    def loss(self, batch: Batch, source: Source) -> tuple[Tensor, Mapping[str, Tally]]:
        schedule, prediction = self.denoiser.schedule, self.denoiser.prediction
        x0, moved = self._x0(batch), None  # [B, C, H, W]
        if self.augment is not None:
            x0, moved = self.augment(x0, source)  # moved: [B, 9]
        t, correction = self.criterion.draw(schedule, source)  # [B], [B]
        noise, told = schedule.noise(source, "noise", x0.shape[1:]), self._told(batch, source)
        if self.coupling is not None:
            noise = self.coupling(x0, noise, batch.label if self.taught else None)
        if self.method is not None:
            lesson = Lesson(
                self.denoiser, self.criterion, source, x0, noise, t, correction, told, self._teacher.module, self._pairs
            )
            loss = self.method.loss(lesson)
            return loss, {"loss_by_noise": by_noise(t, loss.detach())}
        x = schedule.mix(x0, noise, t)
        hint = self._hint(x, t, told, moved, source)
        with nullcontext([]) if self.term is None else self.term.listening(self.network) as heard:
            F, v = self.denoiser.output(x, t, told, hint, moved)
        loss = self.criterion(F, prediction.target(x0, noise, t), t, correction, prediction)  # [B]
        tallies = {"loss_by_noise": by_noise(t, loss.detach())}
        if self.term is not None:
            added = self.term(Told(x0, noise, t, correction, F, heard, v), prediction, self.criterion)  # [B]
            loss, tallies["term"] = loss + added, Tally(added.detach().sum(), torch.full_like(t[0], len(t)))
        return loss, tallies

    def figure_names(self, tally: str) -> list[str]:
        return BIN_NAMES

    def _told(self, batch: Batch, source: Source) -> Tensor | None:
        """Labels [B] or tokens [B, L, D], those of a share of the pictures hidden."""
        hidden = source.uniform("label_dropout") < self.label_dropout  # [B]
        if self._captions is not None:
            tokens = self._captions(batch.ids)  # [B, L, D]
            return torch.where(hidden[:, None, None], self.denoiser.null[: tokens.shape[1]], tokens)
        if not self.taught or batch.label is None:
            return None
        return torch.where(hidden, self.denoiser.network.num_classes, batch.label)

    def _hint(self, x: Tensor, t: Tensor, told: Tensor | None, moved: Tensor | None, source: Source) -> Tensor | None:
        """[B, C, H, W]: the x0 foreseen without a hint, for some of the pictures; 0 for the others."""
        if self.self_conditioning == 0:
            return None
        given = source.uniform("self_conditioning") < self.self_conditioning  # [B]
        with torch.no_grad():
            foreseen = self.denoiser(x, t, told, augment=moved)
        # torch before its pull request 165068 (December 2025) would give the question that is trained the weights that were
        # cast here, without gradient.
        torch.clear_autocast_cache()
        return torch.where(given[:, None, None, None], foreseen, 0)

    def of_pictures(self, pictures: Pictures, ids: Tensor) -> Tensor | None:
        """What the network is told of these held-out pictures: labels [B], tokens [B, L, D] or nothing."""
        told = told_of(pictures, ids, self.texts, bool(self.taught))
        return None if told is None else told.to(next(self.parameters()).device)

    @torch.no_grad()
    def preview(self, pictures: Pictures, source: Source) -> Mapping[str, Image]:
        """`samples`: a grid; `steps`: x_t above the foreseen x0 along the way of the first samples; `denoised`: what one
        question makes of real pictures under rising noise."""
        count = min(self.previews, len(source.slots))
        source = Source(source.seed, source.slots[:count], source.step)
        asked, told = self._asked(pictures, count)
        states = walk(self.denoiser, self.sampler, source, told, self.guidance)
        wanted = set(drawing.evenly(9, self.sampler.steps + 1))
        seen = [state for state in states if state.step in wanted]
        samples = to_uint8(self.codec.pictures(seen[-1].x))
        drawn = by_caption(samples, asked) if asked else drawing.grid(samples, columns_for(told))
        steps = trajectory([pictured(state, self.codec, 4) for state in seen])
        return {"samples": drawn, "steps": steps, "denoised": self._denoised(pictures, source)}

    def _asked(self, pictures: Pictures, count: int) -> tuple[list[str], Tensor | None]:
        """The captions of `count` samples and what the network is told: of held-out pictures, some samples for each; or
        classes in turn, so that each column of a grid is one."""
        if self.texts is not None:
            ids = torch.arange(count) // SAMPLES % len(pictures)
            return [captions(pictures)[i] for i in ids.tolist()], self.of_pictures(pictures, ids)
        return [], torch.tensor(self.taught)[torch.arange(count) % len(self.taught)] if self.taught else None

    def _denoised(self, pictures: Pictures, source: Source, columns: int = 10) -> Image:
        schedule, device = self.denoiser.schedule, source.slots.device
        count = min(columns, len(pictures), len(source.slots))
        ids = torch.arange(count)
        picture = to_float(gather(pictures, ids)).to(device)  # [columns, C, H, W]
        x0, told = self.encode(picture), self.of_pictures(pictures, ids)
        t = torch.linspace(1 / count, 1, count, device=device)
        noise = schedule.noise(Source(source.seed, source.slots[:count]), "denoised", x0.shape[1:])
        x = schedule.mix(x0, noise, t)
        noised = self.codec.decode(x / over_pictures(spread(schedule, t), x))
        named = {"picture": picture, "noised": noised, "foreseen": self.codec.decode(self.denoiser(x, t, told))}
        return drawing.rows({name: to_uint8(row) for name, row in named.items()}, [f"t={float(level):.2f}" for level in t])

    @torch.no_grad()
    def evaluate(self, pictures: Pictures, source: Source, batch: int) -> dict[str, float]:
        """Mean squared error of the foreseen x0 at fixed log_snr, and the mean over them as `x0_mse`.

        It compares networks of any schedule, prediction and loss: all see the same pictures, noise and noise levels.
        """
        device, count = source.slots.device, min(len(pictures), len(source.slots))
        sums: dict[str, Tensor] = {}
        for first in range(0, count, batch):
            ids = torch.arange(first, min(first + batch, count))
            told = self.of_pictures(pictures, ids)
            ask = lambda x, t, told=told: self.denoiser(x, t, told)  # noqa: E731
            here = Source(source.seed, source.slots[first : first + len(ids)], source.step)
            images = gather(pictures, ids).to(device)
            found = errors_by_level(ask, self.denoiser.schedule, images, here, self.codec)
            found |= {} if self.method is None else self.method.figures(self.denoiser, here, told)
            for name, errors in found.items():
                sums[name] = sums.get(name, 0) + errors.sum()
        return {name: float(total) / count for name, total in sums.items()}


def gather(pictures: Pictures, ids: Tensor) -> Tensor:
    """uint8 [B, C, H, W] of these numbers, decoded now where the pictures are streamed."""
    if isinstance(pictures.images, Tensor):
        return pictures.images[ids.to(pictures.images.device)]
    return torch.from_numpy(mended(pictures.images, pictures.images.__getitems__(ids.tolist()), {})[0])


def spread(schedule: Schedule, t: Tensor) -> Tensor:
    """What an exploding x_t is divided by to be drawn: 1 where it has about the range of a picture anyway."""
    return torch.sqrt(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2).clamp(min=1)


def columns_for(labels: Tensor | None) -> int | None:
    """Columns of a grid in which labels come in turn: one for each class, as far as a row is not too long."""
    classes = 0 if labels is None else len(labels.unique())
    return classes if 2 <= classes <= 16 else None


def by_caption(samples: Tensor, texts: Sequence[str]) -> Image:
    """A row for each text, which SAMPLES neighbours share."""
    named = {}
    for first in range(0, len(samples), SAMPLES):
        named[f"{first // SAMPLES + 1}  {short(texts[first])}"] = samples[first : first + SAMPLES]
    return drawing.rows(named)


def trajectory(states: list[State]) -> Image:
    """Rows of x_t and of the foreseen x0, pictures both, a column for each of these states."""
    named: dict[str, Tensor] = {}
    for i in range(len(states[0].x)):
        named[f"{i + 1}  x_t"] = to_uint8(torch.stack([state.x[i] for state in states]))
        named[f"{i + 1}  x0"] = to_uint8(torch.stack([state.x0[i] for state in states]))
    return drawing.rows(named, [f"t={float(state.t):.2f}" for state in states])
