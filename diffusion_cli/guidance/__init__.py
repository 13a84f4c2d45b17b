"""Guidance: what a sampler is told when it asks denoise(x, t), from a network that was told of labels or has a helper."""

from diffusion_cli.guidance.guidance import Guidance as Guidance
from diffusion_cli.guidance.guidance import Unguided as Unguided
