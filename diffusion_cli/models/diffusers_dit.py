"""The weights of diffusers' DiTTransformer2DModel and of our DiT: q, k and v apart or together, and patches in another order.

    ours                            theirs
    patches_in [D, c p p]           pos_embed.proj, a convolution [D, c, p, p]
    patches_out [c p p, D]          proj_out_2 [p p c, D]
    attention.qkv [3 D, D]          attn1.to_q, to_k, to_v
    time_embedding, class_embedding the same ones in every block: norm1.emb

One table for both directions: exporting/ writes theirs, pretrained/ reads them.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_cli.models.dit import DiT

_RENAMES = (  # theirs -> ours, in this order
    (r"^transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_(\d)", r"time_embedding.linear\1"),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.class_embedder\.embedding_table", "class_embedding"),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear", r"blocks.\1.modulation"),
    (r"^transformer_blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.attention.out"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"blocks.\1.mlp.0"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2", r"blocks.\1.mlp.3"),
    (r"^pos_embed\.proj", "patches_in"),
    (r"^proj_out_1", "modulation_out"),
)
_QKV = re.compile(r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])\.(\w+)")
_FIXED = {  # what our DiT is always, in their words, and what they take where a config is silent
    "activation_fn": ("gelu-approximate", "gelu-approximate"),
    "attention_bias": (True, True),
    "norm_type": ("ada_norm_zero", "ada_norm_zero"),
    "norm_elementwise_affine": (False, False),
}


def renamed(theirs: str) -> str:
    """Their name of a weight that differs in its name alone -> ours."""
    for pattern, replacement in _RENAMES:
        theirs = re.sub(pattern, replacement, theirs)
    return theirs


def weights_of_theirs(network: DiT, peer: nn.Module) -> dict[str, Tensor]:
    """Our weights under the names of a DiTTransformer2DModel."""
    p, c = network.patch_size, network.channels
    ours = dict(network.state_dict())
    if network.class_embedding is None:  # any label is told, and says nothing
        ours["class_embedding.weight"] = torch.zeros(2, network.width)
    weights = {"pos_embed.proj.weight": ours["patches_in.weight"].unflatten(1, (c, p, p))}
    for end in ("weight", "bias"):
        weights[f"proj_out_2.{end}"] = ours[f"patches_out.{end}"].unflatten(0, (c, p, p)).movedim(0, 2).flatten(0, 2)
    for theirs in peer.state_dict():
        if (part := _QKV.fullmatch(theirs)) is not None:
            whole = ours[f"blocks.{part[1]}.attention.qkv.{part[3]}"]
            weights[theirs] = whole.chunk(3, dim=0)["qkv".index(part[2])].clone()
        elif theirs not in weights:
            weights[theirs] = ours[renamed(theirs)]
    return weights


def weights_of_ours(weights: Mapping[str, Tensor], patch_size: int, classes: int) -> dict[str, Tensor]:
    """A DiTTransformer2DModel's tensors under the names of our DiT. ValueError: blocks of different embeddings."""
    ours: dict[str, Tensor] = {}
    for theirs, value in weights.items():
        if (part := _QKV.fullmatch(theirs)) is not None:
            rest = [weights[f"transformer_blocks.{part[1]}.attn1.to_{one}.{part[3]}"] for one in "qkv"]
            ours[f"blocks.{part[1]}.attention.qkv.{part[3]}"] = torch.cat(rest)
        elif theirs.startswith("proj_out_2."):
            end, c = theirs.rpartition(".")[2], len(value) // patch_size**2
            ours[f"patches_out.{end}"] = value.unflatten(0, (patch_size, patch_size, c)).movedim(2, 0).flatten(0, 2)
        else:
            name = renamed(theirs)
            if name in ours and not torch.equal(ours[name], value):
                raise ValueError(f"its blocks have each their own {name}, and our DiT has one for all")
            ours[name] = value.flatten(1) if theirs == "pos_embed.proj.weight" else value
    if classes == 0:
        ours.pop("class_embedding.weight", None)
    return ours


def ours_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A DiTTransformer2DModel's config -> the keys of our DiT that computes the same; None where ours cannot."""
    channels = config.get("in_channels", 4)
    if any(config.get(key, silent) != value for key, (value, silent) in _FIXED.items()):
        return None
    if config.get("out_channels") not in (None, channels, 2 * channels):
        return None
    heads = config.get("num_attention_heads", 16)
    return {
        "patch_size": config.get("patch_size", 2),
        "width": heads * config.get("attention_head_dim", 72),
        "depth": config.get("num_layers", 28),
        "heads": heads,
        "dropout": config.get("dropout", 0.0),
        "time_shift": 1,
        "norm_eps": config.get("norm_eps", 1e-5),
    }
