"""The parts of a model, each as a module that can be traced alone: what a graph is asked, and what it answers.

network(x [B, c, h, w], time [B], labels [B] or tokens [B, L, D]) -> F [B, c, h, w]
texts(ids [B, L], mask [B, L]) -> tokens [B, L, D]            of texts, padding exactly zero where the run has it so
encoder(pictures [B, C, H, W]) -> x [B, c, h, w]              latents of mean 0 and standard deviation 1, of a VQ before it
decoder(x [B, c, h, w]) -> pictures [B, C, H, W]              about [-1, 1]                                    quantises
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_cli.assembly import Stages
from diffusion_cli.codecs import Codec
from diffusion_cli.conditioning import Conditioner
from diffusion_cli.conditioning.tokenizer import Tokens
from diffusion_cli.errors import ConfigError
from diffusion_cli.exporting.parcel import Model

LARGEST = 63  # pictures at once where diffusers' Upsample2D is: from 64 on it takes another path


@dataclass(frozen=True)
class Part:
    """inputs: an example by name, of a batch of two. length: tokens of a text at most, where their number is open."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    output: str
    length: int = 0

    @property
    def largest(self) -> int | None:
        """Pictures at once, at most."""
        return LARGEST if any(type(part).__name__ == "Upsample2D" for part in self.module.modules()) else None

    @property
    def shapes(self) -> tuple[dict[int, object], ...]:
        """Which sizes of the inputs are open, in torch.export's words."""
        batch = torch.export.Dim("batch", min=1, max=self.largest)
        tokens = {1: torch.export.Dim("length", min=1, max=self.length)} if self.length else {}
        return tuple({0: batch, **(tokens if name == "tokens" else {})} for name in self.inputs)

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return tuple(self.inputs.values())


class Texts(nn.Module):
    def __init__(self, texts: Conditioner):
        super().__init__()
        self.texts = texts

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        found = self.texts.read(Tokens(ids, mask, [])).float()  # [B, L, D]
        return torch.where(mask[:, :, None], found, 0.0) if self.texts.masked else found


class Encoder(nn.Module):
    def __init__(self, codec: Codec):
        super().__init__()
        self.codec = codec

    def forward(self, pictures: Tensor) -> Tensor:
        return self.codec.encode(pictures)


class Decoder(nn.Module):
    def __init__(self, codec: Codec):
        super().__init__()
        self.codec = codec

    def forward(self, x: Tensor) -> Tensor:
        return self.codec.decode(x)


def network_of(model: Model) -> Part:
    """Raises ConfigError for a network of two times."""
    network = model.denoiser.network
    if network.two_times:
        raise ConfigError("a network of two times (objective=meanflow) is no graph so far: to=folder and safetensors take it")
    x = torch.zeros(2, network.channels + network.hint_channels, network.image_size, network.image_size)
    inputs, length = {"x": x, "time": torch.ones(2)}, len(model.denoiser.null) if network.text_width else 0
    if network.text_width:
        inputs["tokens"] = torch.zeros(2, min(length, 3), network.text_width)
    elif network.num_classes:
        inputs["labels"] = torch.zeros(2, dtype=torch.long)
    return Part("network", network, inputs, "F", length)


def beside(model: Model, stages: Stages) -> list[Part]:
    """Those around the network."""
    found = []
    if stages.texts is not None:
        tokens = stages.texts.tokenised(["", "a"])
        found.append(Part("texts", Texts(stages.texts), {"ids": tokens.ids, "mask": tokens.mask}, "tokens"))
    if not stages.codec.bounded:
        pictures, latents = torch.zeros(2, *model.shape), torch.zeros(2, *model.diffused)
        found.append(Part("encoder", Encoder(stages.codec), {"pictures": pictures}, "x"))
        found.append(Part("decoder", Decoder(stages.codec), {"x": latents}, "pictures"))
    return found
