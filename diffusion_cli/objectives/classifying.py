"""Training a classifier of noised pictures, which can guide a denoiser: cross-entropy of p(y | x_t) at random times.

    L = E_t [ -log p(y | x_t) ]

Dhariwal and Nichol 2021, "Diffusion models beat GANs on image synthesis", section 4.1. Of a process only the schedule and
the loss's choice of times matter: prediction, norm, weight, sampler and guidance have no meaning here.
"""

from collections.abc import Mapping

import torch
from PIL.Image import Image
from torch import Tensor, nn

from diffusion_cli import drawing
from diffusion_cli.data import Batch, Pictures
from diffusion_cli.data.pixels import to_float, to_uint8
from diffusion_cli.evaluation.denoising import LEVELS
from diffusion_cli.losses import Times
from diffusion_cli.noisy_classifier import NoisyClassifier
from diffusion_cli.objectives.denoising import gather, spread
from diffusion_cli.objectives.noise_levels import BIN_NAMES, by_noise
from diffusion_cli.objectives.objective import Objective, Tally
from diffusion_cli.randomness import Source
from diffusion_cli.schedules import Schedule

SEEN = (0.0, 0.25, 0.5, 0.75)  # t of the preview's rows


class Classifying(Objective):
    """A classifier with the noise and the times that it is trained at.

    names: of all classes, label k is names[k]; taught: the labels that the data has. ValueError: a data set without labels.
    """

    shown = "recognised"
    example = "diffusion-sample ckpt=outputs/<a denoiser> guidance=classifier guidance.ckpt={run} label=all"

    def __init__(self, classifier: NoisyClassifier, schedule: Schedule, times: Times, names: list[str], taught: list[int]):
        super().__init__()
        if not taught:
            raise ValueError("a classifier needs classes: choose a data set that has labels, and dataset.labels=true")
        self.classifier = classifier
        self.schedule = schedule
        self.times = times
        self.names = names
        self.taught = taught

    @property
    def network(self) -> nn.Module:
        return self.classifier.network

    def loss(self, batch: Batch, source: Source) -> tuple[Tensor, Mapping[str, Tally]]:
        assert batch.label is not None
        t, correction = self.times(self.schedule, source)  # [B], [B]
        noise = self.schedule.noise(source, "noise", batch.x.shape[1:])
        logits = self.classifier(self.schedule.mix(batch.x, noise, t), t, self.schedule)  # [B, classes]
        error = nn.functional.cross_entropy(logits, batch.label, reduction="none")  # [B]
        self.times.observe(t, error)
        right = (logits.argmax(1) == batch.label).to(error)  # [B]
        tallies = {
            "accuracy": Tally(right.sum(), torch.full_like(right[0], len(right))),
            "loss_by_noise": by_noise(t, error.detach()),
            "accuracy_by_noise": by_noise(t, right),
        }
        return correction * error, tallies

    def figure_names(self, tally: str) -> list[str]:
        return BIN_NAMES

    @torch.no_grad()
    def preview(self, pictures: Pictures, source: Source) -> Mapping[str, Image]:
        """`recognised`: pictures under rising noise, true classes above, and above each picture the class that is seen in
        it."""
        assert pictures.labels is not None
        ids = torch.arange(min(10, len(pictures), len(source.slots)))
        x0 = to_float(gather(pictures, ids)).to(source.slots.device)  # [B, C, H, W]
        noise = self.schedule.noise(Source(source.seed, source.slots[: len(ids)]), "noise", x0.shape[1:])
        named, seen = {}, {}
        for t in torch.tensor(SEEN, device=x0.device):
            x, name = self.schedule.mix(x0, noise, t), f"t={float(t):.2f}"
            named[name] = to_uint8(x / float(spread(self.schedule, t)))
            seen[name] = [self.names[k] for k in self.classifier(x, t, self.schedule).argmax(1).tolist()]
        true = [self.names[k] for k in pictures.labels[ids].tolist()]
        return {"recognised": drawing.rows(named, true, seen)}

    @torch.no_grad()
    def evaluate(self, pictures: Pictures, source: Source, batch: int) -> dict[str, float]:
        """Share of right answers on clean pictures, at fixed log_snr, and their mean; cross-entropy, the mean over log_snr."""
        assert pictures.labels is not None
        device, count = source.slots.device, min(len(pictures), len(source.slots))
        right, error = torch.zeros(len(LEVELS) + 1, device=device), torch.zeros((), device=device)
        for first in range(0, count, batch):
            ids = torch.arange(first, min(first + batch, count))
            x0, label = to_float(gather(pictures, ids)).to(device), pictures.labels[ids].to(device)
            here = Source(source.seed, source.slots[first : first + len(ids)], source.step)
            noise = self.schedule.noise(here, "noise", x0.shape[1:])
            for k, level in enumerate((*LEVELS, torch.inf)):  # the last: clean
                t = self.schedule.t_of_log_snr(torch.full((len(ids),), level, device=device))
                logits = self.classifier(self.schedule.mix(x0, noise, t), t, self.schedule)  # [B, classes]
                right[k] += (logits.argmax(1) == label).sum()
                if k < len(LEVELS):
                    error += nn.functional.cross_entropy(logits, label, reduction="sum")
        shares = (right / count).tolist()
        figures = {"accuracy_clean": shares[-1], "accuracy": sum(shares[:-1]) / len(LEVELS)}
        figures["cross_entropy"] = float(error) / count / len(LEVELS)
        named = zip(LEVELS, shares[:-1], strict=True)
        return figures | {f"accuracy_by_log_snr/{level:+.0f}": share for level, share in named}
