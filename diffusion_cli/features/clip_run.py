"""Features of a CLIP that this project trained: the picture's embedding, and beside it that of the text that it is made of.

So how well samples fit their captions can be said on any machine, for any captioned data (metrics=[clip_score]). As with all
networks trained here, figures are comparable where the digest is the same.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor

from diffusion_cli.assembly import Facts
from diffusion_cli.data.pixels import to_float
from diffusion_cli.errors import ConfigError
from diffusion_cli.features.features import Extractor, Features, Seen
from diffusion_cli.sampling.finding import find, load_clip


@dataclass(frozen=True)
class ClipRun(Features):
    """ckpt: a run or checkpoint of objective=contrasting; pictures of another size are brought to its own."""

    ckpt: str | None = None
    weights: Literal["ema", "raw"] = "ema"

    def __post_init__(self) -> None:
        if self.ckpt is None:
            raise ValueError("features.ckpt= a CLIP run is needed, as experiment=clip_openmoji makes one")

    def open(self, facts: Facts, device: torch.device, trust: Collection[str] = ()) -> Extractor:
        found = find(str(self.ckpt), "features.ckpt")
        clip, tokenizer = load_clip(found, self.weights, tuple(trust))
        clip = clip.to(device)
        if clip.channels != facts["channels"]:
            raise ConfigError(
                f"features.ckpt={found.folder} is for pictures of {clip.channels} channels, and these have {facts['channels']}"
            )

        def look(images: Tensor) -> Seen:
            x = to_float(images)  # [B, C, H, W]
            if x.shape[-1] != clip.image_size:
                x = nnf.interpolate(x, (clip.image_size,) * 2, mode="bicubic", antialias=True).clamp(-1, 1)
            return Seen(clip.pictures(x))

        def read(texts: Sequence[str]) -> Tensor:
            return clip.texts(tokenizer.encode(texts, clip.length).ids.to(device))

        digest = found.digest[:16] if self.weights == "ema" else f"{found.digest[:12]}-raw"
        return Extractor(self.name, digest, look, read=read)
