"""What samples are compared with: the real pictures of a split, whole and unflipped, in the same features.

Their features, mean and covariance are made once and kept in the user's cache ($XDG_CACHE_HOME or ~/.cache, there in
diffusion-cli/references), in a folder that is named by the pictures and the features. What does not hold what its name says is
made anew.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_cli import storage
from diffusion_cli.data import Pictures
from diffusion_cli.errors import StorageError
from diffusion_cli.evaluation.distances import Cloud, moments
from diffusion_cli.evaluation.rows import made
from diffusion_cli.evaluation.samples import Look
from diffusion_cli.features import Extractor
from diffusion_cli.objectives.denoising import gather
from diffusion_cli.runs import cache_home, say
from diffusion_cli.signals import StopRequest

FORMAT = 1
_TENSORS, _FACTS = "features.safetensors", "made_by.json"


@dataclass(frozen=True, eq=False)
class Reference:
    """cloud: of count pictures of a split."""

    cloud: Cloud
    split: str
    count: int
    fingerprint: str

    def facts(self) -> dict[str, Any]:
        return {"split": self.split, "count": self.count, "fingerprint": self.fingerprint}


def reference_of(pictures: Pictures, split: str, look: Look, batch: int, device: torch.device, stop: StopRequest) -> Reference:
    """From the cache, or made now and kept there. Raises Stopped."""

    def columns(look: Look) -> dict[str, Tensor]:
        with tqdm(total=len(pictures), unit="real picture", disable=None, leave=False) as bar:
            make = lambda ids: look.columns(gather(pictures, ids).to(device))  # noqa: E731
            return made(make, 0, len(pictures), batch, stop, bar.update)

    cloud = Cloud()
    if look.extractor is not None:
        folder = cache_home() / "references" / f"{look.extractor.name}-{look.extractor.digest}-{pictures.fingerprint}"
        facts = _facts(look.extractor, pictures)
        tensors = _kept(folder, facts)
        if tensors is None:
            features = columns(replace(look, directions=None))["features"]
            mean, covariance = moments(features)
            tensors = {"features": features, "mean": mean, "covariance": covariance}
            _keep(folder, facts, tensors)
        cloud = Cloud(tensors["features"], given=(tensors["mean"], tensors["covariance"]))
    if look.directions is not None:
        cloud = replace(cloud, projections=columns(replace(look, extractor=None))["projections"])
    return Reference(cloud, split, len(pictures), pictures.fingerprint)


def _facts(extractor: Extractor, pictures: Pictures) -> dict[str, Any]:
    named = {"name": extractor.name, "digest": extractor.digest}
    return {"format": FORMAT, "features": named, "fingerprint": pictures.fingerprint, "count": len(pictures)}


def _kept(folder: Path, facts: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of a folder that holds what it should; says so where one is there and does not."""
    if not folder.exists():
        return None
    try:
        before = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        data = (folder / _TENSORS).read_bytes()
        if {key: before.get(key) for key in facts} != facts:
            raise ValueError("it is of other pictures or features")
        if hashlib.sha256(data).hexdigest() != before["sha256"]:
            raise ValueError(f"the SHA-256 of {_TENSORS} is another")
        return safetensors.torch.load(data)
    except (OSError, ValueError, KeyError, AttributeError, safetensors.SafetensorError) as error:
        say(f"the kept reference {folder} cannot be used ({getattr(error, 'strerror', None) or error}): made anew")
        return None


def _keep(folder: Path, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A cache is a convenience: where it cannot be written, the next evaluation makes the reference again."""
    data = safetensors.torch.save(tensors)
    words = {**facts, "sha256": hashlib.sha256(data).hexdigest()}
    try:
        storage.make_folder(folder.parent)
        if folder.exists():
            storage.remove(folder)
        storage.commit(folder, {_TENSORS: data, _FACTS: (json.dumps(words, indent=1) + "\n").encode()})
    except StorageError as error:
        say(f"the reference is not kept: {error}")
