"""Pictures of pictures: grids, captioned rows, loss curves and animations, as Pillow images and as bytes of a file."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

_PAPER, _INK, _FAINT, _LINE = (255, 255, 255), (30, 30, 30), (205, 205, 205), (0, 90, 170)
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


def rows(named: Mapping[str, Tensor], columns: Sequence[str] = ()) -> Image.Image:
    """Rows of pictures, uint8 [N, C, H, W] each, with a name at the left of each row and, if given, one above each column."""
    drawn = {name: grid(pictures, columns=len(pictures)).convert("RGB") for name, pictures in named.items()}
    left = 10 + max(math.ceil(_font().getlength(name)) for name in drawn)
    top = 18 if columns else 0
    width, height = max(r.width for r in drawn.values()), sum(r.height for r in drawn.values())
    sheet = Image.new("RGB", (left + width, top + height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(columns):
        pen.text((left + (i + 0.5) * width / len(columns), 3), name, _INK, font=_font(), anchor="ma")
    y = top
    for name, row in drawn.items():
        pen.text((5, y + row.height / 2), name, _INK, font=_font(), anchor="lm")
        sheet.paste(row, (left, y))
        y += row.height
    return sheet


def curve(
    points: Sequence[tuple[float, float]], title: str, across: str = "step", width: int = 720, height: int = 360
) -> Image.Image:
    """A line through (x, y) points on labelled axes; y is logarithmic where all are positive and span a factor of 20."""
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    left, right, top, bottom = 70, width - 20, 34, height - 40
    points = [(x, y) for x, y in points if math.isfinite(y)]
    pen.text((left, 10), title, _INK, font=_font(14))
    if not points:
        return sheet
    xs, ys = [x for x, _ in points], [y for _, y in points]
    logarithmic = min(ys) > 0 and max(ys) > 20 * min(ys)
    scale = (lambda y: math.log10(y)) if logarithmic else (lambda y: y)
    low, high = (scale(min(ys)), scale(max(ys))) if logarithmic else (min(0.0, min(ys)), max(0.0, max(ys)))
    first, last, high = min(xs), max(max(xs), min(xs) + 1), max(high, low + 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - first) / (last - first) * (right - left), bottom - (scale(y) - low) / (high - low) * (bottom - top)

    for i in range(5):
        value = low + i / 4 * (high - low)
        y = bottom - i / 4 * (bottom - top)
        pen.line([(left, y), (right, y)], _FAINT)
        pen.text((left - 8, y), f"{10**value if logarithmic else value:.3g}", _INK, font=_font(), anchor="rm")
        x = left + i / 4 * (right - left)
        pen.text((x, bottom + 8), f"{first + i / 4 * (last - first):.0f}", _INK, font=_font(), anchor="ma")
    pen.text(((left + right) / 2, height - 16), across, _INK, font=_font(), anchor="ma")
    pen.line([place(x, y) for x, y in points], _LINE, width=2)
    return sheet


def png(image: Image.Image, facts: Mapping[str, object] | None = None) -> bytes:
    """The file; facts are kept in it as JSON under the key `diffusion`."""
    notes = PngInfo()
    if facts:
        notes.add_text("diffusion", json.dumps(facts))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=notes)
    return file.getvalue()


def gif(frames: Sequence[Image.Image], milliseconds: int = 80, hold: int = 1500) -> bytes:
    """An endless animation that rests on its last frame."""
    file = io.BytesIO()
    lengths = [milliseconds] * (len(frames) - 1) + [hold]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=lengths, loop=0)
    return file.getvalue()


def evenly(count: int, of: int) -> list[int]:
    """`count` places from 0 to of - 1, both ends included and each once."""
    return sorted({round(x) for x in torch.linspace(0, of - 1, min(count, of)).tolist()})
