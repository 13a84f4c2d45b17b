"""What a network is told of a picture beside its pixels, as one vector for all of its blocks.

    emb = silu(time + class, or mean of a text + how the picture was moved)

Ho and Salimans 2022; Saharia et al. 2022, section 2.3; Karras et al. 2022, appendix F.2.
"""

import torch.nn.functional as nnf
from torch import Tensor

from diffusion_cli.models.network import Network
from diffusion_cli.models.texts import Text, TextEmbedding
from diffusion_cli.models.time_embedding import TimeEmbedding


class Told(Network):
    """A network whose constructor calls `hear` where these weights stand among its own."""

    def hear(self, time_embedding: TimeEmbedding, width: int) -> None:
        """width: E, that of the embedding of time."""
        self.time_embedding = time_embedding
        self.class_embedding = self.class_table(width)
        self.augment_embedding = self.augment_table(width)
        self.text_embedding = TextEmbedding(self.text_width, width) if self.text_width else None

    def heard(self, x: Tensor, time: Tensor, cond: Tensor | None, augment: Tensor | None) -> tuple[Tensor, Text | None]:
        """emb [B, E], and the text for those blocks that read it."""
        emb, text = self.time_embedding(time), None  # [B, E]
        if self.text_embedding is not None:
            text, pooled = self.text_embedding(cond)
            emb = emb + pooled  # [B, E]
        elif (labels := self.labels(x, cond)) is not None:
            emb = emb + self.class_embedding(labels)  # [B, E]
        if augment is not None:
            emb = emb + self.augment_embedding(augment)  # [B, E]
        return nnf.silu(emb), text
