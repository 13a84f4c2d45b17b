"""A pipeline's folder -> Pretrained, a line of a table for each kind of pipeline; what is not read here is refused by its name.

The class of a pipeline is looked up in the tables below, and so are those of its parts: a repository's own code is never run.

    pixels     a network and a scheduler
    latents    and an autoencoder, whose folder becomes the node `codec`
    texts      and a text encoder with its tokenizer, whose folders become the node `texts`
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_cli.assembly import Facts
from diffusion_cli.conditioning import Pretrained as Conditioner
from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.pretrained import autoencoders, files
from diffusion_cli.pretrained.networks import Net, net_of
from diffusion_cli.pretrained.processes import process_of
from diffusion_cli.pretrained.texts import ENCODER, TOKENIZER, Reading, Texts, texts_of
from diffusion_cli.pretrained.trained import Pretrained
from diffusion_cli.signatures import did_you_mean

NETWORKS = ("unet", "transformer")  # folders of networks, as pipelines call them
CODECS = ("vae", "vqvae")
SCHEDULER = "scheduler"
UNIT_SCHEDULER = "ScoreSdeVeScheduler"  # the one whose pictures are in [0, 1]
_VARIED = {"term": {"_target_": "diffusion_cli.losses.Hybrid"}}  # of the objective of a network that says a variance too
_MISREAD = (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError)  # of values of other kinds


@dataclass(frozen=True)
class Kind:
    """What a kind of pipeline is made of. codec: the folder of its autoencoder; None: it makes pixels. centred: does its
    network shift its input to [-1, 1]?"""

    codec: str | None = None
    texts: Reading | None = None
    centred: bool = False


def read(folder: Path, said: str, home: Path) -> Pretrained:
    """said: the place in the user's words; home: where what is made goes. Raises UserError."""
    if not _is_pipeline(folder):
        return autoencoders.read(folder, said, home)
    index = files.parsed(folder / files.INDEX) if (folder / files.INDEX).is_file() else _index_of_parts(folder)
    return _read(folder, index, kind_of(index, said), said, home)


def is_pipeline(folder: Path) -> bool:
    """Whether a pipeline, the two parts of one, or an autoencoder lie in this folder."""
    return _is_pipeline(folder) or autoencoders.is_autoencoder(folder)


def _is_pipeline(folder: Path) -> bool:
    return (folder / files.INDEX).is_file() or any(_has_parts(folder, name) for name in NETWORKS)


def kind_of(index: Mapping[str, Any], said: str) -> Kind:
    """By model_index.json alone, before any weights are fetched. Raises ConfigError."""
    name = str(index.get("_class_name"))
    if name in _REFUSED:
        raise ConfigError(f"{said} is a {name}, which is not read here: {_REFUSED[name]}")
    if name not in _KINDS:
        raise ConfigError(f"{said} is a {name}, which is not read here: {did_you_mean(name, list(_KINDS))}")
    kind = _KINDS[name]
    wanted = [*([kind.codec] if kind.codec else []), *([ENCODER, TOKENIZER] if kind.texts else [])]
    lacking = [part for part in wanted if not isinstance(index.get(part), list) or index[part][:1] in ([], [None])]
    if lacking:
        raise ConfigError(f"{said} is a {name} without its {' and '.join(lacking)}: {files.INDEX} names none")
    parts = (*NETWORKS, *CODECS, SCHEDULER, ENCODER, TOKENIZER)
    known = (["diffusers"], ["transformers"], [None])
    strange = [part for part in parts if isinstance(index.get(part), list) and index[part][:1] not in known]
    if strange:
        raise ConfigError(f"{said} brings code of its own for {', '.join(strange)}, which is never run here")
    if kind.codec is None and (further := [part for part in CODECS if part in index]):
        raise ConfigError(f"{said} is a {name} with a {further[0]}, and one of bare pictures is read here")
    return kind


def _read(folder: Path, index: Mapping[str, Any], kind: Kind, said: str, home: Path) -> Pretrained:
    name = next((name for name in NETWORKS if name in index), NETWORKS[0])
    network, scheduler = files.part(folder, name), files.part(folder, SCHEDULER) / "scheduler_config.json"
    told, walked = files.parsed(network / "config.json"), files.parsed(scheduler)
    unit = walked.get("_class_name") == UNIT_SCHEDULER
    if kind.centred != unit or (kind.centred and not told.get("center_input_sample")):
        raise ConfigError(f"{said}: a ScoreSdeVePipeline, no other, has a {UNIT_SCHEDULER}, and its network centres its input")
    if kind.centred:  # it is given pictures in [-1, 1] at once
        told["center_input_sample"] = False
    try:
        net, process = net_of(told, said), process_of(walked, said)
    except _MISREAD as error:
        raise StorageError(f"{said}: its config.json or scheduler_config.json is not understood ({error!r})") from None
    weights = files.weights_in(network)
    ours = files.parsed(folder / files.FACTS) if (folder / files.FACTS).is_file() else {}
    named = index.get("id2label")
    facts = net.facts(ours.get("facts"), _names(named) if isinstance(named, dict) else {}, said)
    used = [network / "config.json", scheduler, *weights]
    used += [path for name in (files.INDEX, files.FACTS) if (path := folder / name).is_file()]
    digests = [files.digest_of(folder, used)]
    dropout = ours.get("label_dropout", 0.1 if net.null_taught or net.text_width else 0.0)
    if not isinstance(dropout, int | float):
        raise StorageError(f"{said}: its {files.FACTS} is not what diffusion-export wrote")
    nodes = {
        "schedule": process.schedule,
        "prediction": process.prediction,
        "model": net.node,
        "sampler": process.walked(net.varied),
        "objective": {
            "_target_": "diffusion_cli.objectives.Denoising",
            "label_dropout": dropout,
            **(_VARIED if net.varied else {}),
        },
        "codec": None,
        "texts": None,
    }
    if kind.codec is not None:
        codec = autoencoders.read(folder / kind.codec, f"{said}: its {kind.codec}", home)
        facts = _of_latents(facts, net, codec, said)
        nodes["codec"] = {"_target_": "diffusion_cli.stages.Latents", "ckpt": str(codec.folder), "weights": "ema"}
        digests.append(codec.digest)
    elif net.channels not in (1, 3):
        raise ConfigError(f"{said}: its network knows {net.channels} channels, and grey and RGB pictures are made here")
    texts = _texts(folder, kind, net, said)
    if texts is not None:
        facts["texts"] = {"digest": texts.digest, "width": texts.width, "length": texts.length}
        nodes["texts"] = texts.node
        digests.append(texts.digest)

    def tensors() -> dict[str, Tensor]:
        found = net.rename(files.tensors_in(weights), len(facts["classes"]))
        null = {} if texts is None else {"denoiser.null": _null(texts)}
        return {f"denoiser.network.{key}": value for key, value in found.items()} | null

    return Pretrained(folder, home, said, files.joined(digests), {"config": nodes, "facts": facts}, tensors)


def _texts(folder: Path, kind: Kind, net: Net, said: str) -> Texts | None:
    """The encoder of the texts that the network reads. Raises UserError where the two do not fit."""
    if kind.texts is None:
        if net.text_width:
            raise ConfigError(f"{said}: its network reads texts, and this kind of pipeline has none")
        return None
    texts = texts_of(folder, kind.texts, said)
    if texts.width != net.text_width:
        reads = f"tokens of width {net.text_width}" if net.text_width else "no texts"
        raise ConfigError(f"{said}: its network reads {reads}, and its texts have {texts.width}")
    return texts


def _of_latents(facts: Facts, net: Net, codec: Pretrained, said: str) -> Facts:
    """The facts of the pictures that a network of latents makes with this autoencoder. Raises ConfigError."""
    told = files.parsed(codec.folder / "config.json")
    latents = autoencoders.latent_channels_of(told)
    if latents != net.channels:
        raise ConfigError(f"{said}: its network knows {net.channels} channels, and its autoencoder's latents have {latents}")
    made, size = facts.copy(), net.size * autoencoders.factor_of(told)
    made["channels"], made["image_size"] = codec.config["facts"]["channels"], size
    made["codec"] = {"digest": codec.digest, "shape": [latents, net.size, net.size]}
    return made


def _null(texts: Texts) -> Tensor:
    """[L, D]: the tokens of the empty text, which the network is given where there is none."""
    keys = {key: value for key, value in texts.node.items() if key != "_target_"}
    return Conditioner(**keys).null()


def _names(labels: Mapping[str, Any]) -> dict[str, str]:
    """The first of each class's names, or all of them where another class begins with the same."""
    first = {key: str(value).partition(",")[0].strip() for key, value in labels.items()}
    often = [name for name in first.values() if list(first.values()).count(name) > 1]
    return {key: str(labels[key]) if name in often else name for key, name in first.items()}


def _index_of_parts(folder: Path) -> dict[str, Any]:
    """What model_index.json would say of a network and a scheduler that lie there without one."""
    name = next(name for name in NETWORKS if _has_parts(folder, name))
    if (folder / CODECS[0] / "config.json").is_file():
        return {"_class_name": "DiTPipeline", name: ["diffusers", None], CODECS[0]: ["diffusers", None]}
    return {"_class_name": "DDPMPipeline", name: ["diffusers", None]}


def _has_parts(folder: Path, name: str) -> bool:
    return (folder / name / "config.json").is_file() and (folder / SCHEDULER / "scheduler_config.json").is_file()


def plain(name: str) -> str:
    """A name of a folder: OWNER/NAME -> OWNER-NAME."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "pipeline"


_KINDS = {
    "DDPMPipeline": Kind(),
    "DDIMPipeline": Kind(),
    "PNDMPipeline": Kind(),
    "ScoreSdeVePipeline": Kind(centred=True),
    "ConsistencyModelPipeline": Kind(),  # the plain loop with labels, as diffusion-export writes it
    "LDMPipeline": Kind(codec="vqvae"),
    "DiTPipeline": Kind(codec="vae"),
    "StableDiffusionPipeline": Kind(codec="vae", texts=Reading(masked=False)),
    "AuraFlowPipeline": Kind(codec="vae", texts=Reading(length=256)),
}
_REFUSED = {
    "StableDiffusionXLPipeline": "it has two text encoders, and its network is told the size of the picture too",
    "StableDiffusion3Pipeline": "it has three text encoders, and its network is told a summary of the text beside its tokens",
    "FluxPipeline": "it has two text encoders, and its network is told a summary of the text beside its tokens",
    "LDMTextToImagePipeline": "its text encoder, LDMBert, is neither of CLIP nor of T5",
    "StableDiffusionInpaintPipeline": "its network is shown the picture; edit=inpaint serves with a StableDiffusionPipeline",
}
