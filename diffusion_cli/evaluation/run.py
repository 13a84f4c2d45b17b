"""An evaluation from its checked settings: figures of a checkpoint on held-out pictures, each with how it was made."""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_cli import storage
from diffusion_cli.assembly import Facts
from diffusion_cli.data import Pictures
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.devices import choose
from diffusion_cli.errors import ConfigError
from diffusion_cli.evaluation.denoising import errors_by_level
from diffusion_cli.evaluation.likelihood import of_bound, of_flow
from diffusion_cli.objectives.denoising import gather
from diffusion_cli.pretrained.trained import Trained
from diffusion_cli.randomness import Source, word_of
from diffusion_cli.runs import say
from diffusion_cli.samplers import Denoise
from diffusion_cli.sampling.finding import dataset_of, find, load_denoiser
from diffusion_cli.schedules import Mix, Schedule
from diffusion_cli.settings import Evaluate

Measure = Callable[[Denoise, Schedule, Tensor, Source], dict[str, Tensor]]  # images uint8 [B, C, H, W] -> figures [B]


def evaluate(settings: Evaluate) -> Path:
    """Measures what the settings ask for, prints it and returns the file that keeps it. Raises UserError."""
    began = time.perf_counter()
    compute = choose(settings.device, settings.precision, False, say)
    found = find(settings.ckpt)
    denoiser = load_denoiser(found, settings.weights, settings.trust).to(compute.device)
    if isinstance(denoiser.schedule, Mix) and {"bits", "bound"} & set(settings.metrics):
        raise ConfigError(
            "metrics: bits and bound need Gaussian noise, and schedule=mix is uniform: ask for metrics=[denoising]"
        )
    pictures, split = _pictures(found, settings)
    count = min(settings.n, len(pictures))
    say(f"{found.folder}: {settings.weights} weights, {count} pictures of the {split} split, {compute}")
    measures = {
        "denoising": errors_by_level,
        "bound": lambda ask, schedule, images, source: {
            "bits_per_dim_bound": of_bound(ask, schedule, images, source, settings.levels)
        },
        "bits": lambda ask, schedule, images, source: {
            "bits_per_dim": of_flow(ask, schedule, images, source, settings.tolerance, settings.tolerance)
        },
    }
    rows: dict[str, list[Tensor]] = {}
    with compute.precision(), tqdm(total=count * len(settings.metrics), unit="picture", disable=None, leave=False) as bar:
        for images, source, ask in _batches(denoiser, pictures, found.config["facts"], count, settings, compute.device):
            for word in settings.metrics:
                for name, values in measures[word](ask, denoiser.schedule, images, source).items():
                    rows.setdefault(name, []).append(values.cpu())
                bar.update(len(images))
    figures = {name: _summary(torch.cat(values)) for name, values in rows.items()}
    made_by = {"n": count, "split": split, "seed": settings.seed, "weights": settings.weights, "step": found.step}
    made_by |= {"checkpoint": found.digest, "levels": settings.levels, "tolerance": settings.tolerance, "device": str(compute)}
    for name, figure in figures.items():
        say(f"{name:<24} {figure['mean']:.4f} +- {figure['standard_error']:.4f}   n={count}, {split}, {settings.weights}")
    path = _path(settings, found, split, count)
    storage.make_folder(path.parent)
    storage.write(path, (json.dumps({"figures": figures, "made_by": made_by}, indent=1) + "\n").encode())
    say(f"{time.perf_counter() - began:.1f} s: {path}")
    return path


def _summary(values: Tensor) -> dict[str, float]:
    values = values.double()
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": float(values.mean()), "standard_error": error}


def _pictures(found: Trained, settings: Evaluate) -> tuple[Pictures, str]:
    """The split asked for, or the training pictures where there is no other, and which it is."""
    dataset = dataset_of(found, settings.data, settings.trust)
    pictures = dataset.load(settings.split)
    if pictures is None:
        say(f"the data set has no {settings.split} split: these are pictures that the network was trained on")
        pictures = dataset.load("train")
        return pictures, "train"  # type: ignore[return-value]
    return pictures, settings.split


def _batches(
    denoiser: Denoiser, pictures: Pictures, facts: Facts, count: int, settings: Evaluate, device: torch.device
) -> Iterator[tuple[Tensor, Source, Denoise]]:
    """(uint8 [B, C, H, W], source, question under the pictures' own labels) until `count` pictures are through."""
    for first in range(0, count, settings.batch):
        ids = torch.arange(first, min(first + settings.batch, count))
        labels = pictures.labels[ids].to(device) if facts["taught"] and pictures.labels is not None else None
        ask: Denoise = lambda x, t, labels=labels: denoiser(x, t, labels)  # type: ignore[misc]  # noqa: E731
        yield gather(pictures, ids).to(device), Source(word_of(settings.seed, "evaluate"), ids.to(device)), ask


def _path(settings: Evaluate, found: Trained, split: str, count: int) -> Path:
    if settings.out is not None:
        return Path(settings.out)
    words = [found.mark, *settings.metrics, split, f"n_{count}", f"seed_{settings.seed}"]
    return found.run / "evaluated" / ("-".join([*words, *(["raw"] if settings.weights == "raw" else [])]) + ".json")
