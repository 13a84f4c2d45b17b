"""An evaluation from its checked settings: figures of a checkpoint, each with its spread and with how it was made.

Rows are made by number, shared out to all processes, and read by the first one (rows.py), which keeps what they amount to as
evaluated/*.json of the run and in its TensorBoard.
"""

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffusion_cli import storage
from diffusion_cli.devices import choose
from diffusion_cli.distributed import process
from diffusion_cli.evaluation.figures import Figure, shown
from diffusion_cli.evaluation.parts import Part, of_pictures, of_reconstructions, of_samples
from diffusion_cli.evaluation.rows import Ledger
from diffusion_cli.evaluation.words import OF_PICTURES, OF_SAMPLES
from diffusion_cli.finding import dataset_of, find, parts_in
from diffusion_cli.pretrained.trained import Trained, suffix
from diffusion_cli.runs import on_board, say
from diffusion_cli.sampling.question import alone
from diffusion_cli.settings import Evaluate, Measurement
from diffusion_cli.signals import listening


def evaluate(wanted: Measurement) -> Path:
    """Measures what the settings ask for, prints it and returns the file that keeps it. Raises UserError, Stopped."""
    began, settings, me = time.perf_counter(), wanted.root, process()
    compute = choose(me.device(settings.device), settings.precision, settings.compile, say, settings.convolutions)
    found = find(settings.ckpt)
    dataset = dataset_of(found, settings.data, settings.trust)
    ours = [metric for metric in settings.metrics if metric in OF_SAMPLES]
    if "autoencoder" in parts_in(found, settings.trust) or "reconstruction" in settings.metrics:
        parts = [of_reconstructions(found, dataset, wanted, ours, compute)]
    else:
        parts = [of_samples(found, dataset, wanted, ours, compute)] if ours else []
        if set(settings.metrics) & set(OF_PICTURES):
            parts.append(of_pictures(found, dataset, wanted, compute))
    say(f"{found.folder}: {settings.weights} weights, {compute}" + (f", {me.world} processes" if me.world > 1 else ""))
    common = {"weights": settings.weights, "seed": settings.seed, "step": found.step, "checkpoint": found.digest}
    common["batch"] = settings.batch
    key = _digest({**common, "parts": [part.asked for part in parts]})
    path = _path(settings, found, parts, key)
    ledgers = [Ledger(path.parent / f".rows_{key}", part.name, part.count, settings.batch) for part in parts]
    total = sum(part.count for part in parts) // me.world
    with listening() as stop, tqdm(total=total, unit="picture", disable=None if me.first else True, leave=False) as bar:
        if not me.first:
            for part, ledger in zip(parts, ledgers, strict=True):
                ledger.fill(part.make, me, stop, bar.update)
            return path
        work = ledgers[0].folder
        storage.make_folder(work)
        with alone(work):
            for part, ledger in zip(parts, ledgers, strict=True):
                ledger.fill(part.make, me, stop, bar.update)
            made = time.perf_counter() - began
            figures: dict[str, Figure] = {}
            made_by: dict[str, Any] = {}
            for part, ledger in zip(parts, ledgers, strict=True):
                some, facts = part.conclude(ledger.read(stop), stop)
                figures |= some
                made_by |= {key: value for key, value in facts.items() if key not in made_by}  # n, split: of samples first
            storage.remove(work)
    made_by |= common | {
        "device": re.sub(r"^cuda:\d+", "cuda", str(compute)),
        "processes": me.world,
        "torch": torch.__version__,
    }
    seconds = time.perf_counter() - began
    made_by |= {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": round(seconds, 3)}
    width = max(map(len, figures))
    for name, figure in figures.items():
        say(shown(name, figure, width))
    storage.write(path, (json.dumps({"figures": figures, "made_by": made_by}, indent=1) + "\n").encode())
    if found.folder.parent.name == "checkpoints":
        where = "_".join(["evaluate", *suffix(settings.weights)])
        on_board(found.run, found.step, {f"{where}/{name}": figure["value"] for name, figure in figures.items()})
    say(f"{seconds:.1f} s, of which {made:.1f} s for {sum(part.count for part in parts):,} pictures: {path}")
    return path


def _path(settings: Evaluate, found: Trained, parts: list[Part], key: str) -> Path:
    if settings.out is not None:
        return Path(settings.out)
    metrics = [*settings.metrics[:3], *([f"and_{len(settings.metrics) - 3}_more"] if len(settings.metrics) > 3 else [])]
    words = [found.mark, *metrics, *(word for part in parts for word in part.words), f"seed_{settings.seed}"]
    words += suffix(settings.weights)
    return found.run / "evaluated" / f"{'-'.join([*words, key[:6]])}.json"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
