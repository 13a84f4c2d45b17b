"""Networks, denoisers, classifiers and objectives from a config's nodes and the facts of the data.

The same for a run and for its checkpoint. An objective's constructor names the parts that it needs; the program makes those.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NotRequired, TypedDict

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from diffusion_cli.adapters import LoRA
from diffusion_cli.build import build
from diffusion_cli.codecs import Codec, Latent, Pixels
from diffusion_cli.conditioning import Conditioner
from diffusion_cli.conditioning.tokenizer import Tokenizer, learned
from diffusion_cli.data import Dataset
from diffusion_cli.data.augment import WIDTH
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.errors import ConfigError
from diffusion_cli.guidance import Guidance
from diffusion_cli.losses import Loss, Perceptual, Term, Times
from diffusion_cli.models import Autoencoder, Classifier, Clip, Network
from diffusion_cli.noisy_classifier import NoisyClassifier
from diffusion_cli.objectives import Method, Objective
from diffusion_cli.predictions import Prediction
from diffusion_cli.randomness import word_of
from diffusion_cli.samplers import Sampler
from diffusion_cli.schedules import Schedule
from diffusion_cli.signatures import target_of


@contextmanager
def at_most(elements: int) -> Iterator[None]:
    """Networks made in the block have not many more weights than that; a config that describes more takes no memory for them.

    A tensor is asked before anything is written into it; twice as many may be made, since a constructor may replace what it
    made at first. Raises ConfigError.
    """
    left = 2 * elements + 2**16

    def ask(module: nn.Module, name: str, weight: torch.Tensor | None) -> None:
        nonlocal left
        left -= 0 if weight is None else weight.numel()
        if left < 0:
            raise ConfigError(f"its config describes a network of far more than the {elements:,} weights that are there")

    handle = register_module_parameter_registration_hook(ask)
    try:
        yield
    finally:
        handle.remove()


class CodecFacts(TypedDict):
    digest: str
    shape: list[int]  # of what is diffused: [c, h, w]


class TextFacts(TypedDict):
    digest: str
    width: int
    length: int


class Facts(TypedDict):
    """What the data set and the frozen parts say, once: every network and every checkpoint takes it from here."""

    channels: int
    image_size: int
    classes: list[str]  # all names, whether or not the network is told; label k is classes[k]
    taught: list[int]  # the labels that the network is told; none: it is told nothing
    fingerprint: str
    tokenizer: NotRequired[str]  # JSON, learned from the captions, where the objective reads them
    codec: NotRequired[CodecFacts]  # absent: pixels are diffused
    texts: NotRequired[TextFacts]  # absent: the network reads no texts
    perceptual: NotRequired[str]  # the digest of what judged reconstructions
    teacher: NotRequired[str]  # the digest of the denoiser that a few-step method learns from


@dataclass(frozen=True)
class Teacher:
    """A trained denoiser that another one learns from; facts: of its data; said: how it was named."""

    denoiser: Denoiser
    facts: Facts
    said: str


@dataclass(frozen=True)
class Stages:
    """The frozen parts that a denoiser stands on, the eyes by which an autoencoder is trained (stages.py), NAMES; and the
    teacher that a denoiser needs only while training."""

    codec: Codec = field(default_factory=Pixels)
    texts: Conditioner | None = None
    perceptual: Perceptual | None = None
    teacher: Teacher | None = None

    NAMES: ClassVar = ("codec", "texts", "perceptual")

    def to(self, device: torch.device) -> "Stages":
        return replace(self, codec=self.codec.to(device), texts=None if self.texts is None else self.texts.to(device))

    def facts(self, facts: Facts) -> Facts:
        """With those of the parts. Raises ConfigError where one of them cannot take such pictures."""
        found = facts.copy()
        if self.codec.digest:
            try:
                shape = self.codec.shape(facts["channels"], facts["image_size"])
            except ValueError as error:
                raise ConfigError(f"codec: {error}") from None
            found["codec"] = CodecFacts(digest=self.codec.digest, shape=list(shape))
        if self.texts is not None:
            found["texts"] = TextFacts(digest=self.texts.digest, width=self.texts.width, length=self.texts.length)
        if self.perceptual is not None:
            if (theirs := self.perceptual.network.channels) != facts["channels"]:
                said = f"its classifier knows pictures of {theirs} channels, and these have {facts['channels']}"
                raise ConfigError(f"perceptual.ckpt: {said}; choose another, or dataset.channels={theirs}")
            found["perceptual"] = self.perceptual.digest
        if self.teacher is not None:
            _same_pictures(found, self.teacher)
            found["teacher"] = self.teacher.denoiser.digest
        return found


def _same_pictures(facts: Facts, teacher: Teacher) -> None:
    """ConfigError for a teacher of other pictures, or one that is told what the student is not."""
    theirs, said = teacher.facts, f"objective.method.teacher={teacher.said}"
    for key in ("channels", "image_size", "codec", "texts"):
        if theirs.get(key) != facts.get(key):
            raise ConfigError(f"{said} is for other pictures: {key} is {theirs.get(key)} there and {facts.get(key)} here")
    if theirs["taught"] and (not facts["taught"] or (theirs["classes"] != facts["classes"] and facts["classes"] != ["?"])):
        raise ConfigError(f"{said} is told other classes than this run: take its data set, with dataset.labels=true")


def denoiser_of(node: Mapping[str, Any], facts: Facts, trust: Collection[str] = ()) -> Denoiser:
    """The denoiser that the nodes schedule, prediction and model describe, with fresh weights. Raises ConfigError."""
    schedule = build(node["schedule"], Schedule, "schedule", trust=trust)
    prediction = build(node["prediction"], Prediction, "prediction", {"schedule": schedule}, trust)
    channels, size, _ = facts["codec"]["shape"] if "codec" in facts else (facts["channels"], facts["image_size"], 0)
    texts = facts.get("texts", TextFacts(digest="", width=0, length=0))
    sizes = {"channels": channels, "image_size": size, "num_classes": len(facts["classes"]) if facts["taught"] else 0}
    if node["objective"].get("self_conditioning"):
        sizes["hint_channels"] = channels
        _takes(node, "hint_channels", f"objective.self_conditioning={node['objective']['self_conditioning']}", "hint", trust)
    if node["objective"].get("augment") is not None:
        sizes["augment_width"] = WIDTH
        _takes(node, "augment_width", "objective/augment", "picture's moves", trust)
    if texts["width"]:
        sizes["text_width"] = texts["width"]
        _takes(node, "text_width", "texts", "text", trust)
    term = node["objective"].get("term")
    if term is not None and build(term, Term, "objective.term", trust=trust).learns_variance:
        sizes["variance_channels"] = channels
        _takes(node, "variance_channels", "objective/term", "variance", trust)
    method = node["objective"].get("method")
    if method is not None and build(method, Method, "objective.method", trust=trust).two_times:
        sizes["two_times"] = True
        _takes(node, "two_times", "objective.method", "second time", trust)
    network = build(node["model"], Network, "model", sizes, trust)
    _tells(network, prediction)
    return Denoiser(network, prediction, texts["length"])


def _tells(network: Network, prediction: Prediction) -> None:
    """ConfigError where random waves of time turn so often between data and noise that no two times are alike to the network:
    made for log(sigma) / 4, they are told 0 to 1000."""
    if network.bandwidth is None:
        return
    first, last = prediction.c_noise(torch.tensor([1e-3, 1.0], dtype=torch.float64, device="cpu")).tolist()
    if network.bandwidth * abs(last - first) > _TURNS:
        raise ConfigError(
            f"model.bandwidth is {network.bandwidth:g} and the prediction tells the time from {first:g} to {last:g}: choose "
            f"prediction=edm, for which such a network is made, or model.bandwidth={5 / abs(last - first):.1g}"
        )


def _takes(node: Mapping[str, Any], fact: str, asked: str, what: str, trust: Collection[str]) -> None:
    """ConfigError where the network's constructor has no such fact."""
    if fact not in target_of(node["model"], "model", trust).parameters:
        name = node["model"]["_target_"].rpartition(".")[2]
        raise ConfigError(
            f"{asked} needs a network that takes a {what}, and {name} takes none (its constructor has no {fact}): choose "
            "model=unet, unet_attn, dit or another that does, or leave it out"
        )


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


_TURNS = 400  # of random waves between data and noise: 16 of log(sigma)/4 over all that it can be
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
    return [
        name
        for name in target_of(objective, "objective", trust).parameters
        if name in PARTS or name in (*Stages.NAMES, "teacher")
    ]


def reads_texts(objective: Mapping[str, Any], trust: Collection[str] = ()) -> bool:
    """Whether a tokenizer is to be learned from the captions before the objective is made."""
    return "tokenizer" in parts_of(objective, trust)


def objective_of(node: Mapping[str, Any], facts: Facts, trust: Collection[str] = (), stages: Stages | None = None) -> Objective:
    """What diffusion-train trains, initialised from the run's seed. Raises ConfigError."""
    torch.manual_seed(word_of(node["seed"], "initial weights"))
    stages = stages or Stages()
    teacher = None if stages.teacher is None else stages.teacher.denoiser
    frozen = {name: getattr(stages, name) for name in Stages.NAMES} | {"teacher": teacher}
    names = parts_of(node["objective"], trust)
    given = {name: frozen[name] if name in frozen else PARTS[name](node, facts, trust) for name in names}
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


def rehearse(node: Mapping[str, Any], trust: Collection[str] = (), stages: Stages | None = None) -> Objective:
    """Builds everything once, without memory and data: what constructors refuse is said before any data is read."""
    dataset = build(node["dataset"], Dataset, "dataset", trust=trust)
    taught = [0] if dataset.labels else []
    facts = Facts(channels=dataset.channels, image_size=dataset.size, classes=["?"], taught=taught, fingerprint="")
    facts = facts if stages is None else stages.facts(facts)
    if reads_texts(node["objective"], trust):
        facts["tokenizer"] = learned([], node["objective"]["vocabulary"])
    if "sampler" in parts_of(node["objective"], trust):  # previews: does its grid fit the schedule?
        sampler = build(node["sampler"], Sampler, "sampler", trust=trust)
        sampler.times(build(node["schedule"], Schedule, "schedule", trust=trust))
    with torch.device("meta"):
        objective = objective_of(node, facts, trust, stages)
        adapt(objective, node, trust)
    return objective
