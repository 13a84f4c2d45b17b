"""A sampling run from its checked request: find, build, make batch by batch, write, show."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_cli import drawing, storage
from diffusion_cli.data.pixels import to_uint8
from diffusion_cli.devices import choose
from diffusion_cli.objectives.denoising import columns_for
from diffusion_cli.runs import say
from diffusion_cli.samplers import State
from diffusion_cli.sampling.finding import find
from diffusion_cli.sampling.maker import Maker, maker_of
from diffusion_cli.sampling.question import folder_of
from diffusion_cli.sampling.seeing import FRAMES, draw_trajectory
from diffusion_cli.sampling.writing import write_npz
from diffusion_cli.settings import Request, Sample


def sample(request: Request) -> Path:
    """Writes the pictures that the request asks for and returns their folder. Raises UserError."""
    began = time.perf_counter()
    settings = request.root
    compute = choose(settings.device, settings.precision, settings.compile, say)
    found = find(Path(settings.ckpt))
    maker = maker_of(request, found, compute)
    folder = folder_of(settings, found, maker.asked)
    storage.make_folder(folder)
    say(f"{found.folder}: {settings.weights} weights, {settings.n} pictures in {maker.sampler.steps} steps, {compute}")
    shown: list[Tensor] = []
    arrays: list[Tensor] = []
    with torch.inference_mode(), compute.precision():
        for ids, images, states in _batches(maker, settings, compute.device):
            shown.append(images[: max(0, 256 - sum(map(len, shown)))])
            if settings.format == "npz":
                arrays.append(images)
            else:
                for i, image in zip(ids.tolist(), images, strict=True):
                    facts_of_one = {**maker.asked, "index": i, "label": maker.label_of(i)}
                    storage.write(folder / f"{i:06d}.png", drawing.png(drawing.image_of(image), facts_of_one))
            if states and ids[0] == 0:
                draw_trajectory(folder, states)
    if settings.format == "npz":
        write_npz(folder / "samples.npz", torch.cat(arrays), maker.classes, settings.n)
    columns = None if maker.classes is None else columns_for(torch.tensor(maker.classes))
    metadata = {**maker.asked, "n": settings.n, "batch": settings.batch, "ckpt": str(found.folder), "device": str(compute)}
    storage.write(folder / "metadata.json", (json.dumps(metadata, indent=1) + "\n").encode())
    storage.write(folder / "grid.png", drawing.png(drawing.grid(torch.cat(shown), columns), metadata))
    seconds = time.perf_counter() - began
    say(f"{settings.n} pictures in {seconds:.1f} s: {folder}; look at {folder / 'grid.png'}")
    return folder


def _batches(maker: Maker, settings: Sample, device: torch.device) -> Iterator[tuple[Tensor, Tensor, list[State]]]:
    """(ids [B], uint8 [B, C, H, W], states of the walk if a trajectory is wanted) until n pictures are made."""
    length = maker.sampler.length(maker.denoiser.schedule)
    total = None if length is None else -(-settings.n // settings.batch) * length
    with tqdm(total=total, unit="step", disable=None, leave=False) as bar:
        for first in range(0, settings.n, settings.batch):
            ids = torch.arange(first, min(first + settings.batch, settings.n))
            kept: list[State] = []
            wanted = set(drawing.evenly(FRAMES, (length or FRAMES) + 1)) if settings.trajectory and first == 0 else set()
            for state in maker.states(ids.to(device)):
                bar.update(state.step > 0)
                if state.step in wanted:
                    kept.append(State(state.step, state.t, state.x[:16].clone(), state.x0[:16].clone()))
            yield ids, to_uint8(state.x).cpu(), kept
