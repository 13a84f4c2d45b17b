"""Layers that keep the magnitude of what passes through: of inputs of unit variance they make outputs of unit variance.

    weights       w = g v / |v|   for each output;  while it trains, v itself is kept at |v| = sqrt(N), N inputs      eq. 47, 66
    silu          silu(x) / 0.596                                                                                    eq. 81
    sum           ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)                                                          eq. 88
    joined        sqrt((N_a + N_b) / ((1 - t)^2 + t^2)) [ (1 - t) / sqrt(N_a) a,  t / sqrt(N_b) b ]                  eq. 103
    waves         sqrt(2) cos(2 pi (bandwidth g_i time + p_i)),  g_i Gaussian, p_i uniform, drawn once               eq. 75
    of unit size  x / rms(x), over the channels of a pixel                                                           eq. 30

Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models" (EDM2), appendix B. Nothing here has a
bias. As v keeps its length, the learning rate alone says how fast a layer turns, the same for all, and it must fall over a run.
"""

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

_EPS = 1e-4


def unit(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """x with a root mean square of 1 along the dimensions."""
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    return x / (_EPS + length * (length.numel() / x.numel()) ** 0.5).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    return nnf.silu(x) / 0.596


def mixed(a: Tensor, b: Tensor, t: float) -> Tensor:
    """A sum with the share t of b."""
    return ((1 - t) * a + t * b) / ((1 - t) ** 2 + t**2) ** 0.5


def joined(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """[B, N_a, ...] and [B, N_b, ...] to [B, N_a + N_b, ...]: either contributes by t and not by its number of channels."""
    n_a, n_b = a.shape[1], b.shape[1]
    c = ((n_a + n_b) / ((1 - t) ** 2 + t**2)) ** 0.5
    return torch.cat([c * (1 - t) / n_a**0.5 * a, c * t / n_b**0.5 * b], dim=1)


class Kept(nn.Module):
    """A tensor of weights of which only the direction along some dimensions counts; in training its length is kept at sqrt(N).

    It is put back to that at the beginning of a forward pass with gradients, before it is read: the optimizer's last step
    lengthened it a little, and nothing depends on the length but how far the next step turns it.
    """

    def __init__(self, shape: tuple[int, ...], dims: tuple[int, ...]):
        super().__init__()
        self.dims = dims
        self.weight = nn.Parameter(torch.randn(shape))

    def direction(self) -> Tensor:
        """The weights at length 1, float32."""
        if self.training and torch.is_grad_enabled():
            # .data: a first pass of the same step may have kept the weights for its gradient, to which this is no change.
            self.weight.data.copy_(unit(self.weight.detach(), self.dims))
        v = self.weight.float()
        return v / (_EPS + torch.linalg.vector_norm(v, dim=self.dims, keepdim=True))


class Weights(Kept):
    """A linear map of the last dimension (kernel 0), or a convolution."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 0):
        super().__init__((c_out, c_in, kernel, kernel) if kernel else (c_out, c_in), (1, 2, 3) if kernel else (1,))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w = (gain * self.direction()).to(x.dtype)
        return nnf.linear(x, w) if w.ndim == 2 else nnf.conv2d(x, w, padding=w.shape[-1] // 2)


class Table(Kept):
    """Labels [B] to [B, width]: a linear map of sqrt(N) times the one-hot label, its weights as [N, width]."""

    def __init__(self, rows: int, width: int):
        super().__init__((rows, width), (0,))

    def forward(self, labels: Tensor) -> Tensor:
        return nnf.embedding(labels, len(self.weight) ** 0.5 * self.direction())


class Waves(nn.Module):
    """[B] float32 to [B, width]."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int, bandwidth: float):
        super().__init__()
        self.register_buffer("frequencies", bandwidth * torch.randn(width))
        self.register_buffer("phases", torch.rand(width))

    def forward(self, time: Tensor) -> Tensor:
        turns = time.float()[:, None] * self.frequencies + self.phases  # [B, width]
        return 2**0.5 * torch.cos(2 * math.pi * turns)
