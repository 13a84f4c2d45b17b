"""The forms in which pictures lie on the disk. Each file holds `size` neighbours, and its name says which ones.

    png           000123.png, with all facts inside; from 10,000 on in folders of a thousand: 012/012345.png
    npz           samples_00000000-00009999.npz           images uint8 [N, H, W, C], labels int64 [N] where there are any
    safetensors   samples_00000000-00009999.safetensors   the same
    parquet       samples_00000000-00009999.parquet       rows of image {bytes, path}, label, index, as `datasets` lays them out

A file's name and bytes depend on the question and on the numbers of its pictures alone, not on n: more pictures are more files.
"""

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from diffusion_cli import drawing

FLAT = 10_000  # pictures that lie in the folder itself when each is a file; file systems and people dislike more


@dataclass(frozen=True)
class Format(ABC):
    """size: pictures in a file; classes: names of the labels; asked: the question, kept in the file where it has a place."""

    size: int
    classes: Sequence[str]
    asked: Mapping[str, Any]

    suffix = ""

    def name(self, first: int, stop: int) -> str:
        """The file of pictures first .. stop - 1, within the folder."""
        return f"samples_{first:08d}-{stop - 1:08d}{self.suffix}"

    @abstractmethod
    def encode(self, pixels: Tensor, first: int, labels: Sequence[int] | None) -> bytes:
        """uint8 [N, C, H, W] and N labels -> the file. The same bytes for the same arguments."""

    @abstractmethod
    def decode(self, data: bytes, count: int) -> Tensor:
        """The first `count` pictures of a file, uint8 [N, C, H, W]."""


class Png(Format):
    suffix = ".png"

    def name(self, first: int, stop: int) -> str:
        return f"{first:06d}.png" if first < FLAT else f"{first // 1000:03d}/{first:06d}.png"

    def encode(self, pixels: Tensor, first: int, labels: Sequence[int] | None) -> bytes:
        facts = {**self.asked, "index": first, "label": None if labels is None else labels[0]}
        return drawing.png(drawing.image_of(pixels[0]), facts)

    def decode(self, data: bytes, count: int) -> Tensor:
        return _pixels(data)[None]


class Npz(Format):
    suffix = ".npz"

    def encode(self, pixels: Tensor, first: int, labels: Sequence[int] | None) -> bytes:
        file = io.BytesIO()
        np.savez_compressed(file, **{name: tensor.numpy() for name, tensor in _arrays(pixels, labels).items()})
        return file.getvalue()

    def decode(self, data: bytes, count: int) -> Tensor:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            return torch.from_numpy(stored["images"][:count]).permute(0, 3, 1, 2)


class Safetensors(Format):
    suffix = ".safetensors"

    def encode(self, pixels: Tensor, first: int, labels: Sequence[int] | None) -> bytes:
        facts = {"diffusion": json.dumps({**self.asked, "index": first})}  # one key: the order of several is not fixed
        return safetensors.torch.save(_arrays(pixels, labels), facts)

    def decode(self, data: bytes, count: int) -> Tensor:
        return safetensors.torch.load(data)["images"][:count].permute(0, 3, 1, 2)


class Parquet(Format):
    suffix = ".parquet"

    def encode(self, pixels: Tensor, first: int, labels: Sequence[int] | None) -> bytes:
        import pyarrow
        from pyarrow import parquet

        images = [
            {"bytes": drawing.png(drawing.image_of(picture)), "path": f"{first + i:06d}.png"}
            for i, picture in enumerate(pixels)
        ]
        columns: dict[str, Any] = {"image": images}
        features: dict[str, Any] = {"image": {"_type": "Image"}}
        types = [("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))]
        if labels is not None:
            columns["label"] = labels
            features["label"] = {"names": list(self.classes), "_type": "ClassLabel"}
            types.append(("label", pyarrow.int64()))
        columns["index"] = range(first, first + len(pixels))
        features["index"] = {"dtype": "int64", "_type": "Value"}
        types.append(("index", pyarrow.int64()))
        facts = {"huggingface": json.dumps({"info": {"features": features}}), "diffusion": json.dumps(dict(self.asked))}
        table = pyarrow.table(columns, schema=pyarrow.schema(types, metadata=facts))
        file = io.BytesIO()
        parquet.write_table(table, file, row_group_size=1000)
        return file.getvalue()

    def decode(self, data: bytes, count: int) -> Tensor:
        from pyarrow import parquet

        groups = parquet.ParquetFile(io.BytesIO(data)).iter_batches(count, columns=["image"])
        return torch.stack([_pixels(cell["bytes"]) for cell in next(groups).column("image").to_pylist()])


FORMATS: dict[str, type[Format]] = {"png": Png, "npz": Npz, "safetensors": Safetensors, "parquet": Parquet}


def _arrays(pixels: Tensor, labels: Sequence[int] | None) -> dict[str, Tensor]:
    told = {} if labels is None else {"labels": torch.tensor(labels, dtype=torch.int64)}
    return {"images": pixels.permute(0, 2, 3, 1).contiguous(), **told}


def _pixels(encoded: bytes) -> Tensor:
    """uint8 [C, H, W] of a PNG of ours."""
    array = np.array(Image.open(io.BytesIO(encoded)))
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
