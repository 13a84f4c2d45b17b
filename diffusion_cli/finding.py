"""The trained model that a path or a name on the hub means, and the denoiser, classifier or autoencoder in it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from diffusion_cli import checkpoint
from diffusion_cli.adapters import merged
from diffusion_cli.assembly import at_most, autoencoder_of, classifier_of, clip_of, denoiser_of, parts_of, tokenizer_of
from diffusion_cli.averages import weights_of
from diffusion_cli.build import build
from diffusion_cli.checkpoint import Checkpoint, Damaged
from diffusion_cli.codecs import Codec
from diffusion_cli.conditioning.tokenizer import Tokenizer
from diffusion_cli.data import Dataset
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.errors import ConfigError, StorageError, lacks_memory
from diffusion_cli.models import Clip
from diffusion_cli.noisy_classifier import NoisyClassifier
from diffusion_cli.pretrained.pipelines import is_pipeline
from diffusion_cli.pretrained.place import from_folder, from_hub, on_hub
from diffusion_cli.pretrained.trained import GROUPS, Trained
from diffusion_cli.runs import say
from diffusion_cli.signatures import did_you_mean
from diffusion_cli.status import check_own

Model = TypeVar("Model", bound=nn.Module)


def find(path: Path | str, word: str = "ckpt") -> Trained:
    """A run's newest good checkpoint, or that very one; a pipeline of diffusers, in a folder or on the hub. Raises UserError.

    checkpoints/best of a run is the one that trainer.best kept. word: the setting that said the path, for messages.
    """
    if on_hub(str(path)):
        return from_hub(str(path), word)
    path = Path(path).expanduser()
    return from_folder(path) if is_pipeline(path) else checkpoint_at(path, word)


def checkpoint_at(path: Path, word: str = "ckpt") -> Checkpoint:
    """The checkpoint at a path: a run's newest good one, or that very folder. Raises StorageError with the way out."""
    if path.name == "best" and path.parent.name == "checkpoints":
        try:
            path = checkpoint.pointed(path.parent)
        except Damaged:
            raise ConfigError(f"{word}={path}: this run kept no best checkpoint; trainer.best=evaluate/x0_mse does") from None
    if (path / "manifest.json").exists() or path.name.startswith("step_"):
        try:
            return _sound(checkpoint.load(path))
        except Damaged as error:
            raise StorageError(f"{word}={path} is damaged or incomplete: {error}") from None
    parent = path if path.name == "checkpoints" else path / "checkpoints"
    for candidate in checkpoint.good(parent):
        if isinstance(candidate, Checkpoint):
            return _sound(candidate)
        say(f"passed over a damaged checkpoint: {candidate}")
    if not path.exists():
        beside = sorted(p.parent.as_posix() for p in path.parent.glob("*/checkpoints")) if path.parent.is_dir() else []
        raise ConfigError(f"{word}={path} does not exist: {did_you_mean(str(path), beside) if beside else 'train it first'}")
    raise ConfigError(
        f"{word}={path} holds no checkpoint: give a run (outputs/<name>), one of its checkpoints/step_... folders, "
        "or a pipeline of diffusers (a folder with model_index.json, or hf://OWNER/NAME)"
    )


_LARGEST = 4096  # pixels of a side, and channels: more is no model's, and takes all memory that there is
_NODES = ("dataset", "schedule", "prediction", "model", "sampler", "guidance", "objective", "trainer", "loss")
_MAYBE = ("adapter", "codec", "texts", "perceptual", "features")  # nodes that may be null


def _sound(found: Checkpoint) -> Checkpoint:
    """What a checkpoint says is of the kinds that a run writes: it may be a stranger's. Raises StorageError."""
    check_own(found.run)
    node, facts = found.config["config"], found.config["facts"]
    strange = [key for key in _NODES if key in node and not isinstance(node[key], dict)]
    strange += [key for key in _MAYBE if not isinstance(node.get(key), dict | None)]
    strange += [] if isinstance(node.get("seed", 0), int) else ["seed"]
    strange += [key for key in facts if not _right(key, facts[key], facts)]
    if strange:
        said = repr({**node, **facts}[strange[0]])
        raise StorageError(f"{found.folder} cannot be used: its config.json says {strange[0]} = {said[:60]}")
    return found


def _right(key: str, value: Any, facts: Mapping[str, Any]) -> bool:
    """Of one of the facts (assembly.Facts)."""

    def counts(values: Any, length: int) -> bool:
        whole = isinstance(values, list) and len(values) == length
        return whole and all(type(one) is int and 0 < one <= _LARGEST for one in values)

    match key:
        case "channels" | "image_size":
            return counts([value], 1)
        case "classes":
            return isinstance(value, list) and all(isinstance(name, str) for name in value)
        case "taught":
            known = range(len(facts["classes"])) if isinstance(facts.get("classes"), list) else ()
            return isinstance(value, list) and all(type(label) is int and label in known for label in value)
        case "codec":
            return isinstance(value, dict) and isinstance(value.get("digest"), str) and counts(value.get("shape"), 3)
        case "texts":
            sizes = [value.get("width"), value.get("length")] if isinstance(value, dict) else None
            return counts(sizes, 2) and isinstance(value.get("digest"), str)
        case "fingerprint" | "tokenizer" | "perceptual" | "teacher":
            return isinstance(value, str)
    return True


def load_denoiser(found: Trained, weights: str | float, trust: tuple[str, ...] = ()) -> Denoiser:
    """The trained denoiser in evaluation mode. weights: ema, raw or a length. Raises UserError."""
    _must_be("denoiser", found, trust, "choose a run that makes pictures")
    made = lambda: denoiser_of(found.config["config"], found.config["facts"], trust)  # noqa: E731
    return _filled(made, found, "denoiser.", weights)


def load_classifier(found: Trained, weights: str | float, trust: tuple[str, ...] = ()) -> NoisyClassifier:
    """The trained classifier in evaluation mode. weights: ema, raw or a length. Raises UserError."""
    way_out = "train one with experiment=classifier_digits, or objective=classifying model=classifier on the same pictures"
    _must_be("classifier", found, trust, way_out)
    made = lambda: classifier_of(found.config["config"], found.config["facts"], trust)  # noqa: E731
    return _filled(made, found, "classifier.", weights)


def load_codec(found: Trained, weights: str | float, trust: tuple[str, ...] = ()) -> Codec:
    """The trained autoencoder in evaluation mode, its latents of unit scale. weights: ema, raw, a length. Raises UserError."""
    way_out = (
        "train one with experiment=autoencoder_digits, or objective=autoencoding model=autoencoder_kl on the same pictures"
    )
    _must_be("autoencoder", found, trust, way_out)
    made = lambda: autoencoder_of(found.config["config"], found.config["facts"], trust)  # noqa: E731
    return _filled(made, found, "autoencoder.", weights)


def load_clip(found: Trained, weights: str | float, trust: tuple[str, ...] = ()) -> tuple[Clip, Tokenizer]:
    """The trained encoders of pictures and texts in evaluation mode, and their tokenizer. Raises StorageError."""
    _must_be("clip", found, trust, "train one with objective=contrasting model=clip on pictures with captions")
    node, facts = found.config["config"], found.config["facts"]
    clip = _filled(lambda: clip_of(node, facts, trust), found, "clip.", weights)
    return clip, tokenizer_of(node, facts, trust)


# the part that a run trained -> what it is, and what it is for; {run}: its folder
KINDS = {
    "denoiser": ("a denoiser", ""),
    "classifier": (
        "a classifier",
        "it makes no pictures, it guides those of another run with guidance=classifier guidance.ckpt={run}",
    ),
    "autoencoder": (
        "an autoencoder",
        "it makes no pictures of its own; what it makes of given ones is in {run}/samples, and diffusion-evaluate measures it",
    ),
    "clip": (
        "an encoder of pictures and texts",
        "it makes no pictures, it says how well a text fits one, and makes tokens of texts for a denoiser",
    ),
}


def parts_in(found: Trained, trust: tuple[str, ...] = ()) -> list[str]:
    """The parts that the objective of the run asked for: what it trained is among KINDS. Raises UserError."""
    node = found.config["config"].get("objective")
    if node is None:
        raise StorageError(f"{found.folder} is of another program: its config.json lacks objective")
    return parts_of(node, trust)


def _must_be(wanted: str, found: Trained, trust: tuple[str, ...], way_out: str) -> None:
    """ConfigError where the run trained something else: what it is and what that is for, or the way to what is wanted."""
    parts = parts_in(found, trust)
    if wanted in parts:
        return
    kind, use = next((KINDS[part] for part in parts if part in KINDS), ("something else", ""))
    said = use.format(run=found.run) if wanted == "denoiser" and use else way_out
    raise ConfigError(f"{found.folder} is no {KINDS[wanted][0].split(maxsplit=1)[1]} but {kind}: {said}")


def _filled(made: Callable[[], Model], found: Trained, prefix: str, weights: str | float) -> Model:
    """The model with what the objective kept under that prefix, for asking alone; never a larger one than was kept."""
    tensors = plain_weights(found, weights)
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    try:
        with at_most(sum(value.numel() for value in own.values())):
            model = made()
        model.load_state_dict(own)
    except KeyError as error:
        raise StorageError(f"{found.folder} is of another program: its config.json lacks {error.args[0]}") from None
    except (RuntimeError, TypeError) as error:
        if isinstance(error, TypeError) and not lacks_memory(error):
            raise
        line = 0 if lacks_memory(error) else -1
        raise StorageError(f"{found.folder} cannot be used: {str(error).splitlines()[line].strip()}") from None
    return model.eval().requires_grad_(False)


def plain_weights(found: Trained, weights: str | float) -> dict[str, Tensor]:
    """All that the objective kept, adapters merged into what they adapt. weights: ema, raw or a length. Raises UserError."""
    try:
        there = [word for word, name in GROUPS.items() if name in found.groups()]
        if there and isinstance(weights, str) and weights not in there:
            raise StorageError(
                f"{found.folder} cannot be used with weights={weights}, which it was exported without: write weights={there[0]}"
            )
        adapter = found.config["config"].get("adapter")
        tensors = weights_of(found, weights)
        return tensors if adapter is None else merged(tensors, adapter["alpha"])
    except (Damaged, RuntimeError, KeyError) as error:
        raise StorageError(f"{found.folder} cannot be used: {str(error).splitlines()[-1].strip()}") from None


def dataset_of(found: Trained, path: str | None, trust: tuple[str, ...] = ()) -> Dataset:
    """The data set that the checkpoint was trained on, from another path if one is given. Raises ConfigError.

    A pipeline does not say what it was trained on: its pictures are those of a folder that is named.
    """
    if "dataset" not in found.config["config"]:
        return _named(found, path)
    node = dict(found.config["config"]["dataset"])
    if path is not None:
        if "path" not in node:
            raise ConfigError(f"data={path}: the run's data set {node['_target_']} has no path to change")
        node["path"] = path
    return build(node, Dataset, "dataset", trust=trust)


def _named(found: Trained, path: str | None) -> Dataset:
    facts = found.config["facts"]
    if path is None:
        raise ConfigError(f"{found.said} does not say on which pictures it was trained: name a folder of them with data=DIR")
    if facts["taught"]:
        raise ConfigError(f"data={path}: {found.said} is told classes, and which picture of a folder is of which is not known")
    sizes = {"size": facts["image_size"], "channels": facts["channels"]}
    return build({"_target_": "diffusion_cli.data.Folder", "path": path, **sizes}, Dataset, "dataset")
