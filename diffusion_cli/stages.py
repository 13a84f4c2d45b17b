"""What a denoiser stands on: an autoencoder in whose latents it works, and an encoder of the texts that it is told; and the
classifier by whose eyes an autoencoder is trained, which nobody needs who asks it afterwards.

They were trained before and stay as they are. A config names them by their places; a run keeps a copy of its own,

    <run>/parts/codec  <run>/parts/texts  <run>/parts/perceptual

so that it needs nothing but its folder, and its facts name them by the digest of what was copied: another one is refused. An
encoder of transformers is not copied, only named.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusion_cli import storage
from diffusion_cli.alone import alone
from diffusion_cli.assembly import Facts, Stages, Teacher
from diffusion_cli.build import build
from diffusion_cli.checkpoint import Checkpoint
from diffusion_cli.codecs import Codec
from diffusion_cli.conditioning import ClipText, Conditioner, Pretrained
from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.finding import find, load_classifier, load_clip, load_codec, load_denoiser
from diffusion_cli.losses import Perceptual
from diffusion_cli.models import Classifier as Network
from diffusion_cli.objectives import Method
from diffusion_cli.pretrained.texts import digest_of
from diffusion_cli.pretrained.trained import Trained
from diffusion_cli.ranges import NonNegativeFloat, PositiveInt

FOLDER = "parts"
NAMES = Stages.NAMES
Part = Codec | Conditioner | Perceptual


class Stage(ABC):
    """A place where a frozen part lies. here: the run's own copy, which is taken where there is one."""

    @abstractmethod
    def open(self, here: Path, trust: tuple[str, ...]) -> Part:
        """The part; its digest is that of what was copied. Raises UserError."""

    def carry(self, here: Path) -> None:
        """Makes the copy. Raises UserError."""
        return


@dataclass(frozen=True)
class OfRun(Stage):
    """ckpt: a run, a checkpoint, a folder or hf://OWNER/NAME of diffusers; weights: its averaged ones, or the raw."""

    ckpt: str
    weights: Literal["ema", "raw"] = "ema"

    word = "codec.ckpt"
    part = "autoencoder"

    def found(self, here: Path) -> Trained:
        return find(here if here.exists() else self.ckpt, self.word)

    def carry(self, here: Path) -> None:
        if not here.exists():
            storage.make_folder(here.parent)
            storage.commit(here, alone(self.found(here), self.part, self.weights))


class Latents(OfRun):
    """The latents of an autoencoder."""

    def open(self, here: Path, trust: tuple[str, ...]) -> Part:
        found = self.found(here)
        codec = load_codec(found, self.weights, trust)
        codec.digest = origin(found)
        return codec


@dataclass(frozen=True)
class Clip(OfRun):
    """The tokens of a CLIP that was trained here. masked: is padding zero, or what the encoder says of it?"""

    masked: bool = True

    word = "texts.ckpt"
    part = "clip"

    def open(self, here: Path, trust: tuple[str, ...]) -> Part:
        found = self.found(here)
        texts = ClipText(*load_clip(found, self.weights, trust), self.masked)
        texts.digest = origin(found)
        return texts


@dataclass(frozen=True)
class Classifier(OfRun):
    """The eyes of a classifier. weight: of the distance that they see, in the loss."""

    weight: NonNegativeFloat = 1.0

    word = "perceptual.ckpt"
    part = "classifier"

    def open(self, here: Path, trust: tuple[str, ...]) -> Part:
        found = self.found(here)
        network = load_classifier(found, self.weights, trust).network
        if type(network).maps is Network.maps:
            raise ConfigError(f"{self.word}={self.ckpt}: {type(network).__name__} shows no feature maps (it has no `maps`)")
        perceptual = Perceptual(network, self.weight)
        perceptual.digest = origin(found)
        return perceptual


@dataclass(frozen=True)
class TextEncoder(Stage):
    """CLIP's, T5's or a sentence encoder of transformers; the words are those of conditioning.Pretrained."""

    name: str
    tokenizer: str | None = None
    length: PositiveInt | None = None
    masked: bool = True

    def open(self, here: Path, trust: tuple[str, ...]) -> Part:
        texts = Pretrained(self.name, self.tokenizer, self.length, self.masked)
        texts.digest = digest_of(texts.folder, texts.beside)
        return texts


def origin(found: Trained) -> str:
    """The digest of what was copied, or of what lies there itself."""
    return str(found.config.get("origin", found.digest))


def opened(node: Mapping[str, Any], folder: Path, trust: tuple[str, ...] = ()) -> Stages:
    """The frozen parts that a config names, for the run in that folder. Raises UserError."""
    found: dict[str, Any] = {}
    for name, kind in (("codec", Codec), ("texts", Conditioner), ("perceptual", Perceptual)):
        if node.get(name) is not None:
            place = build(node[name], Stage, name, trust=trust)
            found[name] = place.open(folder / FOLDER / name, trust)
            if not isinstance(found[name], kind):
                raise ConfigError(f"{name}: {type(place).__name__} is no {kind.__name__}: diffusion-train --help {name}")
    return Stages(**found, teacher=_teacher(node.get("objective", {}), trust))


def _teacher(objective: Mapping[str, Any], trust: tuple[str, ...]) -> Teacher | None:
    """The denoiser that the method of the objective names, its averaged weights; no copy is carried. Raises UserError."""
    if objective.get("method") is None:
        return None
    method = build(objective["method"], Method, "objective.method", trust=trust)
    if method.place is None:
        return None
    found = find(method.place, "objective.method.teacher")
    theirs = found.config["config"].get("objective", {}).get("method")
    try:
        method.check_teacher(None if theirs is None else build(theirs, Method, "objective.method", trust=trust))
    except ValueError as error:
        raise ConfigError(f"objective.method.teacher={method.place}: {error}") from None
    denoiser = load_denoiser(found, "ema", trust)
    denoiser.digest = found.digest
    return Teacher(denoiser, found.config["facts"], found.said)


def carry(node: Mapping[str, Any], folder: Path, trust: tuple[str, ...] = ()) -> None:
    """Copies the parts that are not there yet into the run's folder. Raises UserError."""
    for name in NAMES:
        if node.get(name) is not None:
            place = build(node[name], Stage, name, trust=trust)
            place.carry(folder / FOLDER / name)


def home_of(found: Trained) -> Path:
    """Where its own copies are: a pipeline of others has none, even where a run of the same name lies in outputs."""
    return found.run if isinstance(found, Checkpoint) else found.folder


def carried(found: Trained) -> dict[str, Any]:
    """The nodes of the frozen parts of which the model's own run has copies, with those for places."""
    node = found.config["config"]
    places = {name: home_of(found) / FOLDER / name for name in NAMES if node.get(name) is not None}
    return {name: {**node[name], "ckpt": str(place)} for name, place in places.items() if place.is_dir()}


def stages_of(found: Trained, trust: tuple[str, ...] = (), without: Collection[str] = ()) -> Stages:
    """The parts that a trained model stands on, but for those that are not asked for. Raises UserError."""
    facts: Facts = found.config["facts"]
    named = [name for name in NAMES if name in facts and name not in without]
    stages = opened({name: found.config["config"].get(name) for name in named}, home_of(found), trust)
    there = stages.facts(facts)
    for name in named:
        if there.get(name) != facts[name]:  # type: ignore[literal-required]
            raise StorageError(
                f"{found.said} was trained with another {name} than lies at {home_of(found) / FOLDER / name} or where its "
                f"config says: put back what its run had in {FOLDER}/{name}"
            )
    return stages
