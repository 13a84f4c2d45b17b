"""Pictures of pictures: grids, captioned rows, loss curves and animations, as Pillow images and as bytes of a file."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

_PAPER, _INK, _FAINT = (255, 255, 255), (30, 30, 30), (205, 205, 205)
_COLOURS = (  # of lines: dark, and apart from each other for most eyes (Okabe and Ito 2008, and darker shades of theirs)
    (0, 90, 170), (213, 94, 0), (0, 130, 95), (180, 70, 140), (120, 120, 120), (150, 100, 0), (60, 150, 200), (110, 60, 160),
)  # fmt: skip
_TILE = 56  # pixels: smaller pictures are enlarged by a whole factor to about this


@cache
def _font(size: int = 12) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def image_of(picture: Tensor) -> Image.Image:
    """uint8 [C, H, W], C 1 or 3 -> an image of that size."""
    pixels = picture.cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _factor(size: int) -> int:
    return max(1, round(_TILE / size))


def grid(pictures: Tensor, columns: int | None = None) -> Image.Image:
    """uint8 [N, C, H, W] -> one image, nearly square unless columns are given; small pictures are enlarged, pixel by pixel."""
    from diffusion_cli.vision import make_grid  # torchvision: more than a second to import

    columns = columns or math.ceil(math.sqrt(len(pictures)))
    factor = _factor(pictures.shape[-1])
    large = pictures.cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)  # [N, C, f H, f W]
    return image_of(make_grid(large, columns=columns, padding=2, background=255))


def rows(
    named: Mapping[str, Tensor], columns: Sequence[str] = (), captions: Mapping[str, Sequence[str]] | None = None
) -> Image.Image:
    """Rows of pictures, uint8 [N, C, H, W] each, with a name at the left of each row and, if given, one above each column.

    captions: of a row's name, a text above each of its pictures.
    """
    drawn = {name: grid(pictures, columns=len(pictures)).convert("RGB") for name, pictures in named.items()}
    left = 10 + max(math.ceil(_font().getlength(name)) for name in drawn)
    top = 18 if columns else 0
    above = 16 if captions else 0
    width, height = max(r.width for r in drawn.values()), sum(above + r.height for r in drawn.values())
    sheet = Image.new("RGB", (left + width, top + height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(columns):
        pen.text((left + (i + 0.5) * width / len(columns), 3), name, _INK, font=_font(), anchor="ma")
    y = top
    for name, row in drawn.items():
        texts = captions.get(name, ()) if captions else ()
        for i, text in enumerate(texts):
            pen.text((left + (i + 0.5) * row.width / len(texts), y + 3), text, _COLOURS[0], font=_font(), anchor="ma")
        y += above
        pen.text((5, y + row.height / 2), name, _INK, font=_font(), anchor="lm")
        sheet.paste(row, (left, y))
        y += row.height
    return sheet


def curve(points: Sequence[tuple[float, float]], title: str, across: str = "step") -> Image.Image:
    """A line through (x, y) points on labelled axes; y is logarithmic where all are positive and span a factor of 20."""
    return curves({"": points}, title, across)


def curves(
    named: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    across: str,
    width: int = 720,
    height: int = 360,
    log_x: bool = False,
) -> Image.Image:
    """The same for several lines, their names beside them in their colours. Points that are not finite are left out."""
    named = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in named.items()}
    margin = 20 + max(math.ceil(_font().getlength(name)) for name in named)
    sheet = Image.new("RGB", (width + margin - 20, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    left, right, top, bottom = 70, width - 20, 34, height - 40
    pen.text((left, 10), title, _INK, font=_font(14))
    every = [point for points in named.values() for point in points]
    if not every:
        return sheet
    xs, ys = [x for x, _ in every], [y for _, y in every]
    log_y = min(ys) > 0 and max(ys) > 20 * min(ys)
    along = _Axis(min(xs), max(max(xs), min(xs) + 1), left, right, log_x)
    up = _Axis(min(ys) if log_y else min(0.0, *ys), max(*ys, 0.0), bottom, top, log_y)
    for value in up.ticks():
        pen.line([(left, up.at(value)), (right, up.at(value))], _FAINT)
        pen.text(
            (left - 8, up.at(value)), f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}", _INK, font=_font(), anchor="rm"
        )
    for value in along.ticks():
        pen.text((along.at(value), bottom + 8), f"{value:.0f}", _INK, font=_font(), anchor="ma")
    pen.text(((left + right) / 2, height - 16), across, _INK, font=_font(), anchor="ma")
    for points, colour in zip(named.values(), cycle(_COLOURS)):
        pen.line([(along.at(x), up.at(y)) for x, y in points], colour, width=2)
    ends = sorted((up.at(points[-1][1]), name) for name, points in named.items() if points)
    heights = _apart([y for y, _ in ends], bottom, min(15, (bottom - top) / len(ends)))
    colours = dict(zip(named, cycle(_COLOURS)))
    for y, (_, name) in zip(heights, ends, strict=True):
        pen.text((right + 8, y), name, colours[name], font=_font(), anchor="lm")
    return sheet


@dataclass(frozen=True)
class _Axis:
    """Values from low to high along the pixels from first to last."""

    low: float
    high: float
    first: float
    last: float
    logarithmic: bool

    def at(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.first + (value - low) / max(high - low, 1e-9) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Four even parts; on a logarithmic axis powers of ten, and where these are few, twice and five times them too."""
        if not self.logarithmic:
            return [self.low + i / 4 * (self.high - self.low) for i in range(5)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        within = [
            [m * 10**k for k in powers for m in steps if self.low <= m * 10**k <= self.high] for steps in ((1,), (1, 2, 5))
        ]
        return within[0] if len(within[0]) > 3 else within[1]


def _apart(heights: Sequence[float], end: float, least: float) -> list[float]:
    """Rising heights moved so that neighbours are `least` apart and the last is not below `end`."""
    moved = list(heights)
    for k in range(1, len(moved)):
        moved[k] = max(moved[k], moved[k - 1] + least)
    for k in range(len(moved) - 1, -1, -1):
        moved[k] = min(moved[k], end - least * (len(moved) - 1 - k))
    return moved


def png(image: Image.Image, facts: Mapping[str, object] | None = None) -> bytes:
    """The file; facts are kept in it as JSON under the key `diffusion`."""
    notes = PngInfo()
    if facts:
        notes.add_text("diffusion", json.dumps(facts))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=notes)
    return file.getvalue()


def gif(frames: Sequence[Image.Image], milliseconds: int = 80, hold: int = 1500) -> bytes:
    """An endless animation that rests on its last frame; each frame has 256 colours of its own."""
    few = [frame if frame.mode == "P" else frame.convert("P", palette=Image.Palette.ADAPTIVE) for frame in frames]
    return _moving("GIF", few, milliseconds, hold)


def webp(frames: Sequence[Image.Image], milliseconds: int = 80, hold: int = 1500) -> bytes:
    """The same with every colour: no pixel is changed."""
    return _moving("WEBP", [frame.convert("RGB") for frame in frames], milliseconds, hold, lossless=True)


ANIMATIONS = {"gif": gif, "webp": webp}


def _moving(form: str, frames: Sequence[Image.Image], milliseconds: int, hold: int, lossless: bool = False) -> bytes:
    file = io.BytesIO()
    lengths = [milliseconds] * (len(frames) - 1) + [hold]
    frames[0].save(file, form, save_all=True, append_images=frames[1:], duration=lengths, loop=0, lossless=lossless)
    return file.getvalue()


def evenly(count: int, of: int) -> list[int]:
    """`count` places from 0 to of - 1, both ends included and each once."""
    return sorted({round(x) for x in torch.linspace(0, of - 1, min(count, of)).tolist()})
