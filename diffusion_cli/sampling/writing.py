"""Any number of pictures as files of one folder, in bounded memory: what is there is not made again, what is half there is.

Batches are aligned: picture i is always made together with the others of batch i // batch. So its bits do not depend on what
was there before, nor on the process that makes it, nor on the form in which it is written.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_cli import storage
from diffusion_cli.sampling.formats import Format


@dataclass(frozen=True)
class Album:
    """Pictures 0 .. n - 1 of a folder in one form. label_of: the label of a picture by its number, or None."""

    folder: Path
    form: Format
    n: int
    label_of: Callable[[int], int | None]

    def __len__(self) -> int:
        """How many files."""
        return -(-self.n // self.form.size)

    def span(self, file: int) -> tuple[int, int]:
        """Pictures first .. stop - 1 are in that file."""
        return file * self.form.size, min((file + 1) * self.form.size, self.n)

    def path(self, file: int) -> Path:
        return self.folder / self.form.name(*self.span(file))

    def absent(self, among: Iterable[int]) -> np.ndarray:
        """Those of the files that are not there, int64 [K]. A file that is there is whole: it got its name last."""
        return np.fromiter((file for file in among if not self.path(file).exists()), dtype=np.int64)

    def pictures(self, files: Iterable[int]) -> int:
        """How many pictures these files hold."""
        return sum(stop - first for first, stop in map(self.span, files))

    def write(self, pixels: Mapping[int, Tensor]) -> None:
        """For each of these files all its pictures, uint8 [N, C, H, W]."""
        encoded = {self.path(file): self._encoded(file, of_file) for file, of_file in pixels.items()}
        for folder in dict.fromkeys(path.parent for path in encoded):
            if not folder.is_dir():
                storage.make_folder(folder)
        storage.write_all(encoded)

    def _encoded(self, file: int, pixels: Tensor) -> bytes:
        first, stop = self.span(file)
        labels = [label for i in range(first, stop) if (label := self.label_of(i)) is not None]
        return self.form.encode(pixels, first, labels or None)

    def head(self, count: int) -> Tensor:
        """The first pictures as they lie on the disk, uint8 [<= count, C, H, W]."""
        parts: list[Tensor] = []
        for file in range(len(self)):
            wanted = count - sum(map(len, parts))
            if wanted <= 0:
                break
            parts.append(self.form.decode(self.path(file).read_bytes(), wanted))
        return torch.cat(parts)

    def tidy(self) -> None:
        """Removes what shorter numbers left: a last file that a longer one has replaced, and files that were cut short."""
        known = {self.path(file) for file in range(len(self))} if self.form.size > 1 else set()
        for path in [*self.folder.glob(f"samples_*{self.form.suffix}"), *self.folder.glob(f".*{self.form.suffix}.tmp")]:
            if path not in known:
                storage.remove_file(path)


def batches_for(album: Album, files: Iterable[int], batch: int) -> list[int]:
    """The numbers of the batches that hold a picture of these files, rising."""
    found: dict[int, None] = {}
    for first, stop in map(album.span, files):
        found |= dict.fromkeys(range(first // batch, (stop - 1) // batch + 1))
    return list(found)


def fill(album: Album, files: Sequence[int], made: Iterable[tuple[int, Tensor]]) -> Iterator[dict[int, Tensor]]:
    """After each batch the files that it completes, if any, with their pixels uint8 [N, C, H, W].

    files: rising numbers; made: (number of the first picture, uint8 [B, C, H, W]) of the batches that they need, rising.
    No more than one unfinished file and the pictures of one batch are held, twice.
    """
    waiting = iter(files)
    file = next(waiting, None)
    pixels: Tensor | None = None
    for begin, images in made:
        end, whole = begin + len(images), dict[int, Tensor]()
        while file is not None:
            first, stop = album.span(file)
            low, high = max(first, begin), min(stop, end)
            if low < high:
                pixels = torch.empty(stop - first, *images.shape[1:], dtype=torch.uint8) if pixels is None else pixels
                pixels[low - first : high - first] = images[low - begin : high - begin]
            if stop > end:
                break
            assert pixels is not None
            whole[file] = pixels
            file, pixels = next(waiting, None), None
        if whole:
            yield whole
