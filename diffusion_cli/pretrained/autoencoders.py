"""An autoencoder of diffusers in our words: the node of a model, the facts of its pictures, its weights and their scale.

theirs   x = (z - shift_factor) scaling_factor        one number for all channels, or latents_mean and latents_std of each
ours     x = (z - mean) / std                         codecs/latent.py
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_cli.assembly import Facts
from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.models.diffusers_names import current
from diffusion_cli.pretrained import files
from diffusion_cli.pretrained.trained import Pretrained

Config = Mapping[str, Any]
SCALING = 0.18215  # what both classes take where a config is silent


def is_autoencoder(folder: Path) -> bool:
    """Whether the config.json in this folder is that of an autoencoder that is read here."""
    try:
        return files.parsed(folder / "config.json").get("_class_name") in NODES
    except StorageError:
        return False


def read(folder: Path, said: str, home: Path) -> Pretrained:
    """said: the place in the user's words; home: where what is made goes. Raises UserError."""
    path = folder / "config.json"
    told = files.parsed(path)
    try:
        node, facts, scale = node_of(told, said), facts_of(told, said), _scale(told, said)
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:  # values of other kinds
        raise StorageError(f"{said}: its config.json is not understood ({error!r})") from None
    weights = files.weights_in(folder)

    def tensors() -> dict[str, Tensor]:
        named = {f"autoencoder.network.peer.{current(name)}": value for name, value in files.tensors_in(weights).items()}
        return {key: _as_linear(key, value) for key, value in named.items()} | scale

    nodes = {"model": node, "objective": {"_target_": "diffusion_cli.objectives.Autoencoding"}}
    digest = files.digest_of(folder, [path, *weights])
    return Pretrained(folder, home, said, digest, {"config": nodes, "facts": facts}, tensors)


def node_of(config: Config, place: str) -> dict[str, Any]:
    """The node of our autoencoder that computes the same. Raises ConfigError for what has no counterpart here."""
    name = str(config.get("_class_name"))
    if name not in NODES:
        raise ConfigError(f"{place}: its autoencoder is a {name}, and {' and '.join(NODES)} are read here")
    widths = list(config.get("block_out_channels", [64]))
    channels, latents = config.get("in_channels", 3), latent_channels_of(config)
    fixed = {  # what ours is always
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "act_fn": "silu",
        "norm_type": "group",
        "out_channels": channels,
        "vq_embed_dim": latents,
        "use_post_quant_conv": config.get("use_quant_conv", True),
    }
    for key, value in fixed.items():
        if config.get(key) not in (None, value):
            raise ConfigError(f"{place}: its autoencoder has {key} {config[key]}, and {value} is read here")
    shape = {"latent_channels": latents, "widths": widths, "blocks": config.get("layers_per_block", 1)}
    norms = {"groups": config.get("norm_num_groups", 32), "attention": config.get("mid_block_add_attention", True)}
    return {**shape, **norms, **NODES[name](config)}


def facts_of(config: Config, place: str) -> Facts:
    channels, size = config.get("in_channels", 3), config.get("sample_size", 32)
    size = size[0] if isinstance(size, list) else size
    if channels not in (1, 3) or not isinstance(size, int):
        raise ConfigError(
            f"{place}: its pictures have {channels} channels and size {size}, and grey and RGB ones are made here"
        )
    return Facts(channels=channels, image_size=size, classes=[], taught=[], fingerprint="")


def factor_of(config: Config) -> int:
    """Pixels along a side of what becomes one latent."""
    return int(2 ** (len(config.get("block_out_channels", [64])) - 1))


def latent_channels_of(config: Config) -> int:
    return int(config.get("latent_channels", 3 if config.get("_class_name") == "VQModel" else 4))


def _scale(config: Config, place: str) -> dict[str, Tensor]:
    channels, factor = latent_channels_of(config), config.get("scaling_factor", SCALING)
    mean = torch.tensor(config.get("latents_mean") or [float(config.get("shift_factor") or 0)] * channels)
    std = torch.tensor(config.get("latents_std") or [1.0] * channels) / factor
    if mean.shape != (channels,) or std.shape != (channels,) or not (std > 0).all() or not std.isfinite().all():
        raise ConfigError(f"{place}: its latents have {channels} channels, and its config.json has no scale that fits them")
    return {"autoencoder.mean": mean, "autoencoder.std": std}


def _as_linear(name: str, value: Tensor) -> Tensor:
    """Attention was a convolution of one pixel in the oldest files."""
    return value[:, :, 0, 0] if ".attentions." in name and value.dim() == 4 else value


def _kl(config: Config) -> dict[str, Any]:
    return {"_target_": "diffusion_cli.models.AutoencoderKL", "quant_conv": config.get("use_quant_conv", True)}


def _vq(config: Config) -> dict[str, Any]:
    codes = config.get("num_vq_embeddings", 256)
    return {"_target_": "diffusion_cli.models.AutoencoderVQ", "codes": codes, "decay": None}


NODES: dict[str, Callable[[Config], dict[str, Any]]] = {"AutoencoderKL": _kl, "VQModel": _vq}
