"""The files of a pipeline in a folder: JSON and safetensors and nothing else. No code of it is run, and no pickle is opened.

    model_index.json                                    which class each part has; without it, the parts are looked for
    unet/config.json  unet/diffusion_pytorch_model...   weights whole, or in several files with an index; vae/ likewise
    text_encoder/config.json  text_encoder/model...     of transformers, with tokenizer/ beside it
    scheduler/scheduler_config.json

Pipelines of before 2023 have the files of their parts side by side, not in folders (google/ddpm-celebahq-256).
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from diffusion_cli.checkpoint import Damaged
from diffusion_cli.errors import ConfigError, StorageError

INDEX = "model_index.json"
FACTS = "facts.json"  # what diffusion-export says beside a pipeline: names of classes, and whether no label was taught
STEM = "diffusion_pytorch_model"
TEXT_STEM = "model"
PICKLES = (f"{STEM}.bin", "pytorch_model.bin")


def part(folder: Path, name: str) -> Path:
    """Where the files of a part lie."""
    return folder / name if (folder / name).is_dir() else folder


def parsed(path: Path) -> dict[str, Any]:
    """A JSON object. Raises StorageError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(f"{path} is missing: a pipeline of diffusers has it (save_pretrained writes all)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise StorageError(f"{path}: not a JSON object")
    return value


def weights_in(folder: Path, stem: str = STEM) -> list[Path]:
    """The safetensors files of a network: one, or several that an index names. Raises ConfigError, StorageError."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        weight_map = parsed(index).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        paths = [folder / Path(name).name for name in names]  # a name cannot lead out of the folder
        lacking = [path.name for path in paths if not path.is_file()]
        if lacking or not paths:
            raise StorageError(f"{folder} is incomplete: {index.name} names {', '.join(lacking) or 'no file'}")
        return paths
    whole = [folder / f"{stem}.safetensors", *sorted(folder.glob(f"{stem}.*.safetensors"))]  # then fp16 and other variants
    found = next((path for path in whole if path.is_file()), None)
    if found is not None:
        return [found]
    pickled = next((folder / name for name in PICKLES if (folder / name).is_file()), None)
    if pickled is not None:
        raise ConfigError(pickles_alone(str(pickled)))
    raise StorageError(f"{folder} has no weights: {stem}.safetensors is missing")


def pickles_alone(path: str) -> str:
    """The line about weights that exist as a pickle only."""
    return (
        f"{path} is a pickle, which can run code when it is opened, and only safetensors are read here: convert it with "
        "safetensors.torch.save_file(torch.load('FILE.bin', weights_only=True), 'FILE.safetensors')"
    )


def digest_of(root: Path, paths: Iterable[Path]) -> str:
    """One SHA-256 over the names and the SHA-256 of all these files. Raises StorageError."""
    whole = hashlib.sha256()
    for path in sorted(set(paths)):
        try:
            with path.open("rb") as file:
                one = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from None
        whole.update(f"{path.relative_to(root).as_posix()} {one}\n".encode())
    return whole.hexdigest()


def joined(digests: Iterable[str]) -> str:
    """One SHA-256 over several, in their order; of one alone that one."""
    first, *rest = digests
    return hashlib.sha256(" ".join([first, *rest]).encode()).hexdigest() if rest else first


def tensors_in(paths: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors, in float32. Raises Damaged."""
    found: dict[str, Tensor] = {}
    for path in paths:
        try:
            found |= safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
            raise Damaged(f"{path}: {error}") from None
    return {name: value.to(torch.float32) for name, value in found.items()}
