"""Figures of samples or of reconstructions while training: of the averaged weights, on a cadence, as diffusion-evaluate finds
them afterwards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_cli.assembly import Facts, Stages, parts_of
from diffusion_cli.build import build
from diffusion_cli.data import Pictures
from diffusion_cli.devices import Compute
from diffusion_cli.errors import Stopped
from diffusion_cli.evaluation.figures import draws_of, of_reconstructions, of_samples
from diffusion_cli.evaluation.parts import check_told, look_of, warn
from diffusion_cli.evaluation.reference import Reference, reference_of
from diffusion_cli.evaluation.rows import made
from diffusion_cli.evaluation.samples import Look, Samples, rows_of_reconstructions, rows_of_samples, shares_of
from diffusion_cli.evaluation.words import name_back, name_of
from diffusion_cli.guidance import Guidance
from diffusion_cli.objectives import Autoencoding, Denoising
from diffusion_cli.objectives.captions import captions
from diffusion_cli.settings import Plan
from diffusion_cli.signals import StopRequest, listening


@dataclass(frozen=True, eq=False)
class Watch:
    """n samples of the seed by the run's own sampler and guidance, as its previews are made, with labels as in training."""

    metrics: Sequence[str]
    n: int
    look: Look
    reference: Reference
    guidance: Guidance
    shares: Tensor | None
    captions: Sequence[str]
    seed: int
    batch: int
    compute: Compute

    @property
    def names(self) -> list[str]:
        return [name_of(metric, self.look.name, self.n) for metric in self.metrics]

    def __call__(self, objective: Denoising, stop: StopRequest) -> dict[str, float] | None:
        """By name; None after a signal."""
        stages = Stages(objective.codec, objective.texts)
        samples = Samples(
            objective.denoiser,
            stages,
            objective.sampler,
            self.guidance,
            None,
            self.shares,
            self.captions,
            self.seed,
            self.compute,
        )
        try:
            table = made(lambda ids: rows_of_samples(samples, self.look, ids), 0, self.n, self.batch, stop, lambda count: None)
        except Stopped:
            return None
        found = of_samples(self.metrics, draws_of(table, self.n), self.reference.cloud, self.look.name)
        return {name: figure["value"] for name, figure in found.items()}


@dataclass(frozen=True, eq=False)
class WatchBack:
    """What an autoencoder gives back of n pictures, beside these."""

    metrics: Sequence[str]
    n: int
    look: Look
    pictures: Pictures
    batch: int
    compute: Compute

    @property
    def names(self) -> list[str]:
        return [name_back(name_of(metric, self.look.name, self.n)) for metric in self.metrics]

    def __call__(self, objective: Autoencoding, stop: StopRequest) -> dict[str, float] | None:
        """By name; None after a signal."""
        make = lambda ids: rows_of_reconstructions(objective.autoencoder, self.pictures, self.look, self.compute, ids)  # noqa: E731
        try:
            table = made(make, 0, self.n, self.batch, stop, lambda count: None)
        except Stopped:
            return None
        found = of_reconstructions(self.metrics, table, self.n, self.look.name)
        return {name: figure["value"] for name, figure in found.items()}


def watch_of(
    plan: Plan, pictures: Pictures, held_out: Pictures | None, facts: Facts, compute: Compute
) -> Watch | WatchBack | None:
    """What the plan's trainer.metrics ask for, None where they ask for nothing: samples beside the training pictures, or
    reconstructions of held-out pictures, where there are such, beside these.

    Raises UserError for what cannot be measured, Stopped after a signal.
    """
    settings, trust = plan.trainer, plan.root.trust
    if not settings.metrics:
        return None
    parts: Mapping[str, Any] = plan.node
    look = look_of(parts.get("features"), settings.metrics, facts, compute.device, trust)
    if "autoencoder" in parts_of(parts["objective"], trust):
        pictures = held_out or pictures
        check_told(settings.metrics, pictures.labels is not None, False, look.extractor, facts["classes"])
        n = min(settings.metrics_n, len(pictures))
        warn(settings.metrics, n)
        return WatchBack(settings.metrics, n, look, pictures, settings.batch, compute)
    shares = shares_of(pictures) if facts["taught"] else None
    check_told(settings.metrics, shares is not None, "texts" in facts, look.extractor, facts["classes"])
    warn(settings.metrics, settings.metrics_n)
    with listening() as stop:
        reference = reference_of(pictures, "train", look, settings.batch, torch.device(compute.device), stop)
    guidance = build(parts["guidance"], Guidance, "guidance", trust=trust)
    return Watch(
        settings.metrics,
        settings.metrics_n,
        look,
        reference,
        guidance,
        shares,
        captions(pictures) if "texts" in facts else (),
        plan.root.seed,
        settings.batch,
        compute,
    )
