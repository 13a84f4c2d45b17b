"""Pictures of runs as WebP inside the page, each within a share of the page's budget that shrinks with their number."""

import base64
import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from diffusion_cli.report.reading import Still

BUDGET = 10_000_000  # bytes of all pictures, before base64 makes four of three
FORMATS = ("PNG", "GIF")  # what a run writes; other decoders of Pillow start programs (PostScript)
_PIXELS = 50_000_000  # of all pictures: what a lossy WebP of that budget can show
_WIDEST = 1200  # pixels of one: more than a page shows
_HUGE = 100_000_000  # pixels of a file: more is not ours


@dataclass(frozen=True)
class Picture:
    """src: a data URL; width and height in pixels."""

    src: str
    width: int
    height: int


@dataclass(frozen=True)
class Share:
    """What one picture may have: pixels, and bytes of its file."""

    pixels: int
    size: int


class Unreadable(Exception):
    """A picture that cannot be read; its text says why."""


def drawn(stills: Sequence[Still]) -> dict[Still, Picture | Unreadable]:
    """All of a page, which share its budget; for each that cannot be read the reason."""
    allowed = share(len(stills))

    def one(still: Still) -> Picture | Unreadable:
        try:
            return webp(still, allowed)
        except Unreadable as error:
            return error

    with ThreadPoolExecutor() as pool:  # Pillow lets go of Python while it reads and writes
        return dict(zip(stills, pool.map(one, stills), strict=True))


def share(count: int) -> Share:
    """Of a page with so many pictures."""
    return Share(min(_PIXELS // max(count, 1), _WIDEST**2), BUDGET // max(count, 1))


def webp(still: Still, allowed: Share) -> Picture:
    """The picture within its share: without loss where that fits, else smaller and lossy. Raises Unreadable."""
    try:
        with Image.open(still.path, formats=FORMATS) as file:
            if file.width * file.height > _HUGE:
                raise Unreadable(f"{file.width} x {file.height} pixels are too many")
            if still.frame:
                file.seek(still.frame)
            image = file.convert("RGB")
    except (OSError, ValueError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(" ".join(str(error).split())[:120] or type(error).__name__) from None
    scale = min(1.0, math.sqrt(allowed.pixels / (image.width * image.height)))
    if scale == 1.0:  # small pixels, enlarged, take a few kB so
        data = _encoded(image, lossless=True)
        if len(data) <= allowed.size:
            return _picture(image, data)
    while True:
        image = _scaled(image, scale)
        data = _encoded(image, lossless=False)
        if len(data) <= allowed.size or min(image.size) <= 16:
            return _picture(image, data)
        scale = max(0.5, 0.95 * math.sqrt(allowed.size / len(data)))


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    if scale >= 1.0:
        return image
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    return image.resize(size, Image.Resampling.BOX)  # a grid of pixels stays one


def _encoded(image: Image.Image, lossless: bool) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=lossless, quality=20 if lossless else 80, method=0)
    return file.getvalue()


def _picture(image: Image.Image, data: bytes) -> Picture:
    return Picture("data:image/webp;base64," + base64.b64encode(data).decode(), image.width, image.height)
