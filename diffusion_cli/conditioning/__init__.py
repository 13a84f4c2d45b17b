"""Conditioners: what texts become before a denoiser is told of them, [B, L, D] with padding exactly zero."""

from diffusion_cli.conditioning.clip_text import ClipText as ClipText
from diffusion_cli.conditioning.conditioner import Conditioner as Conditioner
from diffusion_cli.conditioning.conditioner import PromptCut as PromptCut
from diffusion_cli.conditioning.conditioner import padding as padding
from diffusion_cli.conditioning.conditioner import short as short
from diffusion_cli.conditioning.conditioner import trimmed as trimmed
from diffusion_cli.conditioning.pretrained import Pretrained as Pretrained
from diffusion_cli.conditioning.tokenizer import Tokenizer as Tokenizer
from diffusion_cli.conditioning.tokenizer import learned as learned
