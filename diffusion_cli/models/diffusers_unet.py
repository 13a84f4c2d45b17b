"""diffusers' UNet2DModel here: as our UNet where the two compute the same, else as that very module behind our contract.

    ours (UNet)            theirs (the keys of a config.json)
    width, multipliers     block_out_channels
    attention_levels       Attn... among down_block_types and up_block_types
    blocks                 layers_per_block          head_width   attention_head_dim     dropout      dropout
    groups                 norm_num_groups           norm_eps     norm_eps
    time_order             flip_sin_to_cos           time_shift   freq_shift             downsample_padding   its namesake
    time                   resnet_time_scale_shift   resize       downsample_type, upsample_type, and the kinds of block

One table for both directions: exporting/ writes their keys, pretrained/ reads them.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_cli.models.diffusers_names import renamed
from diffusion_cli.models.diffusers_peer import peer
from diffusion_cli.models.network import Network
from diffusion_cli.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Rate

_PADDINGS = {"end": 0, "both": 1}
_ORDERS = {"sin_cos": False, "cos_sin": True}
_TIMES = {"add": "default", "scale_shift": "scale_shift"}
_RESIZES = {"conv": "conv", "block": "resnet"}
_SAME = {  # ours -> theirs, the same value
    "blocks": "layers_per_block",
    "head_width": "attention_head_dim",
    "dropout": "dropout",
    "groups": "norm_num_groups",
    "norm_eps": "norm_eps",
    "time_shift": "freq_shift",
}
_FIXED = {  # what our UNet is always, in their words
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "add_attention": True,
}


def theirs_of(keys: Mapping[str, Any]) -> dict[str, Any]:
    """All keys of our UNet's constructor -> those of UNet2DModel that follow from them."""
    attend = [level in keys["attention_levels"] for level in range(len(keys["multipliers"]))]
    resize, shifted = _RESIZES[keys["resize"]], keys["time"] == "scale_shift"
    down, up = ("DownBlock2D", "UpBlock2D") if resize == "conv" else ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    return {
        "block_out_channels": tuple(keys["width"] * m for m in keys["multipliers"]),
        "down_block_types": tuple("AttnDownBlock2D" if a else down for a in attend),
        "up_block_types": tuple("AttnUpBlock2D" if a else up for a in reversed(attend)),
        "flip_sin_to_cos": _ORDERS[keys["time_order"]],
        "downsample_padding": _PADDINGS[keys["downsample_padding"]],
        "downsample_type": resize,
        "upsample_type": resize,
        "resnet_time_scale_shift": _TIMES[keys["time"]],
        "attn_norm_num_groups": keys["groups"] if shifted else None,  # without it, the middle's attention would have no norm
        **{theirs: keys[ours] for ours, theirs in _SAME.items()},
    }


def ours_of(config: Mapping[str, Any], channels: int) -> dict[str, Any] | None:
    """A UNet2DModel's config -> the keys of our UNet that computes the same; None where ours cannot."""
    told = {**_defaults(), **config}
    widths = told["block_out_channels"]
    tables = (_ORDERS, _PADDINGS, _TIMES, _RESIZES)
    orders, paddings, times, resizes = ({value: word for word, value in table.items()} for table in tables)
    differs = any(told[key] != value for key, value in _FIXED.items()) or told.get("out_channels") not in (
        None,
        channels,
        2 * channels,
    )
    strange = told["freq_shift"] not in (0, 1) or told["downsample_padding"] not in paddings
    strange = strange or told["resnet_time_scale_shift"] not in times or told["downsample_type"] not in resizes
    if differs or strange or any(w % widths[0] for w in widths):
        return None
    keys = {
        "width": widths[0],
        "multipliers": [w // widths[0] for w in widths],
        "attention_levels": [level for level, kind in enumerate(told["down_block_types"]) if kind == "AttnDownBlock2D"],
        "time_order": orders[told["flip_sin_to_cos"]],
        "downsample_padding": paddings[told["downsample_padding"]],
        "time": times[told["resnet_time_scale_shift"]],
        "resize": resizes[told["downsample_type"]],
        **{ours: told[theirs] for ours, theirs in _SAME.items()},
    }
    back = theirs_of(keys)  # other kinds of block, or another order of them, do not come back
    same = all(list(back[key]) == list(told[key]) for key in ("down_block_types", "up_block_types"))
    return keys if same and all(back[key] == told[key] for key in ("upsample_type", "attn_norm_num_groups")) else None


def weights_of_ours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet2DModel's tensors under the names of our UNet."""
    return {renamed(name): value for name, value in weights.items()}


class UNet2D(Network):
    """diffusers' UNet2DModel itself, for what our UNet does not compute: other blocks, another embedding of time.

    The keys are that class's, and so are their defaults. num_classes of the data become rows of its class table, and one more,
    the last, for no label. out_channels: twice `channels` where a variance was learned too; None: as variance_channels say.
    ValueError: diffusers is not installed, or its constructor refuses the keys.
    """

    def __init__(
        self,
        channels: PositiveInt,
        image_size: PositiveInt,
        num_classes: NonNegativeInt,
        variance_channels: NonNegativeInt = 0,
        out_channels: PositiveInt | None = None,
        center_input_sample: bool = False,
        time_embedding_type: Literal["positional", "fourier", "learned"] = "positional",
        time_embedding_dim: PositiveInt | None = None,
        freq_shift: NonNegativeInt = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[PositiveInt, ...] = (224, 448, 672, 896),
        layers_per_block: PositiveInt = 2,
        mid_block_scale_factor: PositiveFloat = 1,
        downsample_padding: NonNegativeInt = 1,
        downsample_type: Literal["conv", "resnet"] = "conv",
        upsample_type: Literal["conv", "resnet"] = "conv",
        dropout: Rate = 0.0,
        act_fn: str = "silu",
        attention_head_dim: PositiveInt | None = 8,
        norm_num_groups: PositiveInt = 32,
        attn_norm_num_groups: PositiveInt | None = None,
        norm_eps: PositiveFloat = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        num_train_timesteps: PositiveInt | None = None,
    ):
        out_channels = out_channels or channels + variance_channels
        super().__init__(channels, image_size, num_classes, variance_channels=out_channels - channels)
        keys = {
            "sample_size": image_size,
            "in_channels": channels,
            "out_channels": out_channels,
            "center_input_sample": center_input_sample,
            "time_embedding_type": time_embedding_type,
            "time_embedding_dim": time_embedding_dim,
            "freq_shift": freq_shift,
            "flip_sin_to_cos": flip_sin_to_cos,
            "down_block_types": down_block_types,
            "mid_block_type": mid_block_type,
            "up_block_types": up_block_types,
            "block_out_channels": block_out_channels,
            "layers_per_block": layers_per_block,
            "mid_block_scale_factor": mid_block_scale_factor,
            "downsample_padding": downsample_padding,
            "downsample_type": downsample_type,
            "upsample_type": upsample_type,
            "dropout": dropout,
            "act_fn": act_fn,
            "attention_head_dim": attention_head_dim,
            "norm_num_groups": norm_num_groups,
            "attn_norm_num_groups": attn_norm_num_groups,
            "norm_eps": norm_eps,
            "resnet_time_scale_shift": resnet_time_scale_shift,
            "add_attention": add_attention,
            "num_class_embeds": num_classes + 1 if num_classes else None,
            "num_train_timesteps": num_train_timesteps,
        }
        self.peer = peer("UNet2DModel", keys)
        # a table of embeddings has its last row here, and is asked by whole numbers
        self.last_index = (num_train_timesteps or 1) - 1 if time_embedding_type == "learned" else None

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        if self.last_index is not None:
            time = time.round().long().clamp(0, self.last_index)  # [B]
        return self.peer(x, time, class_labels=self.labels(x, cond)).sample  # [B, C, H, W], or [B, 2 C, H, W]


def keys_of_theirs(config: Mapping[str, Any], kind: type[Network]) -> dict[str, Any]:
    """The part of a config of diffusers that its class behind our contract takes: the rest are facts, or notes."""
    return {key: value for key, value in config.items() if key in signature(kind).parameters}


def with_null(table: Tensor, classes: int) -> Tensor:
    """A class table [N, E] with a row for no label: the mean of all where it has none, which is never asked for then."""
    return table if len(table) > classes else torch.cat([table, table.mean(0, keepdim=True)])


def _defaults() -> dict[str, Any]:
    return {name: p.default for name, p in signature(UNet2D).parameters.items()}
