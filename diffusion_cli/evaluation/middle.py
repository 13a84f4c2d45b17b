"""What a trained denoiser sees in a picture: its own middle activations at little noise, no other network needed.

    x = alpha(t) x0 + sigma(t) noise at log_snr = 4
    f = mean over places of what the block called halfway gives,   f <- (f - m) / |f - m|

Denoisers learn features that classify and segment; the best lie in the middle of the network at little noise (Baranchuk et al.
2022, "Label-efficient semantic segmentation with diffusion models"; Xiang et al. 2023, "Denoising diffusion autoencoders are
unified self-supervised learners"). The noise is one draw for all pictures, so that equal pictures have equal features, and the
label is the null label. m is a mean over training pictures.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_cli.codecs import Codec
from diffusion_cli.data.pixels import to_float
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.randomness import Source

LOG_SNR = 4.0  # sigma / alpha = 0.135: t of about 60 in a thousand of DDPM


@dataclass(frozen=True)
class Middle:
    """middle: the module whose output is looked at, one of the denoiser's network; mean [D]: what is taken off."""

    denoiser: Denoiser
    codec: Codec
    middle: nn.Module
    mean: Tensor | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float64 [B, D]; unit vectors once there is a mean."""
        found: list[Tensor] = []
        handle = self.middle.register_forward_hook(lambda module, given, output: found.append(output))
        try:
            _ask(self.denoiser, self.codec, images)
        finally:
            handle.remove()
        f = pooled(found[-1]).double()  # [B, D]
        if self.mean is None:
            return f
        f = f - self.mean
        return f / f.norm(dim=1, keepdim=True).clamp(min=1e-12)


def middle_of(denoiser: Denoiser, codec: Codec, images: Tensor) -> nn.Module | None:
    """The block called halfway through the network: of the parts that are made of parts and give a map [B, c, h, w] or tokens
    [B, n, c], or of all parts where none is made of parts; None for a network without any."""
    calls: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda module, given, output: calls.append(module) if is_map(output) else None)
        for module in denoiser.network.modules()
        if module is not denoiser.network
    ]
    try:
        with torch.no_grad():
            _ask(denoiser, codec, images)
    finally:
        for handle in handles:
            handle.remove()
    blocks = [module for module in calls if any(True for _ in module.children())] or calls
    return blocks[len(blocks) // 2] if blocks else None


def is_map(output: object) -> bool:
    return isinstance(output, Tensor) and output.ndim in (3, 4)


def pooled(output: Tensor) -> Tensor:
    """[B, c, h, w] or [B, n, c] -> [B, c]: the mean over places."""
    return output.float().mean((2, 3) if output.ndim == 4 else 1)


def _ask(denoiser: Denoiser, codec: Codec, images: Tensor) -> None:
    device = next(denoiser.parameters()).device
    x0 = codec.encode(to_float(images.to(device)))  # [B, C, H, W]
    schedule = denoiser.schedule
    t = schedule.t_of_log_snr(torch.full((len(x0),), LOG_SNR, device=device))  # [B]
    noise = schedule.noise(Source(0, torch.zeros(1, dtype=torch.long, device=device)), "features", x0.shape[1:])
    denoiser(schedule.mix(x0, noise.expand_as(x0), t), t, None)
