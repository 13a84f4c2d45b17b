"""A sampling run from its checked request: find, build, make batch by batch what is not there yet, write, show."""

import re
import time
from pathlib import Path
from typing import Any

import torch

from diffusion_cli import drawing, storage
from diffusion_cli.devices import Compute, choose
from diffusion_cli.distributed import Process, process
from diffusion_cli.finding import dataset_of, find
from diffusion_cli.pretrained.trained import Trained
from diffusion_cli.runs import say
from diffusion_cli.sampling import question
from diffusion_cli.sampling.formats import FORMATS
from diffusion_cli.sampling.maker import Maker, check_prompts, maker_of
from diffusion_cli.sampling.making import Work
from diffusion_cli.sampling.nearest import compare
from diffusion_cli.sampling.seeing import Film
from diffusion_cli.sampling.sheet import sheet
from diffusion_cli.sampling.together import PATIENCE, share, wait
from diffusion_cli.sampling.writing import Album
from diffusion_cli.settings import Request, Sample
from diffusion_cli.signals import listening

SHOWN = 256  # pictures of the grid


def sample(request: Request) -> Path:
    """Writes the pictures that the request asks for and returns their folder. Raises UserError; Stopped after a signal."""
    settings, me = request.root, process()
    compute = choose(me.device(settings.device), settings.precision, settings.compile, say, settings.convolutions)
    found = find(settings.ckpt)
    maker = maker_of(request, found, compute)
    check_prompts(settings, maker)
    film = Film.of(settings, maker.sampler.length(maker.denoiser.schedule)) if me.first else Film()
    dataset = dataset_of(found, settings.data, settings.trust) if settings.nearest else None
    asked = {**maker.asked, **({} if settings.format == "png" else {"shard": settings.shard})}
    folder, before = question.place(request, found, asked)
    facts = question.metadata(asked, _facts(settings, found, compute, before), before)
    size = 1 if settings.format == "png" else settings.shard
    form = FORMATS[settings.format](size, maker.told.names, asked)
    album = Album(folder, form, facts["n"], maker.label_of)
    work = Work(album, maker, film, settings.batch, compute)
    with listening() as stop:
        if not me.first:
            begun = lambda: not question.begun(folder, asked, album.n)  # noqa: E731
            wait(begun, stop, PATIENCE, f"the first process has not begun {folder}")
            work.do(share(album, settings.batch, me), stop)
            return folder
        storage.make_folder(folder)
        with question.alone(folder):
            question.write(folder, facts, "unfinished")
            missing = album.absent(range(len(album))).tolist()
            there = album.n - album.pictures(missing)
            _announce(found, maker, settings, compute, me, album, there)
            began = time.perf_counter()
            slowest = work.do(share(album, settings.batch, me), stop)
            late = lambda: len(album.absent(missing))  # noqa: E731
            wait(late, stop, max(PATIENCE, 3 * slowest), f"files of other processes have not come to {folder}")
            seconds = time.perf_counter() - began
            album.tidy()
            if dataset is not None:
                compare(album.head(SHOWN), found, dataset, settings, compute, folder, stop)
            grid = sheet(album.head(SHOWN), maker.told.numbers, maker.told.rows)
            storage.write(folder / "grid.png", drawing.png(grid, facts))
            question.write(folder, facts, "finished")
    _conclude(album, there, seconds)
    return folder


def _facts(settings: Sample, found: Trained, compute: Compute, before: dict[str, Any]) -> dict[str, Any]:
    """How the pictures are made, beside the question. A folder never shrinks: a smaller n finds its pictures there."""
    device = re.sub(r"^cuda:\d+", "cuda", str(compute))  # several processes have several of the same kind
    n = max(settings.n, before.get("n", 0))
    return {"n": n, "batch": settings.batch, "ckpt": found.said, "device": device, "torch": torch.__version__}


def _announce(found: Trained, maker: Maker, settings: Sample, compute: Compute, me: Process, album: Album, there: int) -> None:
    several = f", {me.world} processes" if me.world > 1 else ""
    say(f"{found.said}: {settings.weights} weights, {album.n:,} pictures in {maker.sampler.steps} steps, {compute}{several}")
    if there:
        say(f"{there:,} of {album.n:,} pictures are there already: {album.folder}")
    if len(album) < me.world and settings.format != "png":
        say(f"{len(album)} files for {me.world} processes: a smaller shard= gives all of them something to do")


def _conclude(album: Album, there: int, seconds: float) -> None:
    made, form = album.n - there, album.form.suffix.removeprefix(".")
    files = f"{len(album):,} {form} file{'s' if len(album) > 1 else ''}"
    speed = f"{made:,} pictures in {seconds:.1f} s, {made / seconds:,.1f} a second" if made else "nothing was left to make"
    say(f"{speed}; {files} in {album.folder}; look at {album.folder / 'grid.png'}")
