"""The smallest U-Net that denoises digits: six 5x5 convolutions, and it is not told the time.

    down: 1-32-64-64, SiLU, max pooling between;  up: 64-64-32-1, doubled pixels between, skips by ADDITION, SiLU at the end

After unit 1, notebook 2 of the Hugging Face diffusion course, number for number: 309,057 parameters for one channel. There
pictures lie in [0, 1], here in [-1, 1], so the network changes range at its door: (x + 1) / 2 in, 2 y - 1 out. SiLU is
never below -0.28, so no output is below -1.56: enough for pictures (prediction=x0), too narrow for Gaussian noise.
"""

import torch.nn.functional as nnf
from torch import Tensor, nn

from diffusion_cli.models.network import Network, check_halvings
from diffusion_cli.ranges import NonNegativeInt, PositiveInt


class UNetBasic(Network):
    """widths: channels of the levels, each of half the size of the one before. kernel_size: odd.

    Labels, which the course does not have, add a learned bias for each class at the lowest level.
    ValueError: an even kernel, or a size that cannot be halved so often.
    """

    def __init__(
        self,
        channels: PositiveInt,
        image_size: PositiveInt,
        num_classes: NonNegativeInt,
        hint_channels: NonNegativeInt = 0,
        widths: tuple[PositiveInt, ...] = (32, 64, 64),
        kernel_size: PositiveInt = 5,
    ):
        super().__init__(channels, image_size, num_classes, hint_channels)
        levels = len(widths)
        if levels == 0:
            raise ValueError("widths is empty: give the channels of each level, such as [32,64,64]")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}: choose an odd one, which keeps the size of the picture")
        check_halvings(image_size, levels - 1, f"widths has {levels} levels", "fewer widths")
        steps = list(zip([channels, *widths[:-1]], widths, strict=True))  # (1, 32), (32, 64), (64, 64)
        told = channels + hint_channels
        # The way up ends each level at the width of the map that is added next: 64-64, 64-32, 32-1.
        self.down = nn.ModuleList(
            nn.Conv2d(told if i == 0 else a, b, kernel_size, padding="same") for i, (a, b) in enumerate(steps)
        )
        self.up = nn.ModuleList(nn.Conv2d(b, a, kernel_size, padding="same") for a, b in reversed(steps))
        self.class_bias = self.class_table(widths[-1])

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        labels = self.labels(x, cond)
        h = (x + 1) / 2  # [B, C, H, W] in [0, 1]
        skips = []
        for level, conv in enumerate(self.down):
            if level > 0:
                skips.append(h)
                h = nnf.max_pool2d(h, 2)  # [B, w, h/2, w/2]
            h = nnf.silu(conv(h))  # [B, w, h, w]
        if labels is not None:
            h = h + self.class_bias(labels)[:, :, None, None]  # [B, w, h, w]
        for level, conv in enumerate(self.up):
            if level > 0:
                h = nnf.interpolate(h, scale_factor=2.0, mode="nearest") + skips.pop()  # [B, w, 2h, 2w]
            h = nnf.silu(conv(h))  # [B, w, h, w]
        return 2 * h - 1  # [B, C, H, W] in [-1.56, ...)
