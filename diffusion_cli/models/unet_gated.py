"""A U-Net whose time opens and closes its channels: every block multiplies by what the time says.

    features:  f = relu(norm(linear(time)))
    block:     x <- relu(norm(conv2(x) + relu(conv1(x)) * relu(linear(f))))
    bottom:    the lowest map, flattened and joined with f, through two linear layers, back to a small map
    up:        join with the level's map, block, double the size; last a 1x1 convolution

The network of a Keras tutorial that draws CIFAR-10 cars in 16 steps, number for number: 32-16-8-4 pixels, 128 channels, 192
time features, layer norm over the channels of each pixel, Keras' epsilon of 0.001 and its initialisation (Glorot, zero
biases). The layer norm of a linear map of one number forgets large numbers' differences: time there counts 0 .. 15, so for a
schedule that tells 0 .. 1000 set time_scale to about 0.015.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from diffusion_cli.models.network import Network, check_halvings
from diffusion_cli.ranges import NonNegativeInt, PositiveFloat, PositiveInt

EPS = 1e-3  # Keras' LayerNormalization


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel, [B, C, H, W]: Keras' LayerNormalization on its last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)  # [B, C, H, W]


class GatedBlock(nn.Module):
    """[B, c_in, H, W] and time features [B, f] to [B, c_out, H, W]."""

    def __init__(self, c_in: int, c_out: int, features: int):
        super().__init__()
        self.conv_gated = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.gate = nn.Linear(features, c_out)
        self.conv_plain = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm = ChannelNorm(c_out, EPS)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        gate = nnf.relu(self.gate(features))[:, :, None, None]  # [B, c_out, 1, 1]
        h = self.conv_plain(x) + nnf.relu(self.conv_gated(x)) * gate  # [B, c_out, H, W]
        return nnf.relu(self.norm(h))  # [B, c_out, H, W]


class UNetGated(Network):
    """levels: resolutions, each half of the one before. time_width: time features. bottom_width, bottom_channels: of the
    linear layers at the lowest level and of the map that they paint. time_scale multiplies the time that is told.

    Labels, which the tutorial does not have, are added to the time features before their ReLU.
    ValueError: a size that cannot be halved so often.
    """

    def __init__(
        self,
        channels: PositiveInt,
        image_size: PositiveInt,
        num_classes: NonNegativeInt,
        hint_channels: NonNegativeInt = 0,
        width: PositiveInt = 128,
        levels: PositiveInt = 4,
        time_width: PositiveInt = 192,
        bottom_width: PositiveInt = 128,
        bottom_channels: PositiveInt = 32,
        time_scale: PositiveFloat = 1.0,
    ):
        super().__init__(channels, image_size, num_classes, hint_channels)
        check_halvings(image_size, levels - 1, f"model.levels is {levels}", "a smaller model.levels")
        low = image_size // 2 ** (levels - 1)  # 4 pixels of 32
        self.time_scale = time_scale
        self.time_linear = nn.Linear(1, time_width)
        self.time_norm = nn.LayerNorm(time_width, EPS)
        self.class_embedding = self.class_table(time_width)
        told = channels + hint_channels
        self.down = nn.ModuleList(GatedBlock(told if i == 0 else width, width, time_width) for i in range(levels))
        self.bottom = nn.Sequential(
            nn.Linear(low * low * width + time_width, bottom_width),
            nn.LayerNorm(bottom_width, EPS),
            nn.ReLU(),
            nn.Linear(bottom_width, bottom_channels * low * low),
            nn.LayerNorm(bottom_channels * low * low, EPS),
            nn.ReLU(),
            nn.Unflatten(1, (bottom_channels, low, low)),
        )
        self.up = nn.ModuleList(
            GatedBlock((bottom_channels if i == 0 else width) + width, width, time_width) for i in range(levels)
        )
        self.conv_out = nn.Conv2d(width, channels, 1)
        self.glorot()

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        labels = self.labels(x, cond)
        features = self.time_norm(self.time_linear(time[:, None] * self.time_scale))  # [B, f]
        if labels is not None:
            features = features + self.class_embedding(labels)  # [B, f]
        features = nnf.relu(features)  # [B, f]

        h, skips = x, []
        for level, block in enumerate(self.down):
            if level > 0:
                h = nnf.max_pool2d(h, 2)  # [B, c, h/2, w/2]
            h = block(h, features)  # [B, width, h, w]
            skips.append(h)
        h = self.bottom(torch.cat([h.flatten(1), features], dim=1))  # [B, bottom_channels, low, low]
        for level, block in enumerate(self.up):
            if level > 0:
                h = nnf.interpolate(h, scale_factor=2.0, mode="nearest")  # [B, width, 2h, 2w]
            h = block(torch.cat([h, skips.pop()], dim=1), features)  # [B, width, h, w]
        return self.conv_out(h)  # [B, C, H, W]
