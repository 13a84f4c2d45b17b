"""A folder of picture files: labels from subfolders, or labels and captions from metadata.csv or metadata.jsonl.

pictures/cat/1.png                 pictures/train/cat/1.png            pictures/1.png
pictures/dog/any/depth/2.jpg       pictures/test/cat/2.png             pictures/metadata.csv: file_name,label,text
"""

import csv
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion_cli.data.dataset import Dataset, Raw, class_names, existing
from diffusion_cli.data.decoding import Encoded
from diffusion_cli.errors import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class Files:
    """Picture files, by path."""

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, rows: list[int]) -> list[Encoded]:
        return [Path(self.paths[row]) for row in rows]

    def name(self, row: int) -> str:
        return self.paths[row]


@dataclass(frozen=True)
class Entry:
    """One picture and what is known of it."""

    path: str
    label: str | None = None
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Folder(Dataset):
    """path: the folder. Where it has a subfolder called like the split, that one is read; else all of it is `train`."""

    path: str

    def read(self, split: str) -> Raw | None:
        found = self._entries(split)
        if found is None:
            return None
        if not found:
            raise DataError(f"dataset.path={self.path}: there is no picture in it ({', '.join(EXTENSIONS)})")
        # the classes of both splits, so that a number means the same in both
        every = [entry for other in dict.fromkeys((split, self.split, "test")) for entry in self._entries(other) or []]
        classes = class_names(entry.label for entry in every if entry.label is not None)
        number = {name: number for number, name in enumerate(classes)}
        labelled = all(entry.label is not None for entry in found)
        told = all(entry.text is not None for entry in found)
        return Raw(
            Files([entry.path for entry in found]),
            np.array([number[str(entry.label)] for entry in found], dtype=np.int64) if labelled else None,
            classes if labelled else (),
            tuple(str(entry.text) for entry in found) if told else None,
        )

    def _entries(self, split: str) -> list[Entry] | None:
        root = existing(Path(self.path))
        if not root.is_dir():
            raise DataError(f"dataset.path={self.path} is a file; dataset=folder wants a folder, dataset=parquet takes a file")
        if (root / split).is_dir():
            root = root / split
        elif split != "train":
            return None
        if (root / "metadata.csv").is_file():
            return list(_stated(root / "metadata.csv", _csv_rows))
        if (root / "metadata.jsonl").is_file():
            return list(_stated(root / "metadata.jsonl", _json_rows))
        found = sorted(_walk(root))
        parts = [Path(path).relative_to(root).parts for path in found]
        in_classes = all(len(part) > 1 for part in parts)  # one stray file means that the subfolders are no classes
        return [Entry(path, part[0] if in_classes else None) for path, part in zip(found, parts, strict=True)]


def _walk(root: Path) -> Iterator[str]:
    """Picture files below root. Links are followed, each folder once, so a link to a folder above does no harm."""
    seen = set()
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        yield from (os.path.join(folder, name) for name in files if name.lower().endswith(EXTENSIONS) and name[0] != ".")


def _csv_rows(file: Path) -> Iterator[dict]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        yield from csv.DictReader(lines)


def _json_rows(file: Path) -> Iterator[dict]:
    with file.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _stated(file: Path, rows_of: Callable[[Path], Iterator[dict]]) -> Iterator[Entry]:
    """The entries of a metadata file, in its order."""
    try:
        for number, row in enumerate(rows_of(file), 1):
            name = row.get("file_name") if isinstance(row, dict) else None
            if not name or not isinstance(name, str):
                raise ValueError(f"entry {number} has no file_name")
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"entry {number} leads out of the folder: {name}")
            label, text = row.get("label"), row.get("text")
            yield Entry(
                str(file.parent / name), None if label in (None, "") else str(label), None if text is None else str(text)
            )
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{file}: {error}") from None
