"""Pictures of pictures: their sizes, what stands where, and the facts in their files."""

import io
import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusion_cli import drawing


def pictures(n: int, channels: int = 1, size: int = 8) -> torch.Tensor:
    return torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, channels, size, size) * 20


@pytest.mark.parametrize("channels", [1, 3])
def test_image_of_keeps_every_pixel(channels: int) -> None:
    pixels = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    image = drawing.image_of(pixels)
    assert image.size == (7, 5) and image.mode == {1: "L", 3: "RGB"}[channels]
    for x, y in [(0, 0), (6, 4), (3, 2)]:
        found = image.getpixel((x, y))
        assert (found if isinstance(found, tuple) else (found,)) == tuple(pixels[:, y, x].tolist())


@pytest.mark.parametrize(("n", "columns"), [(2, 2), (4, 2), (5, 3), (9, 3), (10, 4)])
def test_grid_is_nearly_square_and_in_reading_order(n: int, columns: int) -> None:
    image = drawing.grid(pictures(n)).convert("L")
    tile = 8 * 7 + 2  # 8 pixels, seven times as large, and a gap
    assert image.width == columns * tile + 2 and image.height == math.ceil(n / columns) * tile + 2
    for i in range(n):
        assert image.getpixel((2 + i % columns * tile + 20, 2 + i // columns * tile + 20)) == 20 * i


def test_small_pictures_are_enlarged_and_large_ones_are_not() -> None:
    assert drawing.grid(pictures(1, size=8)).width == 8 * 7
    assert drawing.grid(pictures(1, size=64)).width == 64


def test_rows_have_names_and_columns() -> None:
    sheet = drawing.rows({"clean": pictures(4), "noised": pictures(4)}, ["a", "b", "c", "d"])
    plain = drawing.grid(pictures(4), columns=4)
    assert sheet.height == 18 + 2 * plain.height and sheet.width > plain.width
    assert sheet.crop((0, 18, 8 + 30, plain.height)).getcolors() != [((38) * (plain.height - 18), (255, 255, 255))], (
        "the name is drawn"
    )


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(allow_nan=True, allow_infinity=True, width=32)), max_size=5))
def test_curve_never_fails(points: list[tuple[float, float]]) -> None:
    assert drawing.curve(points, "loss").size == (720, 360)


def test_curve_draws_a_line() -> None:
    line = (0, 90, 170)
    colors = [color for _, color in drawing.curve([(0, 1.0), (10, 0.5)], "loss").getcolors(10**6)]
    assert line in colors and line not in [c for _, c in drawing.curve([], "loss").getcolors(10**6)]


def test_png_holds_its_facts() -> None:
    facts = {"seed": 1, "label": None, "name": "ß=,"}
    image = Image.open(io.BytesIO(drawing.png(drawing.image_of(pictures(2)[1]), facts)))
    assert json.loads(image.text["diffusion"]) == facts and image.getpixel((0, 0)) == 20
    assert Image.open(io.BytesIO(drawing.png(drawing.image_of(pictures(1)[0])))).text == {}


def test_gif_moves_rests_and_repeats() -> None:
    frames = [drawing.grid(pictures(3)[i : i + 1]).convert("P") for i in range(3)]
    image = Image.open(io.BytesIO(drawing.gif(frames, 80, 1500)))
    lengths = []
    for k in range(image.n_frames):
        image.seek(k)
        lengths.append(image.info["duration"])
    assert lengths == [80, 80, 1500] and image.info["loop"] == 0


@given(st.integers(1, 50), st.integers(1, 200))
def test_evenly_is_even(count: int, of: int) -> None:
    places = drawing.evenly(count, of)
    assert places[0] == 0 and places == sorted(set(places)) and len(places) == min(count, of)
    assert places[-1] == (of - 1 if count > 1 else 0)
    gaps = [b - a for a, b in pairwise(places)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_several_lines_have_their_names_beside_them_none_over_another() -> None:
    named = {f"line {k}": [(0, 1.0), (10, 2.0 + k / 1000)] for k in range(8)}
    sheet, alone = drawing.curves(named, "all", "step"), drawing.curves({"line 0": named["line 0"]}, "one", "step")
    assert sheet.width == alone.width > 720 and sheet.height == 360
    heights = drawing._apart([50.0, 51.0, 52.0, 300.0, 318.0], 320, 15)
    assert heights == [50, 65, 80, 300, 318]
    assert max(drawing._apart([310.0, 315.0, 319.0], 320, 15)) <= 320
    colours = {colour for _, colour in sheet.getcolors(10**6)}
    assert len(colours & set(drawing._COLOURS)) == 8
