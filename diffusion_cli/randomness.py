"""Randomness is counted, not saved: every draw is a function of (seed, stream, step, slot, element).

A slot is a place in the global batch while training and the picture's index while sampling. So resuming needs the step
alone, and picture i of a seed is the same at any batch size, on any number of processes, on a CPU and on a GPU (up to the
rounding of log and cos).

The generator is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 15):
element e of key k is mix(k + (e + 1) * gamma), one independent sequence for each key. Pairs of its 32-bit halves become
normal variates by Box and Muller (1958).
"""

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """The 64-bit word as the int64 that torch counts in (two's complement; products wrap)."""
    word &= 2**64 - 1
    return word - 2**64 if word >= 2**63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: int64 has only the arithmetic one."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def word_of(*parts: object) -> int:
    """A 63-bit number from any printable parts: stable over processes and versions of Python, unlike hash()."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Source:
    """Draws for a batch. seed: the run's; slots [B] int64, on the device where draws are wanted; step: the counter."""

    seed: int
    slots: Tensor
    step: int = 0

    def at(self, step: int) -> "Source":
        return replace(self, step=step)

    def key(self, stream: str) -> int | Tensor:
        """What tells the draws of this seed, stream and step from all others: 64 bits."""
        return _signed(word_of(self.seed, stream, self.step) << 1)

    def _words(self, stream: str, count: int) -> Tensor:
        key = _mix(self.slots * _GAMMA + self.key(stream))  # [B]
        element = torch.arange(1, count + 1, device=self.slots.device)  # [count]
        return _mix(key[:, None] + element * _GAMMA)  # [B, count]

    def uniform(self, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
        """[B, *shape] float32 in the open interval (0, 1): 23 bits and a half, so that neither end is ever drawn."""
        words = self._words(stream, math.prod(shape))
        return ((_shift(words, 41).float() + 0.5) * 2.0**-23).view(-1, *shape)

    def normal(self, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
        """[B, *shape] float32, standard normal, within +-6.8."""
        count = math.prod(shape)
        words = self._words(stream, (count + 1) // 2)  # each word gives two
        radius = torch.sqrt(-2 * torch.log((_shift(words, 32).float() + 0.5) * 2.0**-32))
        angle = (words & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
        pair = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)  # [B, words, 2]
        return pair.flatten(1)[:, :count].reshape(-1, *shape)


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """[size] int64: the order in which epoch number `epoch` visits the pictures."""
    generator = torch.Generator().manual_seed(word_of(seed, "order", epoch))
    return torch.randperm(size, generator=generator)


def visited(seed: int, first: int, count: int, size: int) -> Tensor:
    """[count] int64: the pictures at places first, first + 1, ... of the endless sequence of epochs.

    Its place is all that a resumed run needs to know. A batch may cross from one epoch into the next.
    """
    found, filled = torch.empty(count, dtype=torch.int64), 0  # first of all, so that what no memory holds is refused at once
    while filled < count:
        epoch, start = divmod(first + filled, size)
        part = permutation(seed, epoch, size)[start : start + count - filled]
        found[filled : filled + len(part)] = part
        filled += len(part)
    return found
