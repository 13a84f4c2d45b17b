"""What a network makes of real pictures: rows of the denoising error and of bits per dimension, for each picture of a split."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffusion_cli.assembly import Stages
from diffusion_cli.data import Pictures
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.devices import Compute
from diffusion_cli.evaluation.denoising import LEVELS, errors_by_level
from diffusion_cli.evaluation.likelihood import of_bound, of_flow, of_walk
from diffusion_cli.evaluation.rows import Make
from diffusion_cli.objectives.captions import told_of
from diffusion_cli.objectives.denoising import gather
from diffusion_cli.randomness import Source, word_of
from diffusion_cli.samplers import Ancestral, Denoise, Varied
from diffusion_cli.schedules import Schedule
from diffusion_cli.settings import Evaluate

NAMES = (
    "x0_mse",
    *(f"x0_mse_by_log_snr/{level:+.0f}" for level in LEVELS),
    "bits_per_dim_bound",
    "bits_per_dim_vlb",
    "bits_per_dim",
)  # as shown

Measure = Callable[[Denoise, Schedule, Tensor, Source], Mapping[str, Tensor]]  # images uint8 [B, C, H, W] -> figures [B]


def rows_of_pictures(
    denoiser: Denoiser,
    stages: Stages,
    pictures: Pictures,
    told: bool,
    settings: Evaluate,
    compute: Compute,
    walk: Ancestral | None,
) -> Make:
    """told: whether the network is told the pictures' own labels; their captions, where stages has an encoder of them. walk:
    whose steps the metric vlb is of."""
    said: list[Tensor] = []
    denoiser = denoiser.noting(lambda v: said.__setitem__(slice(None), [v]))
    measures: dict[str, Measure] = {
        "denoising": lambda ask, schedule, images, source: errors_by_level(ask, schedule, images, source, stages.codec),
        "bound": lambda ask, schedule, images, source: {
            "bits_per_dim_bound": of_bound(ask, schedule, images, source, settings.levels)
        },
        "bits": lambda ask, schedule, images, source: {
            "bits_per_dim": of_flow(ask, schedule, images, source, settings.tolerance, settings.tolerance)
        },
    }
    if walk is not None:
        measures["vlb"] = lambda ask, schedule, images, source: {
            "bits_per_dim_vlb": of_walk(ask, schedule, images, source, walk, settings.levels)
        }
    wanted = [measures[metric] for metric in settings.metrics if metric in measures]

    def make(ids: Tensor) -> dict[str, Tensor]:
        images = gather(pictures, ids).to(compute.device)  # [B, C, H, W]
        about = told_of(pictures, ids, stages.texts, told)
        about = None if about is None else about.to(compute.device)
        ask = Varied(lambda x, t: denoiser(x, t, about), lambda: said[0])
        source = Source(word_of(settings.seed, "evaluate"), ids.to(compute.device))
        with compute.precision(), torch.no_grad():
            found = [measure(ask, denoiser.schedule, images, source) for measure in wanted]
        return {name: values.cpu() for figures in found for name, values in figures.items()}

    return make
