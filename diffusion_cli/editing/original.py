"""What an edit is given: the picture `init` and the mask, as files are, and the form that the network's pictures have."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_cli.data.decoding import decode
from diffusion_cli.data.pixels import to_float


@dataclass(frozen=True)
class Original:
    """picture, mask: encoded; both are brought to a square by one rule, the middle of the longer side. channels, size: the
    network's."""

    picture: bytes
    mask: bytes | None
    channels: int
    size: int

    def pixels(self, size: int) -> Tensor:
        """The picture, float32 [1, C, size, size] within [-1, 1]. Raises Unreadable."""
        return to_float(torch.tensor(decode(self.picture, size=size, channels=self.channels, resize="crop")))[None]

    def white(self) -> Tensor:
        """Where the mask is white, or nearer to it than to black: bool [size, size]. Raises Unreadable."""
        assert self.mask is not None
        return torch.tensor(decode(self.mask, size=self.size, channels=1, resize="crop"))[0] >= 128
