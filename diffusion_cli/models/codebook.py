"""A codebook: every vector becomes the nearest of K codes, and learns as if it had passed unchanged.

    i = argmin_k |z - e_k|^2,   quantised = z + sg(e_i - z),   sg: no gradient

    by gradient:   L = |sg(z) - e_i|^2 + commitment |z - sg(e_i)|^2
    by averages:   n_k <- d n_k + (1 - d) (vectors at k),   m_k <- d m_k + (1 - d) (their sum),   e_k = m_k / n_k

van den Oord et al. 2017, "Neural discrete representation learning", equation 3 and appendix A.1. A code whose average count
fell below a tenth of what it would be if all were used equally is placed on a vector of the batch, as in Dhariwal et al. 2020,
"Jukebox", section 3.2 (there: below one vector), which also finds the first codes.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion_cli.collectives import gathered
from diffusion_cli.randomness import Source

LEAST = 0.1  # of an equal share of a batch's vectors


class Found(NamedTuple):
    """quantised [B, c, h, w]; to_code, to_vector [B]: mean squared distance, with a gradient to the vectors, and to the codes;
    shares [B, K]: of each picture's vectors that fell to each code."""

    quantised: Tensor
    to_code: Tensor
    to_vector: Tensor
    shares: Tensor


class Codebook(nn.Module):
    """K codes of `width` numbers. decay: None where they are learned by gradient."""

    counts: Tensor  # [K]
    sums: Tensor  # [K, c]

    def __init__(self, codes: int, width: int, decay: float | None):
        super().__init__()
        self.decay = decay
        self.embedding = nn.Embedding(codes, width)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)
        if decay is not None:
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("counts", torch.zeros(codes))
            self.register_buffer("sums", torch.zeros(codes, width))

    def nearest(self, z: Tensor) -> Tensor:
        """z [B, c, h, w] -> [B, h w] int64. In float32, or near codes would be confused under autocast."""
        codes = self.embedding.weight.float()  # [K, c]
        with torch.autocast(z.device.type, enabled=False):
            vectors = z.detach().float().flatten(2).transpose(1, 2)  # [B, N, c]
            return (codes.square().sum(1) - 2 * vectors @ codes.T).argmin(2)  # [B, N]

    def forward(self, z: Tensor) -> Found:
        ids = self.nearest(z)  # [B, N]
        codes = self.embedding(ids).transpose(1, 2).view_as(z)  # [B, c, h, w]
        to_code = (z - codes.detach()).square().flatten(1).mean(1)  # [B]
        to_vector = (z.detach() - codes).square().flatten(1).mean(1) if self.decay is None else torch.zeros_like(to_code)
        ones = torch.full(ids.shape, 1 / ids.shape[1], device=z.device)
        shares = torch.zeros(len(z), len(self.embedding.weight), device=z.device).scatter_add(1, ids, ones)  # [B, K]
        return Found(z + (codes - z).detach(), to_code, to_vector, shares)

    @torch.no_grad()
    def update(self, z: Tensor, source: Source) -> None:
        """The averages after one more batch [B, c, h, w] and those of other processes; source: for the places of codes that
        are out of use."""
        if self.decay is None:
            return
        z, source = gathered(z), replace(source, slots=gathered(source.slots))
        codes = self.embedding.weight
        with torch.autocast(z.device.type, enabled=False):
            chosen = (self.nearest(z).flatten()[:, None] == torch.arange(len(codes), device=z.device)).float()  # [B N, K]
            vectors = z.float().flatten(2).transpose(1, 2).flatten(0, 1)  # [B N, c]
            self.counts.lerp_(chosen.sum(0), 1 - self.decay)  # [K]
            self.sums.lerp_(chosen.T @ vectors, 1 - self.decay)  # [K, c]; a product of matrices: the same on every run
        draws = source.uniform("codes", (-(-len(codes) // len(source.slots)),)).flatten()[: len(codes)]  # [K]
        anew = vectors[(draws * len(vectors)).long()]  # [K, c]
        equal = len(vectors) / len(codes)
        unused = self.counts < LEAST * equal  # [K]
        self.counts.copy_(torch.where(unused, equal, self.counts))
        self.sums.copy_(torch.where(unused[:, None], equal * anew, self.sums))
        codes.copy_(self.sums / self.counts[:, None])
