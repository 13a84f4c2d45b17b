"""Networks and denoisers from a config's nodes and the facts of the data: the same for a run and for its checkpoint."""

from collections.abc import Collection, Mapping
from typing import Any, TypedDict

import torch

from diffusion_cli.build import build
from diffusion_cli.data import Dataset
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.losses import Loss
from diffusion_cli.models import Network
from diffusion_cli.objectives import Denoising
from diffusion_cli.predictions import Prediction
from diffusion_cli.randomness import word_of
from diffusion_cli.samplers import Sampler
from diffusion_cli.schedules import Schedule


class Facts(TypedDict):
    """What the data set says of itself, once: every network and every checkpoint takes it from here."""

    channels: int
    image_size: int
    classes: list[str]  # all names, whether or not the network is told; label k is classes[k]
    taught: list[int]  # the labels that the network is told; none: it is told nothing
    fingerprint: str


def denoiser_of(node: Mapping[str, Any], facts: Facts, trust: Collection[str] = ()) -> Denoiser:
    """The denoiser that the nodes schedule, prediction and model describe, with fresh weights. Raises ConfigError."""
    schedule = build(node["schedule"], Schedule, "schedule", trust=trust)
    prediction = build(node["prediction"], Prediction, "prediction", {"schedule": schedule}, trust)
    sizes = {
        "channels": facts["channels"],
        "image_size": facts["image_size"],
        "num_classes": len(facts["classes"]) if facts["taught"] else 0,
    }
    return Denoiser(build(node["model"], Network, "model", sizes, trust), prediction)


def denoising_of(node: Mapping[str, Any], facts: Facts, trust: Collection[str] = ()) -> Denoising:
    """What diffusion-train trains, initialised from the run's seed. Raises ConfigError."""
    torch.manual_seed(word_of(node["seed"], "initial weights"))
    denoiser = denoiser_of(node, facts, trust)
    loss = build(node["loss"], Loss, "loss", trust=trust)
    sampler = build(node["sampler"], Sampler, "sampler", trust=trust)
    trainer = node["trainer"]
    return Denoising(denoiser, loss, sampler, facts["taught"], trainer["label_dropout"], trainer["preview"])


def rehearse(node: Mapping[str, Any], trust: Collection[str] = ()) -> None:
    """Builds everything once, without memory and data: what constructors refuse is said before any data is read."""
    dataset = build(node["dataset"], Dataset, "dataset", trust=trust)
    taught = [0] if dataset.labels else []
    facts = Facts(channels=dataset.channels, image_size=dataset.size, classes=["?"], taught=taught, fingerprint="")
    with torch.device("meta"):
        denoising_of(node, facts, trust)
