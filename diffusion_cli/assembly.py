"""Networks, denoisers, classifiers and objectives from a config's nodes and the facts of the data.

The same for a run and for its checkpoint. An objective's constructor names the parts that it needs; the program makes those.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NotRequired, TypedDict

import torch

from diffusion_cli.adapters import LoRA
from diffusion_cli.build import build
from diffusion_cli.codecs import Latent
from diffusion_cli.conditioning.tokenizer import Tokenizer, learned
from diffusion_cli.data import Dataset
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.errors import ConfigError
from diffusion_cli.guidance import Guidance
from diffusion_cli.losses import Loss, Times
from diffusion_cli.models import Autoencoder, Classifier, Clip, Network
from diffusion_cli.noisy_classifier import NoisyClassifier
from diffusion_cli.objectives import Objective
from diffusion_cli.predictions import Prediction
from diffusion_cli.randomness import word_of
from diffusion_cli.samplers import Sampler
from diffusion_cli.schedules import Schedule
from diffusion_cli.signatures import target_of


class Facts(TypedDict):
    """What the data set says of itself, once: every network and every checkpoint takes it from here."""

    channels: int
    image_size: int
    classes: list[str]  # all names, whether or not the network is told; label k is classes[k]
    taught: list[int]  # the labels that the network is told; none: it is told nothing
    fingerprint: str
    tokenizer: NotRequired[str]  # JSON, learned from the captions, where the objective reads them


def denoiser_of(node: Mapping[str, Any], facts: Facts, trust: Collection[str] = ()) -> Denoiser:
    """The denoiser that the nodes schedule, prediction and model describe, with fresh weights. Raises ConfigError."""
    schedule = build(node["schedule"], Schedule, "schedule", trust=trust)
    prediction = build(node["prediction"], Prediction, "prediction", {"schedule": schedule}, trust)
    num_classes = len(facts["classes"]) if facts["taught"] else 0
    sizes = {"channels": facts["channels"], "image_size": facts["image_size"], "num_classes": num_classes}
    if node["objective"].get("self_conditioning"):
        sizes["hint_channels"] = facts["channels"]
        if "hint_channels" not in target_of(node["model"], "model", trust).parameters:
            name = node["model"]["_target_"].rpartition(".")[2]
            raise ConfigError(
                f"objective.self_conditioning is {node['objective']['self_conditioning']:g}, but {name} takes no hint: its "
                "constructor has no hint_channels; choose another model, or objective.self_conditioning=0"
            )
    return Denoiser(build(node["model"], Network, "model", sizes, trust), prediction)


def classifier_of(node: Mapping[str, Any], facts: Facts, trust: Collection[str] = ()) -> NoisyClassifier:
    """The classifier that the node model describes, with fresh weights. Raises ConfigError."""
    sizes = {"channels": facts["channels"], "image_size": facts["image_size"], "num_classes": len(facts["classes"])}
    return NoisyClassifier(build(node["model"], Classifier, "model", sizes, trust))


def autoencoder_of(node: Mapping[str, Any], facts: Facts, trust: Collection[str] = ()) -> Latent:
    """The autoencoder that the node model describes, with fresh weights and the scale of its latents. Raises ConfigError."""
    sizes = {"channels": facts["channels"], "image_size": facts["image_size"]}
    return Latent(build(node["model"], Autoencoder, "model", sizes, trust))


def tokenizer_of(node: Mapping[str, Any], facts: Facts, trust: Collection[str] = ()) -> Tokenizer:
    """The tokenizer that was learned from the captions of the data. Raises ConfigError."""
    try:
        return Tokenizer(facts["tokenizer"])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"the facts of the data hold no tokenizer: {error}") from None


def clip_of(node: Mapping[str, Any], facts: Facts, trust: Collection[str] = ()) -> Clip:
    """The picture and text encoders that the node model describes, with fresh weights. Raises ConfigError."""
    vocabulary = tokenizer_of(node, facts).size
    sizes = {"channels": facts["channels"], "image_size": facts["image_size"], "vocabulary": vocabulary}
    return build(node["model"], Clip, "model", sizes, trust)


# What the constructor of an objective may ask for by the name of an argument; config.PARTS says the names without torch.
PARTS: dict[str, Callable[[Mapping[str, Any], Facts, Collection[str]], object]] = {
    "denoiser": denoiser_of,
    "classifier": classifier_of,
    "autoencoder": autoencoder_of,
    "clip": clip_of,
    "tokenizer": tokenizer_of,
    "schedule": lambda node, facts, trust: build(node["schedule"], Schedule, "schedule", trust=trust),
    "loss": lambda node, facts, trust: build(node["loss"], Loss, "loss", trust=trust),
    "times": lambda node, facts, trust: build(node["loss"]["times"], Times, "loss.times", trust=trust),
    "sampler": lambda node, facts, trust: build(node["sampler"], Sampler, "sampler", trust=trust),
    "guidance": lambda node, facts, trust: build(node["guidance"], Guidance, "guidance", trust=trust),
    "names": lambda node, facts, trust: facts["classes"],
    "taught": lambda node, facts, trust: facts["taught"],
    "previews": lambda node, facts, trust: node["trainer"]["preview"],
}


def parts_of(objective: Mapping[str, Any], trust: Collection[str] = ()) -> list[str]:
    """The parts that an objective's constructor asks for, in its order: what kind of model the run trains."""
    return [name for name in target_of(objective, "objective", trust).parameters if name in PARTS]


def reads_texts(objective: Mapping[str, Any], trust: Collection[str] = ()) -> bool:
    """Whether a tokenizer is to be learned from the captions before the objective is made."""
    return "tokenizer" in parts_of(objective, trust)


def objective_of(node: Mapping[str, Any], facts: Facts, trust: Collection[str] = ()) -> Objective:
    """What diffusion-train trains, initialised from the run's seed. Raises ConfigError."""
    torch.manual_seed(word_of(node["seed"], "initial weights"))
    given = {name: PARTS[name](node, facts, trust) for name in parts_of(node["objective"], trust)}
    return build(node["objective"], Objective, "objective", given, trust)


def adapt(objective: Objective, node: Mapping[str, Any], trust: Collection[str] = ()) -> None:
    """Puts the adapters that the node asks for into the network, which then trains nothing else. Raises ConfigError."""
    if node.get("adapter") is None:
        return
    torch.manual_seed(word_of(node["seed"], "initial adapters"))
    try:
        build(node["adapter"], LoRA, "adapter", trust=trust).put_into(objective.network)
    except ValueError as error:
        raise ConfigError(f"adapter: {error}") from None


def rehearse(node: Mapping[str, Any], trust: Collection[str] = ()) -> Objective:
    """Builds everything once, without memory and data: what constructors refuse is said before any data is read."""
    dataset = build(node["dataset"], Dataset, "dataset", trust=trust)
    taught = [0] if dataset.labels else []
    facts = Facts(channels=dataset.channels, image_size=dataset.size, classes=["?"], taught=taught, fingerprint="")
    if reads_texts(node["objective"], trust):
        facts["tokenizer"] = learned([], node["objective"]["vocabulary"])
    if "sampler" in parts_of(node["objective"], trust):  # previews: does its grid fit the schedule?
        sampler = build(node["sampler"], Sampler, "sampler", trust=trust)
        sampler.times(build(node["schedule"], Schedule, "schedule", trust=trust))
    with torch.device("meta"):
        objective = objective_of(node, facts, trust)
        adapt(objective, node, trust)
    return objective
