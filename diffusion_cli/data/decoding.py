"""From an encoded picture to uint8 [C, size, size]: any mode, any orientation, and nothing but a clear error for bad bytes.

Pillow reads the five formats below and no other: its rarer decoders are where the security holes were.
"""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Encoded = bytes | Path | np.ndarray  # a file's content, a file, or bare pixels uint8 [H, W] or [H, W, 3]
Resize = Literal["squeeze", "crop", "pad"]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 64_000_000  # of one picture; Pillow itself only warns up to 179 million


class Unreadable(Exception):
    """The picture cannot be decoded; the message says why."""


def decode(encoded: Encoded, *, size: int, channels: int, resize: Resize) -> np.ndarray:
    """uint8 [channels, size, size]. Raises Unreadable, whatever is wrong with the bytes."""
    from PIL import Image

    try:
        image = Image.fromarray(encoded) if isinstance(encoded, np.ndarray) else _open(encoded, size)
        image = _convert(image, "L" if channels == 1 else "RGB")
        image = FIT[resize](image, size)
    # Pillow lets the errors of its decoders through; DecompressionBombError is not even an OSError
    except (OSError, EOFError, ValueError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise Unreadable(_reason(error)) from None
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _reason(error: Exception) -> str:
    """One line, without the path, which the caller knows, and without addresses of objects."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"not a picture ({', '.join(FORMATS)})"
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


def _open(encoded: bytes | Path, size: int) -> "Image":
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata, and large pictures: the limit is below
        image = Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels")
        image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at 1/2, 1/4 or 1/8, never below twice the size
        return ImageOps.exif_transpose(image)


def _convert(image: "Image", mode: str) -> "Image":
    """To grey or RGB. Transparent pixels lie on white; 16 bits are scaled to 8 (Pillow alone would clip them)."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode in ("CMYK", "P"):
        image = image.convert("RGB")
    image.load()
    return image if image.mode == mode else image.convert(mode)


def _squeeze(image: "Image", size: int) -> "Image":
    """The whole picture, its proportions lost."""
    return _resized(image, size, size)


def _crop(image: "Image", size: int) -> "Image":
    """The shorter side becomes `size`; the middle of the longer one is kept."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return _resized(image, width, height).crop((left, top, left + size, top + size))


def _pad(image: "Image", size: int) -> "Image":
    """The longer side becomes `size`; the rest is black."""
    from PIL import Image

    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    padded = Image.new(image.mode, (size, size))
    padded.paste(_resized(image, width, height), ((size - width) // 2, (size - height) // 2))
    return padded


def _resized(image: "Image", width: int, height: int) -> "Image":
    from PIL import Image

    # Pillow's filters average over all source pixels when they shrink (Parmar et al. 2022); the same size is left untouched
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


FIT = {"squeeze": _squeeze, "crop": _crop, "pad": _pad}
