"""What every network is: a function F(x, time, cond) of tensors, which knows nothing of schedules and predictions.

    x     [B, C, H, W] float32   the noised picture, already scaled by c_in(t); C + hint_channels channels where the network
                                 is told its previous answer (self-conditioning, Chen et al. 2022, "Analog bits")
    time  [B] float32            what the network is told of time, c_noise(t): 0..1000 for DDPM, log(sigma)/4 for EDM
          [B, 2]                 or, with two_times, that and how far the answer leads from there, c_noise(t) - c_noise(s),
                                 both a hundredth
    cond  [B] int64 or None      labels; index num_classes is the null condition of classifier-free guidance
                                 (Ho and Salimans 2022), and None means the null condition for the whole batch
          [B, L, D] float32      or, for a network with text_width D, the tokens of texts, which it always gets; an all-zero
                                 token is padding (conditioning/conditioner.py), and no other one reads it
    F     [B, C, H, W]           or, with variance_channels, C more: of the variance of a step (losses/hybrid.py)
    augment [B, A] or None       how the picture was moved, for a network with augment_width A; None: it was not

A constructor's first three arguments are facts that the data set states, and so are hint_channels, of a network that can
take a hint, text_width, of one that reads tokens, augment_width, two_times, of one that can be told where it leads to, and
variance_channels. All others are the keys of the config node, and their annotations are its schema.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Network(nn.Module, ABC):
    """Base of all networks. channels, image_size: of the pictures (or latents); num_classes: 0 means unconditional.

    hint_channels: further channels of x with the previous answer; 0, or as many as the picture has. text_width: of the tokens
    that it reads; 0: none, and then cond is labels or None. One that reads tokens is not told labels: num_classes is 0 then.
    variance_channels: further channels of F about the variance; 0, or as many as the picture has.
    bandwidth: of a network that hears the time by random waves (time_embedding.Waves).
    """

    bandwidth: float | None = None

    def __init__(
        self,
        channels: int,
        image_size: int,
        num_classes: int,
        hint_channels: int = 0,
        text_width: int = 0,
        augment_width: int = 0,
        two_times: bool = False,
        variance_channels: int = 0,
    ):
        super().__init__()
        self.channels = channels
        self.image_size = image_size
        self.num_classes = 0 if text_width else num_classes
        self.hint_channels = hint_channels
        self.text_width = text_width
        self.augment_width = augment_width
        self.two_times = two_times
        self.variance_channels = variance_channels

    @property
    def told(self) -> bool:
        """Whether it is told anything of a picture: a label, or a text."""
        return self.num_classes > 0 or self.text_width > 0

    @abstractmethod
    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        """F [B, C + variance_channels, H, W]. One that takes an augment_width has a fourth argument, augment
        [B, augment_width] or None.

        ValueError: labels given to a network without classes.
        """

    def labels(self, x: Tensor, cond: Tensor | None) -> Tensor | None:
        """[B] int64 with the null label in place of None; None for a network without classes, which refuses labels."""
        if self.num_classes == 0 and cond is not None:
            raise ValueError("labels were given but num_classes is 0: choose a data set with labels, or give cond=None")
        if self.num_classes > 0 and cond is None:
            return torch.full((len(x),), self.num_classes, dtype=torch.long, device=x.device)
        return cond

    def class_table(self, width: int) -> nn.Embedding | None:
        """One learned vector for each class and, last, one for the null condition; None without classes."""
        return nn.Embedding(self.num_classes + 1, width) if self.num_classes > 0 else None

    def augment_table(self, width: int) -> nn.Linear | None:
        """A vector for each number that says how a picture was moved; None where no such thing is told."""
        return nn.Linear(self.augment_width, width, bias=False) if self.augment_width else None

    def glorot(self) -> None:
        """Glorot-uniform weights of all linear and convolutional layers, and biases of zero."""
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)


def check_halvings(image_size: int, halvings: int, reason: str, instead: str) -> None:
    """ValueError unless the size can be halved so often. reason, instead: what asks for it and what would ask for less."""
    factor = 2**halvings
    if image_size % factor != 0:
        nearest = -(-image_size // factor) * factor
        raise ValueError(
            f"image_size is {image_size} and {reason}: the size must be a multiple of {factor}; "
            f"choose dataset.size={nearest} or {instead}"
        )
