"""A captioned set on the disk: squares of four colours in four corners, what they are in words."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}
CORNERS = {"top left": (0, 0), "top right": (0, 8), "bottom left": (8, 0), "bottom right": (8, 8)}


def written(folder: Path, each: int = 6) -> Path:
    """A folder with 16 * each pictures of 16 x 16 and a metadata.csv; the noise of each picture differs."""
    draws = np.random.default_rng(0)
    folder.mkdir(parents=True)
    lines = ["file_name,text"]
    for number in range(16 * each):
        colour, corner = list(COLOURS)[number % 4], list(CORNERS)[number // 4 % 4]
        pixels = draws.integers(0, 40, (16, 16, 3)).astype(np.uint8)
        y, x = CORNERS[corner]
        pixels[y : y + 8, x : x + 8] = COLOURS[colour]
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        lines.append(f"{number:03d}.png,A {colour} square at the {corner}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder
