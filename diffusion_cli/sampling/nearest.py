"""Samples beside the training pictures nearest to them, in pixels and in the trained network's own features.

nearest.png: a row for each of the samples that come nearest, the nearest first: the sample, its neighbours in pixels, its
neighbours in features. nearest.json: all distances, and the shares of evaluation/nearest.py with how they were found.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_cli import drawing, storage
from diffusion_cli.data import Dataset, Pictures
from diffusion_cli.devices import Compute
from diffusion_cli.evaluation.middle import LOG_SNR, Middle, middle_of
from diffusion_cli.evaluation.nearest import AMONG, Near, close, copied, nearest, threshold
from diffusion_cli.finding import load_denoiser
from diffusion_cli.objectives.denoising import gather
from diffusion_cli.pretrained.trained import Trained
from diffusion_cli.runs import say
from diffusion_cli.sampling.together import give_up
from diffusion_cli.settings import Sample
from diffusion_cli.signals import StopRequest
from diffusion_cli.stages import stages_of

CHUNK = 1000  # training pictures at a time
REFERENCES = 1000  # pictures that say which distances are usual
DRAWN = 16  # rows of nearest.png

Look = Callable[[Tensor], Tensor]  # uint8 [B, C, H, W] -> [B, D]


def compare(
    samples: Tensor, found: Trained, dataset: Dataset, settings: Sample, compute: Compute, folder: Path, stop: StopRequest
) -> None:
    """samples uint8 [N, C, H, W]: the first that were made. Raises UserError, Stopped after a signal."""
    pictures = dataset.load("train")
    assert pictures is not None
    if pictures.fingerprint != found.config["facts"]["fingerprint"] != "":
        say("nearest: these are not the pictures that the network was trained on (data=, or the files have changed)")
    held_out = dataset.load("test")
    inside = torch.tensor(drawing.evenly(REFERENCES, len(pictures)))  # of the training pictures
    outside = None if held_out is None else gather(held_out, torch.tensor(drawing.evenly(REFERENCES, len(held_out))))
    reference = gather(pictures, inside) if outside is None else outside
    itself = inside if outside is None else torch.full((len(reference),), -1)
    queries, but = torch.cat([samples, reference]), torch.cat([torch.full((len(samples),), -1), itself])
    say(f"nearest: {len(samples)} samples among {len(pictures):,} training pictures{' and their mirrors' * dataset.flip}")
    spaces: dict[str, Look] = {"pixels": lambda images: images.flatten(1).to(compute.device)}
    features = _features(found, settings, compute, gather(pictures, inside))
    if features is not None:
        spaces["features"] = features
    k = max(settings.nearest, AMONG)
    facts: dict[str, Any] = {
        "training_pictures": len(pictures),
        "fingerprint": pictures.fingerprint,
        "mirrored": dataset.flip,
        "reference": "held-out pictures" if outside is not None else "training pictures, each left out",
        "references": len(reference),
    }
    nears: dict[str, Near] = {}
    for name, look in spaces.items():
        near = nearest(_seen(look, queries), _chunks(pictures, look, dataset.flip, stop), k, but.to(compute.device))
        if name == "pixels":  # of 0 .. 255 and summed -> of 0 .. 1 and the root of the mean
            near = near._replace(distance=near.distance / (255 * samples[0].numel() ** 0.5))
        nears[name] = Near(*(part.cpu() for part in near))
        facts[name] = _figures(nears[name].distance, len(samples))
    alike = copied(nears["pixels"].distance).double()  # of features it means nothing: in few dimensions neighbours are unequal
    facts["pixels"] |= {
        "copied": float(alike[: len(samples)].mean()),
        "copied_of_reference": float(alike[len(samples) :].mean()),
    }
    facts["features_of"] = None if features is None else f"{_name(features)} at log_snr {LOG_SNR:g}"
    facts["samples"] = [
        {"index": i, **{name: _neighbours(near, i, settings.nearest) for name, near in nears.items()}}
        for i in range(len(samples))
    ]
    storage.write(folder / "nearest.json", (json.dumps(facts, indent=1) + "\n").encode())
    storage.write(folder / "nearest.png", drawing.png(_sheet(samples, pictures, nears, settings.nearest)))
    for name in nears:
        figures = facts[name]
        usual = f"of {facts['reference']}: {figures['close_of_reference']:.1%}"
        say(f"nearest in {name}: {figures['close']:.1%} of the samples are within {figures['threshold']:.3f} of one ({usual})")
    say(
        f"nearest: {facts['pixels']['copied']:.1%} are twice as near to one as to the usual neighbours "
        f"(of {facts['reference']}: {facts['pixels']['copied_of_reference']:.1%})"
    )


def _features(found: Trained, settings: Sample, compute: Compute, some: Tensor) -> Middle | None:
    """Of the network as it was trained, neither compiled nor autocast; centred on some training pictures."""
    denoiser = load_denoiser(found, settings.weights, settings.trust).to(compute.device)
    codec = stages_of(found, settings.trust, without=("texts",)).codec.to(compute.device)
    middle = middle_of(denoiser, codec, some[:1])
    if middle is None:
        say("nearest: this network has no maps or tokens inside, so pixels alone are compared")
        return None
    bare = Middle(denoiser, codec, middle)
    return Middle(denoiser, codec, middle, _seen(bare, some).mean(0))


def _name(features: Middle) -> str:
    return next(name for name, module in features.denoiser.network.named_modules() if module is features.middle)


def _seen(look: Look, images: Tensor) -> Tensor:
    return torch.cat([look(part) for part in images.split(CHUNK // 4)])


def _chunks(pictures: Pictures, look: Look, flip: bool, stop: StopRequest) -> Iterator[tuple[Tensor, Tensor, bool]]:
    for numbers in torch.arange(len(pictures)).split(CHUNK):
        if stop.number:
            give_up(stop, "while it looked for the nearest training pictures")
        images = gather(pictures, numbers)
        yield numbers, _seen(look, images), False
        if flip:
            yield numbers, _seen(look, images.flip(-1)), True


def _figures(distance: Tensor, count: int) -> dict[str, float]:
    """distance [count + R, k]: of the samples, then of the reference."""
    samples, reference = distance[:count], distance[count:]
    limit = threshold(reference[:, 0])
    return {
        "threshold": limit,
        "close": float(close(samples, limit).double().mean()),
        "close_of_reference": float(close(reference, limit).double().mean()),
        "median": float(samples[:, 0].median()),
        "median_of_reference": float(reference[:, 0].median()),
    }


def _neighbours(near: Near, i: int, k: int) -> list[dict[str, float | int | bool]]:
    of_one = zip(*(part[i, :k].tolist() for part in near), strict=True)
    return [{"distance": distance, "picture": number, "mirrored": mirrored} for distance, number, mirrored in of_one]


def _sheet(samples: Tensor, pictures: Pictures, nears: dict[str, Near], k: int) -> Any:
    order = nears["pixels"].distance[: len(samples), 0].argsort(stable=True)[:DRAWN].tolist()
    named: dict[str, Tensor] = {}
    for i in order:
        row = [samples[i]]
        for near in nears.values():
            for number, mirrored in zip(near.number[i, :k].tolist(), near.mirrored[i, :k].tolist(), strict=True):
                picture = gather(pictures, torch.tensor([number]))[0]
                row.append(picture.flip(-1) if mirrored else picture)
        named[f"{i}   {nears['pixels'].distance[i, 0]:.3f}"] = torch.stack([one.cpu() for one in row])
    shown = min(k, nears["pixels"].distance.shape[1])
    return drawing.rows(named, ["sample", *(f"{name} {j + 1}" for name in nears for j in range(shown))])
