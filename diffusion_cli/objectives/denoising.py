"""Training a denoiser: noise a picture to a random time, ask the network, compare with what it should have said.

Labels of a share of the pictures are hidden, as classifier-free guidance needs (Ho and Salimans 2022, algorithm 1). With
self-conditioning (Chen et al. 2022, "Analog bits", section 3.2) a share of the pictures is first foreseen without a hint,
and this x0, taken as given, is the hint of the question that is trained; the other pictures have none.
"""

from collections.abc import Mapping

import torch
from PIL.Image import Image
from torch import Tensor, nn

from diffusion_cli import drawing
from diffusion_cli.data import Batch, Pictures
from diffusion_cli.data.pixels import to_float, to_uint8
from diffusion_cli.data.streaming import mended
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.evaluation.denoising import errors_by_level
from diffusion_cli.guidance import Guidance, Unguided
from diffusion_cli.losses import Loss
from diffusion_cli.objectives.noise_levels import BIN_NAMES, by_noise
from diffusion_cli.objectives.objective import Objective, Tally
from diffusion_cli.randomness import Source
from diffusion_cli.ranges import Fraction
from diffusion_cli.samplers import Sampler, State
from diffusion_cli.schedules import Schedule, over_pictures
from diffusion_cli.walking import walk


class Denoising(Objective):
    """A denoiser with its loss, and the sampler and guidance that preview it.

    taught: the labels that the network is told, none if it is not; previews: pictures in a preview. label_dropout: the share of
    pictures with the null label, each on its own; self_conditioning: the share of pictures with a hint, each on its own.
    ValueError: a guidance of previews that this network cannot have, or a share of hints for a network that takes none.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        loss: Loss,
        sampler: Sampler,
        taught: list[int],
        previews: int,
        guidance: Guidance = Unguided(),  # noqa: B008 (frozen)
        label_dropout: Fraction = 0.1,
        self_conditioning: Fraction = 0.0,
    ):
        super().__init__()
        if guidance.helper() is not None:
            raise ValueError("guidance of previews cannot ask a second model: choose guidance=none, and guide diffusion-sample")
        guidance.check(denoiser, label_dropout > 0)
        self.denoiser = denoiser
        self.criterion = loss
        self.sampler = sampler
        self.taught = taught
        self.previews = previews
        self.guidance = guidance
        self.label_dropout = label_dropout
        self.self_conditioning = self_conditioning

    @property
    def network(self) -> nn.Module:
        return self.denoiser.network

    def loss(self, batch: Batch, source: Source) -> tuple[Tensor, Mapping[str, Tally]]:
        schedule, prediction = self.denoiser.schedule, self.denoiser.prediction
        x0 = batch.x  # [B, C, H, W]
        t, correction = self.criterion.draw(schedule, source)  # [B], [B]
        noise = schedule.noise(source, "noise", x0.shape[1:])
        x, labels = schedule.mix(x0, noise, t), self._labels(batch, source)
        F = self.denoiser.output(x, t, labels, self._hint(x, t, labels, source))
        loss = self.criterion(F, prediction.target(x0, noise, t), t, correction, prediction)  # [B]
        return loss, {"loss_by_noise": by_noise(t, loss.detach())}

    def figure_names(self, tally: str) -> list[str]:
        return BIN_NAMES

    def _labels(self, batch: Batch, source: Source) -> Tensor | None:
        if not self.taught or batch.label is None:
            return None
        dropped = source.uniform("label_dropout") < self.label_dropout
        return torch.where(dropped, self.denoiser.network.num_classes, batch.label)

    def _hint(self, x: Tensor, t: Tensor, labels: Tensor | None, source: Source) -> Tensor | None:
        """[B, C, H, W]: the x0 foreseen without a hint, for some of the pictures; 0 for the others."""
        if self.self_conditioning == 0:
            return None
        given = source.uniform("self_conditioning") < self.self_conditioning  # [B]
        with torch.no_grad():
            foreseen = self.denoiser(x, t, labels)
        # torch before its pull request 165068 (December 2025) would give the question that is trained the weights that were
        # cast here, without gradient.
        torch.clear_autocast_cache()
        return torch.where(given[:, None, None, None], foreseen, 0)

    def preview_labels(self, count: int) -> Tensor | None:
        """Classes in turn, so that each column of a grid is one."""
        if not self.taught:
            return None
        return torch.tensor(self.taught)[torch.arange(count) % len(self.taught)]

    @torch.no_grad()
    def preview(self, pictures: Pictures, source: Source) -> Mapping[str, Image]:
        """`samples`: a grid; `steps`: x_t above the foreseen x0 along the way of the first samples; `denoised`: what one
        question makes of real pictures under rising noise."""
        count = min(self.previews, len(source.slots))
        source = Source(source.seed, source.slots[:count], source.step)
        labels = self.preview_labels(count)
        states = walk(self.denoiser, self.sampler, source, labels, self.guidance)
        wanted = set(drawing.evenly(9, self.sampler.steps + 1))
        kept = [state for state in states if state.step in wanted]
        samples = drawing.grid(to_uint8(kept[-1].x), columns_for(labels))
        return {"samples": samples, "steps": trajectory(kept), "denoised": self._denoised(pictures, source)}

    def _denoised(self, pictures: Pictures, source: Source, columns: int = 10) -> Image:
        schedule, device = self.denoiser.schedule, source.slots.device
        count = min(columns, len(pictures), len(source.slots))
        ids = torch.arange(count)
        x0 = to_float(gather(pictures, ids)).to(device)  # [columns, C, H, W]
        label = pictures.labels[ids].to(device) if self.taught and pictures.labels is not None else None
        t = torch.linspace(1 / count, 1, count, device=device)
        noise = schedule.noise(Source(source.seed, source.slots[:count]), "denoised", x0.shape[1:])
        x = schedule.mix(x0, noise, t)
        named = {"picture": x0, "noised": x / over_pictures(spread(schedule, t), x), "foreseen": self.denoiser(x, t, label)}
        return drawing.rows({name: to_uint8(row) for name, row in named.items()}, [f"t={float(level):.2f}" for level in t])

    @torch.no_grad()
    def evaluate(self, pictures: Pictures, source: Source, batch: int) -> dict[str, float]:
        """Mean squared error of the foreseen x0, kept within [-1, 1], at fixed log_snr, and the mean over them as `x0_mse`.

        It compares networks of any schedule, prediction and loss: all see the same pictures, noise and noise levels.
        """
        device, count = source.slots.device, min(len(pictures), len(source.slots))
        sums: dict[str, Tensor] = {}
        for first in range(0, count, batch):
            ids = torch.arange(first, min(first + batch, count))
            label = pictures.labels[ids].to(device) if self.taught and pictures.labels is not None else None
            ask = lambda x, t, label=label: self.denoiser(x, t, label)  # noqa: E731
            here = Source(source.seed, source.slots[first : first + len(ids)], source.step)
            for name, errors in errors_by_level(ask, self.denoiser.schedule, gather(pictures, ids).to(device), here).items():
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


def trajectory(states: list[State], count: int = 4) -> Image:
    """Rows of x_t and of the foreseen x0 for the first `count` pictures, a column for each of these states."""
    named: dict[str, Tensor] = {}
    for i in range(min(count, len(states[0].x))):
        named[f"{i + 1}  x_t"] = to_uint8(torch.stack([state.x[i] / max(1.0, float(state.x[i].std())) for state in states]))
        named[f"{i + 1}  x0"] = to_uint8(torch.stack([state.x0[i] for state in states]))
    return drawing.rows(named, [f"t={float(state.t):.2f}" for state in states])
