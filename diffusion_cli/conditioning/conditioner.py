"""What texts become before a denoiser is told of them: tokens with a mask that travels inside them.

    encode(B texts) -> [B, L, D] float32, every padded token exactly zero

A network that is given such tokens takes an all-zero token for padding, so no mask is carried beside them: through batches,
guidance and samplers they are one tensor. The tokens of the empty text are the null condition of classifier-free guidance
(Ho and Salimans 2022), as in Saharia et al. 2022, "Photorealistic text-to-image diffusion models", and in Stable Diffusion.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion_cli.conditioning.tokenizer import Tokens
from diffusion_cli.models.texts import padding as padding


class PromptCut(UserWarning):
    """A text was longer than a conditioner can read."""


class Conditioner(nn.Module, ABC):
    """A frozen encoder of texts. width: D; length: L, tokens of a text at most; digest: names its weights; masked: is padding
    to be zero, or what the encoder says of it?"""

    width: int
    length: int
    digest = ""
    masked = True

    @abstractmethod
    def tokenised(self, texts: Sequence[str]) -> Tokens:
        """Tokens of the texts, each padded to `length`, and what of each did not fit."""

    @abstractmethod
    def read(self, tokens: Tokens) -> Tensor:
        """[B, L, D] of tokens that lie on the encoder's device; what it says of padding is of no consequence."""

    @abstractmethod
    def words_as_json(self) -> bytes:
        """A file of the library tokenizers whose encode_batch(texts) gives the same ids, each with its attention_mask.
        ValueError: there is none."""

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """[B, L, D] float32, padding exactly zero. Warns with PromptCut of every text that is too long, and of what is cut."""
        tokens = self.tokenised(texts)
        for text, dropped in zip(texts, tokens.dropped, strict=True):
            if dropped:
                said = f"a text is longer than {self.length} tokens: {short(text)!r} is cut, and this is dropped: {dropped!r}"
                warnings.warn(said, PromptCut, stacklevel=3)  # past no_grad
        here = next(self.parameters()).device
        ids, mask = tokens.ids.to(here), tokens.mask.to(here)  # [B, L]
        found = self.read(Tokens(ids, mask, tokens.dropped)).float()  # [B, L, D]
        if not self.masked:
            return found
        return torch.where(mask[:, :, None], found, 0.0)  # not a product, which would keep what is not finite

    def null(self) -> Tensor:
        """[L, D]: the tokens of the empty text."""
        return self.encode([""])[0]


def trimmed(tokens: Tensor) -> Tensor:
    """[B, L, D] -> [B, L', D]: without the places that are padding in every text; one stays."""
    used = (~padding(tokens)).any(0).nonzero()  # [places, 1]
    return tokens[:, : int(used.max()) + 1 if len(used) else 1]


def short(text: str, most: int = 40) -> str:
    """As a message or a drawing shows it."""
    return text if len(text) <= most else text[: most - 3] + "..."
