"""Batch number `step` is a function of (seed, step): its pictures, their order and their flips.

So a resumed run needs the step alone, and nothing depends on workers, processes or what was read before. Pictures in memory
are gathered, flipped and normalised on the device, the whole batch at once; streamed ones are decoded by workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_cli.data.pictures import Pictures, Skipped, Streamed
from diffusion_cli.data.pixels import to_float
from diffusion_cli.pace import Pace
from diffusion_cli.randomness import Source, visited


@dataclass(frozen=True)
class Batch:
    """x: float32 [B, C, H, W] in [-1, 1]; label: int64 [B], or None where the set has none; ids: int64 [B], which pictures;
    mirrored: bool [B], or None where no picture is."""

    x: Tensor
    label: Tensor | None
    ids: Tensor
    mirrored: Tensor | None = None

    def part(self, here: slice) -> "Batch":
        """Some of its pictures."""
        label, mirrored = (None if one is None else one[here] for one in (self.label, self.mirrored))
        return Batch(self.x[here], label, self.ids[here], mirrored)


class Batches:
    """The endless sequence of batches.

    pace: pictures in a batch, over all processes; process `rank` of `world` gets its own part of every batch, slots
    rank * size / world and following. flip: mirror each picture left to right with probability 1/2. Raises DataError when a
    worker dies or more pictures than allowed cannot be read (streamed pictures only: others were checked when read).
    """

    def __init__(
        self,
        pictures: Pictures,
        pace: Pace,
        seed: int,
        flip: bool = False,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ):
        if pace.batch % world:
            raise ValueError(f"a batch of {pace.batch} pictures cannot be shared equally by {world} processes")
        self.pace, self.seed, self.flip, self.device = pace, seed, flip, torch.device(device)
        self.rank, self.world = rank, world
        self.pictures, self.images = pictures, pictures.images
        self.skipped: dict[str, Skipped] = {}  # met while streaming, by name
        if isinstance(self.images, Tensor) and _fits(self.images, self.device):
            self.images = self.images.to(self.device)
        self.labels = None if pictures.labels is None else pictures.labels.to(self.device)

    def starting_at(self, step: int) -> Iterator[Batch]:
        """Batches number step, step + 1, ... without end."""
        return self._streamed(self.images, step) if isinstance(self.images, Streamed) else self._gathered(self.images, step)

    def _ids(self, step: int) -> Tensor:
        """[B] int64: the pictures of this process in batch number `step`."""
        own = self.pace.size(step) // self.world
        return visited(self.seed, self.pace.seen(step) + self.rank * own, own, len(self.pictures))

    def _gathered(self, images: Tensor, step: int) -> Iterator[Batch]:
        while True:
            ids = self._ids(step)
            yield self._batch(images.index_select(0, ids.to(images.device)), ids, step)
            step += 1

    def _streamed(self, images: Streamed, step: int) -> Iterator[Batch]:
        from diffusion_cli.data.streaming import decoded, mended

        def numbers(step: int) -> Iterator[list[int]]:
            while True:
                yield self._ids(step).tolist()
                step += 1

        for found in decoded(images, numbers(step)):
            pixels, ids = mended(images, found, self.skipped)
            yield self._batch(torch.from_numpy(pixels), torch.tensor(ids), step)
            step += 1

    def _batch(self, pixels: Tensor, ids: Tensor, step: int) -> Batch:
        """pixels: uint8 [B, C, H, W], where they happen to be."""
        pixels, ids = pixels.to(self.device, non_blocking=True), ids.to(self.device, non_blocking=True)
        flipped = None
        if self.flip:
            slots = self.rank * len(ids) + torch.arange(len(ids), device=self.device)  # [B], places in the global batch
            flipped = Source(self.seed, slots, step).uniform("flip") < 0.5  # [B]
            mask = (flipped.to(torch.uint8) * 255)[:, None, None, None]
            pixels = pixels ^ ((pixels ^ pixels.flip(-1)) & mask)  # torch.where on bytes takes five times as long on a CPU
        return Batch(to_float(pixels), None if self.labels is None else self.labels[ids], ids, flipped)


def _fits(images: Tensor, device: torch.device) -> bool:
    """Whether the pictures may live on the device: at most a quarter of what is free there, the rest is for training."""
    return device.type != "cuda" or images.nbytes <= torch.cuda.mem_get_info(device)[0] / 4
