"""Looking at walks: strips and animations of x_t beside the foreseen x0."""

from pathlib import Path

from PIL import Image

from diffusion_cli import drawing, storage
from diffusion_cli.data.pixels import to_uint8
from diffusion_cli.objectives.denoising import trajectory
from diffusion_cli.samplers import State

FRAMES = 40  # of an animation at most


def draw_trajectory(folder: Path, states: list[State]) -> None:
    """trajectory.png: x_t above the foreseen x0 at up to nine steps; trajectory.gif: both side by side, every step."""
    few = [states[i] for i in drawing.evenly(9, len(states))]
    storage.write(folder / "trajectory.png", drawing.png(trajectory(few)))
    frames = []
    for state in states:
        spread = state.x.flatten(1).std(1).clamp(min=1)[:, None, None, None]
        left, right = drawing.grid(to_uint8(state.x / spread)), drawing.grid(to_uint8(state.x0))
        sheet = Image.new("RGB", (left.width + right.width + 16, left.height), (255, 255, 255))
        sheet.paste(left.convert("RGB"), (0, 0))
        sheet.paste(right.convert("RGB"), (left.width + 16, 0))
        frames.append(sheet.convert("P", palette=Image.Palette.ADAPTIVE))
    storage.write(folder / "trajectory.gif", drawing.gif(frames))
