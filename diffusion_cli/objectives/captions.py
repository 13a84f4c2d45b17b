"""What a denoiser is told of each training picture: the tokens of its caption, each different caption encoded once."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_cli.conditioning import Conditioner, PromptCut, trimmed
from diffusion_cli.data import Pictures
from diffusion_cli.errors import DataError
from diffusion_cli.objectives.kept import kept
from diffusion_cli.runs import say


class Captions:
    """cache: tokens are made once and kept in a file; else each time that they are asked for."""

    def __init__(self, pictures: Pictures, texts: Conditioner, cache: bool, device: torch.device):
        whole = captions(pictures)
        numbers: dict[str, int] = {}
        self.number = torch.tensor([numbers.setdefault(text, len(numbers)) for text in whole], device=device)  # [N]
        self.different, self.texts = list(numbers), texts
        tokens = texts.tokenised(self.different)
        self.length = int(tokens.mask.sum(1).max()) if texts.masked else texts.length  # beyond it there is only padding
        cut = sum(map(bool, tokens.dropped))
        if cut:
            say(f"{cut:,} captions are longer than {texts.length} tokens: what is beyond is not read")
        key = (texts.digest, str(texts.masked), *self.different)
        shape = (len(self.different), self.length, texts.width)
        self.rows = kept("tokens", key, shape, self._encoded, device) if cache else self._encoded

    def __call__(self, ids: Tensor) -> Tensor:
        """[B, L, D] of the pictures of these numbers."""
        return self.rows(self.number[ids])

    def _encoded(self, numbers: Tensor) -> Tensor:
        return encoded(self.texts, [self.different[k] for k in numbers.tolist()])[:, : self.length]


def encoded(texts: Conditioner, prompts: Sequence[str]) -> Tensor:
    """[B, L, D]; what is cut was said before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptCut)
        return texts.encode(prompts)


def told_of(pictures: Pictures, ids: Tensor, texts: Conditioner | None, labels: bool) -> Tensor | None:
    """What a network is told of the pictures of these numbers: tokens [B, L, D] where texts are read, their labels [B], or
    nothing. Raises DataError."""
    if texts is not None:
        whole = captions(pictures)
        return trimmed(encoded(texts, [whole[i] for i in ids.tolist()]))
    return pictures.labels[ids] if labels and pictures.labels is not None else None


def captions(pictures: Pictures) -> tuple[str, ...]:
    """The captions of the pictures. DataError: the set has none."""
    if pictures.texts is None:
        raise DataError(
            "these pictures have no captions, and this objective learns from them: a parquet set needs a column of texts "
            "(dataset.text=NAME), a folder a metadata.csv with file_name and text"
        )
    return pictures.texts
