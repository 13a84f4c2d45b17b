"""What stands beside a network of latents or texts, as the classes of diffusers and transformers that its pipelines ask.

Their pipelines scale latents by one number at most. Ours have a mean and a std in each channel, x = (z - mean) / std, which
become part of the two convolutions of one pixel at the bottleneck (of none there, the identity is one):

    encoder   (mean_z, log var_z) = Q h + q    ->   mean_x = (mean_z - mean) / std,   log var_x = log var_z - 2 log std
    decoder   P z + p                          ->   P (std x + mean) + p

so that theirs encodes to x itself, decodes x, and its scaling factor is 1. A codebook is in the way of that.
"""

from typing import Any

import torch
from torch import nn

from diffusion_cli.codecs import Codec, Latent
from diffusion_cli.conditioning import ClipText, Conditioner, Pretrained
from diffusion_cli.conditioning.tokenizer import MARKS
from diffusion_cli.errors import ConfigError
from diffusion_cli.models import AutoencoderKL


def vae_of(codec: Codec) -> nn.Module:
    """AutoencoderKL of diffusers whose latents are ours, standardised. Raises ConfigError."""
    if not isinstance(codec, Latent) or not isinstance(codec.network, AutoencoderKL):
        kind = type(codec.network if isinstance(codec, Latent) else codec).__name__
        raise ConfigError(
            f"to=diffusers: the latents of {kind} have a mean and a std in each channel, which only an AutoencoderKL can carry "
            "there; to=folder, onnx and torch_export take it"
        )
    from diffusers import AutoencoderKL as Peer

    ours, mean, std = codec.network.peer, codec.mean, codec.std
    peer: Any = Peer(**{**_keys(ours.config), "use_quant_conv": True, "use_post_quant_conv": True, "scaling_factor": 1.0})
    weights = dict(ours.state_dict())
    for name, width in (("quant_conv", 2 * len(mean)), ("post_quant_conv", len(mean))):
        weights.setdefault(f"{name}.weight", torch.eye(width)[:, :, None, None])
        weights.setdefault(f"{name}.bias", torch.zeros(width))
    scale, shift = torch.cat([1 / std, torch.ones_like(std)]), torch.cat([-mean / std, -2 * std.log()])  # [2 c]
    weights["quant_conv.weight"] = scale[:, None, None, None] * weights["quant_conv.weight"]
    weights["quant_conv.bias"] = scale * weights["quant_conv.bias"] + shift
    P = weights["post_quant_conv.weight"]  # [c, c, 1, 1]
    weights["post_quant_conv.bias"] = weights["post_quant_conv.bias"] + P[:, :, 0, 0] @ mean
    weights["post_quant_conv.weight"] = P * std[None, :, None, None]
    peer.load_state_dict(weights)
    return peer.eval()


def texts_of(texts: Conditioner) -> dict[str, Any]:
    """text_encoder and tokenizer as StableDiffusionPipeline asks them. Raises ConfigError."""
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()  # it draws one for the tensors of a single file

    if texts.masked:
        raise ConfigError(
            "to=diffusers: to this network padding says nothing, and a StableDiffusionPipeline has it read what the encoder "
            "says of padding: train with texts.masked=false; to=folder, onnx and torch_export take it"
        )
    if isinstance(texts, Pretrained) and isinstance(texts.encoder, CLIPTextModel):
        return {"text_encoder": texts.encoder, "tokenizer": texts.words}
    if not isinstance(texts, ClipText):
        kind = type(getattr(texts, "encoder", texts)).__name__
        raise ConfigError(f"to=diffusers: a StableDiffusionPipeline has a CLIPTextModel, and this run's texts a {kind}")
    from tokenizers import Tokenizer

    config: Any = CLIPTextConfig(**texts.encoder.config.to_dict())
    encoder = CLIPTextModel(config)
    ours = texts.encoder.state_dict()
    encoder.load_state_dict({name: ours[name.removeprefix("text_model.")] for name in encoder.state_dict()})
    start, end, pad = MARKS
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(texts.words_as_json().decode()),
        bos_token=start, eos_token=end, pad_token=pad, model_max_length=texts.length,
    )  # fmt: skip
    return {"text_encoder": encoder.eval(), "tokenizer": words}


def _keys(config: Any) -> dict[str, Any]:
    """A config of diffusers without its notes about itself."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}
