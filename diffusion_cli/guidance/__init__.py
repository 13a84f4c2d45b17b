"""Guidance: what a sampler is told when it asks denoise(x, t), from a network that was told of labels or has a helper."""

from diffusion_cli.guidance.apg import APG as APG
from diffusion_cli.guidance.auto import Auto as Auto
from diffusion_cli.guidance.cfg import CFG as CFG
from diffusion_cli.guidance.cfg_zero import CFGZero as CFGZero
from diffusion_cli.guidance.classifier import ByClassifier as ByClassifier
from diffusion_cli.guidance.guidance import Guidance as Guidance
from diffusion_cli.guidance.guidance import Guided as Guided
from diffusion_cli.guidance.guidance import Helper as Helper
from diffusion_cli.guidance.guidance import Unguided as Unguided
