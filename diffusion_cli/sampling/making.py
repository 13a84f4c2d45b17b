"""The work itself: walks batch by batch, and writes each file as soon as its pictures are there."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_cli.data.pixels import to_uint8
from diffusion_cli.devices import Compute
from diffusion_cli.distributed import process
from diffusion_cli.sampling.maker import Maker
from diffusion_cli.sampling.seeing import Film
from diffusion_cli.sampling.together import give_up
from diffusion_cli.sampling.writing import Album, batches_for, fill
from diffusion_cli.signals import StopRequest


@dataclass(frozen=True)
class Work:
    """batch: pictures at a time; film: what is kept of the walk of the first batch."""

    album: Album
    maker: Maker
    film: Film
    batch: int
    compute: Compute

    def do(self, files: Sequence[int], stop: StopRequest) -> float:
        """Makes and writes those of the files that are not there; the most seconds between two writes. Raises Stopped."""
        todo = self.album.absent(files).tolist()
        numbers = batches_for(self.album, todo, self.batch)
        if self.film.wanted and numbers[:1] != [0]:
            numbers = [0, *numbers]
        slowest, since, written = 0.0, time.perf_counter(), 0
        with torch.inference_mode(), self.compute.precision():
            for pixels in fill(self.album, todo, self._batches(numbers, stop)):
                self.album.write(pixels)
                written += self.album.pictures(pixels)
                slowest, since = max(slowest, time.perf_counter() - since), time.perf_counter()
                if stop.number:
                    break
        lacking = self.album.pictures(todo) - written
        if stop.number and lacking:
            give_up(stop, f"with {lacking:,} pictures left to make")
        return slowest

    def _batches(self, numbers: Sequence[int], stop: StopRequest) -> Iterator[tuple[int, Tensor]]:
        """(number of the first picture, uint8 [B, C, H, W]) of these batches; ends early after a signal."""
        length = self.maker.sampler.length(self.maker.denoiser.schedule)
        total = None if length is None else len(numbers) * length
        silent = None if process().first else True
        with tqdm(total=total, unit="step", disable=silent, leave=False) as bar:
            for number in numbers:
                first = number * self.batch
                ids = torch.arange(first, min(first + self.batch, self.album.n), device=self.compute.device)
                for state in self.maker.states(ids):
                    bar.update(state.step > 0)
                    if number == 0:
                        self.film.see(state, self.maker.codec)
                    if stop.number:
                        return
                if number == 0:
                    self.film.draw(self.album.folder)
                yield first, to_uint8(self.maker.pictures(state.x)).cpu()
