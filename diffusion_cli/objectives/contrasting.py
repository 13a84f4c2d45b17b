"""Training a picture and a text encoder on captioned pictures: each picture finds its caption in the batch, and the reverse.

    s_ij = exp(logit_scale) u_i . v_j
    L_i  = -1/2 log softmax_j(s_ij)[i] - 1/2 log softmax_j(s_ji)[i]

Symmetric InfoNCE: Radford et al. 2021, "Learning transferable visual models from natural language supervision", figure 3 (after
van den Oord et al. 2018). The temperature exp(-logit_scale) is learned, and kept from falling below 1/100 as there. A picture
with the same caption is no negative: its place is left out of the sum. Negatives are those of the same part of a batch on the
same process, so trainer.accumulate makes the task easier. Of schedule, loss, sampler and guidance nothing has a meaning here.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as nnf
from PIL.Image import Image
from torch import Tensor, nn

from diffusion_cli import drawing
from diffusion_cli.conditioning import short
from diffusion_cli.conditioning.tokenizer import SMALLEST, Tokenizer
from diffusion_cli.data import Batch, Pictures
from diffusion_cli.data.pixels import to_float
from diffusion_cli.evaluation.retrieval import cosines, retrieval
from diffusion_cli.models import Clip
from diffusion_cli.objectives.captions import captions
from diffusion_cli.objectives.denoising import gather
from diffusion_cli.objectives.objective import Objective, Tally
from diffusion_cli.randomness import Source
from diffusion_cli.ranges import NonNegativeInt, PositiveFloat, PositiveInt

NEAREST = 5  # pictures in a row of the preview
_RIGHT = (0, 158, 115)  # the frame of a right picture


class Contrasting(Objective):
    """vocabulary: entries of the tokenizer at most; sharpest: largest exp(logit_scale); shift: a picture is moved by up to
    so many pixels each way while training, its edge repeated. ValueError: a vocabulary too small for bytes and marks.
    """

    shown = "found"
    example = "diffusion-report {run}"
    coupled = True

    def __init__(
        self, clip: Clip, tokenizer: Tokenizer, vocabulary: PositiveInt, sharpest: PositiveFloat, shift: NonNegativeInt
    ):
        super().__init__()
        if vocabulary < SMALLEST:
            raise ValueError(f"vocabulary is {vocabulary}: it holds 256 bytes and 3 marks, so choose {SMALLEST} or more")
        self.clip, self.tokenizer = clip, tokenizer
        self.sharpest, self.shift = sharpest, shift
        self.tokens: Tensor | None = None  # [N, L] int32 of the trained captions, L the longest of them
        self.caption: Tensor | None = None  # [N] int64: equal where captions are

    @property
    def network(self) -> nn.Module:
        return self.clip

    def meet(self, pictures: Pictures, device: torch.device, flip: bool) -> None:
        tokens = self._tokens(captions(pictures))  # [N, L]
        self.caption = torch.unique(tokens, dim=0, return_inverse=True)[1].to(device)
        self.tokens = tokens.int().to(device)

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        """int64 [N, L], L the longest of them: causal attention gives the same without the padding behind."""
        ids, mask, _ = self.tokenizer.encode(texts, self.clip.length)
        return ids[:, : int(mask.sum(1).max())]

    def loss(self, batch: Batch, source: Source) -> tuple[Tensor, Mapping[str, Tally]]:
        assert self.tokens is not None and self.caption is not None, "meet() comes first"
        with torch.no_grad():  # the weight itself: a clamp in the formula would leave it without gradient beyond
            self.clip.logit_scale.clamp_(max=math.log(self.sharpest))
        images, texts = self.clip(self._shifted(batch.x, source), self.tokens[batch.ids].long())  # [B, E] each
        same = self.caption[batch.ids]  # [B]
        logits = self.clip.logit_scale.exp() * cosines(images, texts)  # [B, B]
        loss = info_nce(logits, same)
        nearest = same[logits.argmax(1)]
        one = torch.ones_like(loss[0].detach())
        right = (nearest == same).to(loss)
        tallies = {
            "accuracy": Tally(right.sum(), one * len(right)),
            "temperature": Tally((-self.clip.logit_scale).detach().exp().to(one), one),
        }
        return loss, tallies

    def _shifted(self, x: Tensor, source: Source) -> Tensor:
        """[B, C, H, W], each moved by a draw of its own; what is left free repeats the edge."""
        if self.shift == 0:
            return x
        by = (source.uniform("shift", (2,)) * (2 * self.shift + 1)).long() - self.shift  # [B, 2]
        places = torch.arange(x.shape[-1], device=x.device)
        down, right = ((places + by[:, i, None]).clamp(0, x.shape[-1] - 1) for i in range(2))  # [B, H], [B, W]
        rows = x.gather(2, down[:, None, :, None].expand_as(x))
        return rows.gather(3, right[:, None, None, :].expand_as(x))

    def figure_names(self, tally: str) -> list[str]:
        raise KeyError(tally)  # every tally is one figure

    @torch.no_grad()
    def preview(self, pictures: Pictures, source: Source) -> Mapping[str, Image]:
        """`found`: captions, and the pictures nearest to each with their cosines; the right ones are framed."""
        count = min(len(pictures), len(source.slots))
        images, texts, own, names = self._embedded(pictures, count, source, 256)
        asked = texts[:10]
        cosine, ids = cosines(asked, images).topk(min(NEAREST, count), dim=1)  # [10, NEAREST]
        named, said = {}, {}
        for row, name in enumerate(names[: len(asked)]):
            shown = gather(pictures, ids[row].cpu()).cpu().clone()
            right = (own[ids[row]] == row).tolist()
            colour = shown if shown.shape[1] == 3 else shown.expand(-1, 3, -1, -1).clone()
            for place in range(len(colour)):
                if right[place]:
                    _frame(colour[place])
            key = f"{row + 1}  {short(name)}"
            named[key] = colour
            said[key] = [f"{value:.2f}" for value in cosine[row].tolist()]
        return {"found": drawing.rows(named, captions=said)}

    @torch.no_grad()
    def evaluate(self, pictures: Pictures, source: Source, batch: int) -> dict[str, float]:
        """Retrieval at 1 and 5 among `pictures_asked` pictures with their chances, and the loss among all of them at once."""
        count = min(len(pictures), len(source.slots))
        images, texts, own, _ = self._embedded(pictures, count, source, batch)
        scale = self.clip.logit_scale.exp().clamp(max=self.sharpest)
        loss = info_nce(scale * cosines(images, texts[own]), own).mean()
        return {"loss": float(loss), "pictures_asked": float(count), **retrieval(images, texts, own)}

    def _embedded(self, pictures: Pictures, count: int, source: Source, batch: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """images [N, E], different texts [U, E], own [N]: the text of each picture; names: the U texts, in order of coming."""
        device = source.slots.device
        whole = captions(pictures)[:count]
        keys = [tuple(row) for row in self._tokens(whole).tolist()]  # equal where captions are, but for capitals and spaces
        first_of = {key: place for place, key in reversed(list(enumerate(keys)))}
        names = [whole[place] for place in sorted(first_of.values())]
        numbers = {keys[place]: number for number, place in enumerate(sorted(first_of.values()))}
        own = torch.tensor([numbers[key] for key in keys], device=device)  # [N]
        tokens = self._tokens(names).to(device)
        parts = [torch.arange(first, min(first + batch, count)) for first in range(0, count, batch)]
        images = torch.cat([self.clip.pictures(to_float(gather(pictures, ids)).to(device)) for ids in parts])
        texts = torch.cat([self.clip.texts(tokens[first : first + batch]) for first in range(0, len(tokens), batch)])
        return images, texts, own, names


def info_nce(logits: Tensor, same: Tensor) -> Tensor:
    """[B]: the mean of both cross-entropies of logits [B, B], rows and columns; same [B]: pairs of equal number are no
    negatives of each other."""
    other = (same[:, None] == same[None, :]) & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = logits.masked_fill(other, -torch.inf)
    target = torch.arange(len(same), device=same.device)
    return (nnf.cross_entropy(logits, target, reduction="none") + nnf.cross_entropy(logits.T, target, reduction="none")) / 2


def _frame(picture: Tensor) -> None:
    """Draws a frame of a tenth of its side into uint8 [3, H, W]."""
    colour, side = torch.tensor(_RIGHT, dtype=torch.uint8)[:, None, None], max(1, picture.shape[-1] // 20)
    for edge in (picture[:, :side], picture[:, -side:], picture[:, :, :side], picture[:, :, -side:]):
        edge[:] = colour
