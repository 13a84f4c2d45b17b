"""The denoising error at fixed levels of noise: it compares networks of any schedule, prediction and loss."""

import torch
from torch import Tensor

from diffusion_cli.codecs import Codec
from diffusion_cli.data.pixels import to_float
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Denoise
from diffusion_cli.schedules import Schedule

LEVELS = (6.0, 4.0, 2.0, 0.0, -2.0, -4.0, -6.0, -8.0)  # log_snr: nearly clean to nearly noise


@torch.no_grad()
def errors_by_level(denoise: Denoise, schedule: Schedule, images: Tensor, source: Source, codec: Codec) -> dict[str, Tensor]:
    """Mean squared error [B] of the foreseen x0, kept within [-1, 1] where it is a picture, for uint8 images [B, C, H, W]: at
    each level, and their mean as `x0_mse`. The same pictures and source, the same noise for every network of that codec."""
    x0 = codec.encode(to_float(images))
    noise = schedule.noise(source, "noise", x0.shape[1:])
    errors = {}
    for level in LEVELS:
        t = schedule.t_of_log_snr(torch.full((len(x0),), level, device=x0.device))
        foreseen = denoise(schedule.mix(x0, noise, t), t)
        foreseen = foreseen.clamp(-1, 1) if codec.bounded else foreseen
        errors[f"x0_mse_by_log_snr/{level:+.0f}"] = (foreseen - x0).square().flatten(1).mean(1)
    return {"x0_mse": torch.stack(list(errors.values())).mean(0)} | errors
