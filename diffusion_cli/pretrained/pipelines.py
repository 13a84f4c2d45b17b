"""A pipeline's folder -> Pretrained, one reader for each kind of pipeline; what is not read here is refused by its name.

The class of a pipeline is looked up in the tables below, and so are those of its parts: a repository's own code is never run.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.pretrained import files
from diffusion_cli.pretrained.networks import net_of
from diffusion_cli.pretrained.processes import process_of
from diffusion_cli.pretrained.trained import Pretrained
from diffusion_cli.signatures import did_you_mean

NETWORKS = ("unet", "transformer")  # folders of networks, as pipelines call them
SCHEDULER = "scheduler"
UNIT_SCHEDULER = "ScoreSdeVeScheduler"  # the one whose pictures are in [0, 1]


def read(folder: Path, said: str, home: Path) -> Pretrained:
    """said: the place in the user's words; home: where what is made goes. Raises UserError."""
    index = files.parsed(folder / files.INDEX) if (folder / files.INDEX).is_file() else _index_of_parts(folder)
    return reader_of(index, said)(folder, index, said, home)


def is_pipeline(folder: Path) -> bool:
    """Whether a pipeline, or the two parts of one, lie in this folder."""
    return (folder / files.INDEX).is_file() or any(_has_parts(folder, name) for name in NETWORKS)


def reader_of(index: Mapping[str, Any], said: str) -> Callable[[Path, Mapping[str, Any], str, Path], Pretrained]:
    """By model_index.json alone, before any weights are fetched. Raises ConfigError."""
    name = str(index.get("_class_name"))
    if name in _LATENT or "vae" in index or "vqvae" in index:
        raise ConfigError(
            f"{said} is a {name}: it makes latents, which an autoencoder turns into pictures, and pipelines of bare pictures "
            f"are read here ({', '.join(_READERS)})"
        )
    if name not in _READERS:
        raise ConfigError(f"{said} is a {name}, which is not read here: {did_you_mean(name, list(_READERS))}")
    strange = [key for key, value in index.items() if isinstance(value, list) and value[:1] not in (["diffusers"], [None])]
    if strange:
        raise ConfigError(f"{said} brings code of its own for {', '.join(strange)}, which is never run here")
    return _READERS[name]


def _of_unit_pixels(folder: Path, index: Mapping[str, Any], said: str, home: Path) -> Pretrained:
    """The same of pictures in [0, 1], which the network itself brings to [-1, 1]: it is given those at once."""
    return _of_pixels(folder, index, said, home, centred=True)


def _of_pixels(folder: Path, index: Mapping[str, Any], said: str, home: Path, centred: bool = False) -> Pretrained:
    """One network that knows pictures, and one scheduler. centred: does the network shift its input to [-1, 1]?"""
    name = next((name for name in NETWORKS if name in index), NETWORKS[0])
    network, scheduler = files.part(folder, name), files.part(folder, SCHEDULER) / "scheduler_config.json"
    told, walked = files.parsed(network / "config.json"), files.parsed(scheduler)
    unit = walked.get("_class_name") == UNIT_SCHEDULER
    if centred != unit or (centred and not told.get("center_input_sample")):
        raise ConfigError(f"{said}: a ScoreSdeVePipeline, no other, has a {UNIT_SCHEDULER}, and its network centres its input")
    if centred:
        told["center_input_sample"] = False
    try:
        net, process = net_of(told, said), process_of(walked, said)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError) as error:  # values of other kinds
        raise StorageError(f"{said}: its config.json or scheduler_config.json is not understood ({error!r})") from None
    weights = files.weights_in(network)
    ours = files.parsed(folder / files.FACTS) if (folder / files.FACTS).is_file() else {}
    facts = net.facts(ours.get("facts"), said)
    used = [network / "config.json", scheduler, *weights]
    used += [path for name in (files.INDEX, files.FACTS) if (path := folder / name).is_file()]
    dropout = ours.get("label_dropout", 0.1 if net.null_taught else 0.0)
    if not isinstance(dropout, int | float):
        raise StorageError(f"{said}: its {files.FACTS} is not what diffusion-export wrote")
    nodes = {
        "schedule": process.schedule,
        "prediction": process.prediction,
        "model": net.node,
        "sampler": process.sampler,
        "objective": {"_target_": "diffusion_cli.objectives.Denoising", "label_dropout": dropout},
    }
    read = lambda: net.rename(files.tensors_in(weights), len(facts["classes"]))  # noqa: E731
    return Pretrained(folder, home, said, files.digest_of(folder, used), {"config": nodes, "facts": facts}, read)


def _index_of_parts(folder: Path) -> dict[str, Any]:
    """What model_index.json would say of a network and a scheduler that lie there without one."""
    name = next(name for name in NETWORKS if _has_parts(folder, name))
    return {"_class_name": "DDPMPipeline", name: ["diffusers", None]}


def _has_parts(folder: Path, name: str) -> bool:
    return (folder / name / "config.json").is_file() and (folder / SCHEDULER / "scheduler_config.json").is_file()


def plain(name: str) -> str:
    """A name of a folder: OWNER/NAME -> OWNER-NAME."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "pipeline"


_READERS: dict[str, Callable[[Path, Mapping[str, Any], str, Path], Pretrained]] = {
    "DDPMPipeline": _of_pixels,
    "DDIMPipeline": _of_pixels,
    "PNDMPipeline": _of_pixels,
    "ScoreSdeVePipeline": _of_unit_pixels,
    "ConsistencyModelPipeline": _of_pixels,  # the plain loop with labels, as diffusion-export writes it
}
_LATENT = ("LDMPipeline", "DiTPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline", "LDMTextToImagePipeline")
