"""Networks of diffusers that read texts: those very modules behind our contract. Their keys are the keys of those classes.

    UNet2DCondition   a U-Net whose blocks attend to the tokens: Stable Diffusion 1 and 2 (Rombach et al. 2022)
    AuraFlow          a transformer over patches and tokens together (Esser et al. 2024, "Scaling rectified flow transformers")

None is told a label.
"""

from typing import Literal

import torch.nn.functional as nnf
from torch import Tensor

from diffusion_cli.models.diffusers_peer import peer
from diffusion_cli.models.network import Network
from diffusion_cli.models.texts import padding
from diffusion_cli.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Rate


class _Reader(Network):
    def __init__(self, channels: int, image_size: int, num_classes: int, text_width: int, variance_channels: int = 0):
        if num_classes or not text_width:
            raise ValueError(f"{type(self).__name__} reads texts, and no labels: give an option of the group texts")
        super().__init__(channels, image_size, 0, text_width=text_width, variance_channels=variance_channels)


class UNet2DCondition(_Reader):
    """UNet2DConditionModel with tokens alone: no added conditions, no projections of other encoders."""

    def __init__(
        self,
        channels: PositiveInt,
        image_size: PositiveInt,
        num_classes: NonNegativeInt,
        text_width: NonNegativeInt = 0,
        variance_channels: NonNegativeInt = 0,
        out_channels: PositiveInt | None = None,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: NonNegativeInt = 0,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: tuple[str, ...] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[PositiveInt, ...] = (320, 640, 1280, 1280),
        layers_per_block: PositiveInt | tuple[PositiveInt, ...] = 2,
        downsample_padding: NonNegativeInt = 1,
        mid_block_scale_factor: PositiveFloat = 1,
        dropout: Rate = 0.0,
        act_fn: str = "silu",
        norm_num_groups: PositiveInt | None = 32,
        norm_eps: PositiveFloat = 1e-5,
        transformer_layers_per_block: PositiveInt | tuple[PositiveInt, ...] = 1,
        attention_head_dim: PositiveInt | tuple[PositiveInt, ...] = 8,
        num_attention_heads: PositiveInt | tuple[PositiveInt, ...] | None = None,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        time_embedding_type: Literal["positional", "fourier"] = "positional",
        time_embedding_dim: PositiveInt | None = None,
        conv_in_kernel: PositiveInt = 3,
        conv_out_kernel: PositiveInt = 3,
    ):
        out_channels = out_channels or channels + variance_channels
        super().__init__(channels, image_size, num_classes, text_width, out_channels - channels)
        keys = {
            "sample_size": image_size,
            "in_channels": channels,
            "out_channels": out_channels,
            "cross_attention_dim": text_width,
            "center_input_sample": center_input_sample,
            "flip_sin_to_cos": flip_sin_to_cos,
            "freq_shift": freq_shift,
            "down_block_types": down_block_types,
            "mid_block_type": mid_block_type,
            "up_block_types": up_block_types,
            "only_cross_attention": only_cross_attention,
            "block_out_channels": block_out_channels,
            "layers_per_block": layers_per_block,
            "downsample_padding": downsample_padding,
            "mid_block_scale_factor": mid_block_scale_factor,
            "dropout": dropout,
            "act_fn": act_fn,
            "norm_num_groups": norm_num_groups,
            "norm_eps": norm_eps,
            "transformer_layers_per_block": transformer_layers_per_block,
            "attention_head_dim": attention_head_dim,
            "num_attention_heads": num_attention_heads,
            "use_linear_projection": use_linear_projection,
            "upcast_attention": upcast_attention,
            "resnet_time_scale_shift": resnet_time_scale_shift,
            "time_embedding_type": time_embedding_type,
            "time_embedding_dim": time_embedding_dim,
            "conv_in_kernel": conv_in_kernel,
            "conv_out_kernel": conv_out_kernel,
        }
        self.peer = peer("UNet2DConditionModel", keys)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        mask = ~padding(cond)
        return self.peer(x, time, encoder_hidden_states=cond, encoder_attention_mask=mask).sample  # [B, C or 2 C, H, W]


class AuraFlow(_Reader):
    """AuraFlowTransformer2DModel. text_width: its joint_attention_dim; length: of its texts in training, where it learned
    to see the zeros of padding too, so every text is padded to that many tokens here."""

    def __init__(
        self,
        channels: PositiveInt,
        image_size: PositiveInt,
        num_classes: NonNegativeInt,
        text_width: NonNegativeInt = 0,
        patch_size: PositiveInt = 2,
        num_mmdit_layers: PositiveInt = 4,
        num_single_dit_layers: NonNegativeInt = 32,
        attention_head_dim: PositiveInt = 256,
        num_attention_heads: PositiveInt = 12,
        pos_embed_max_size: PositiveInt = 1024,
        length: PositiveInt = 256,
    ):
        super().__init__(channels, image_size, num_classes, text_width)
        self.length = length
        keys = {
            "sample_size": image_size,
            "in_channels": channels,
            "out_channels": channels,
            "joint_attention_dim": text_width,
            "caption_projection_dim": num_attention_heads * attention_head_dim,
            "patch_size": patch_size,
            "num_mmdit_layers": num_mmdit_layers,
            "num_single_dit_layers": num_single_dit_layers,
            "attention_head_dim": attention_head_dim,
            "num_attention_heads": num_attention_heads,
            "pos_embed_max_size": pos_embed_max_size,
        }
        self.peer = peer("AuraFlowTransformer2DModel", keys)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        if cond.shape[1] > self.length:
            raise ValueError(f"texts of {cond.shape[1]} tokens: AuraFlow reads {self.length} at most")
        tokens = nnf.pad(cond, (0, 0, 0, self.length - cond.shape[1]))  # [B, L, D]
        return self.peer(x, tokens, time / 1000).sample  # [B, C, H, W]; it is told times from 0 to 1
