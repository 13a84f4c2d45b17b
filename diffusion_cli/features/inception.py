"""The Inception network of the published FID, KID and inception score: the TensorFlow weights of 2015, by torch-fidelity.

    pictures -> 299 x 299 as TensorFlow 1 resizes -> 2048 features before the last map, 1008 logits without its bias

(Salimans et al. 2016; Heusel et al. 2017; torch-fidelity ports what their TensorFlow code did, the resize too.) torchvision's
Inception was trained anew and gives other numbers. The weights are known by their SHA-256 and read as tensors, without code.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusion_cli.assembly import Facts
from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.features.features import Extractor, Features, Seen, colour, of_file
from diffusion_cli.vision import mend_torchvision

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@dataclass(frozen=True)
class Inception(Features):
    """path: the file of weights, null for torch's cache; sha256: what it must be, null for any (no published value then)."""

    path: str | None = None
    sha256: str | None = SHA256

    def open(self, facts: Facts, device: torch.device, trust: Collection[str] = ()) -> Extractor:
        path = _cached() if self.path is None else Path(self.path).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"features=inception: its weights are not at {path}: curl -L --create-dirs -o {path} {URL}   or choose "
                "features.path=FILE, or features=classifier"
            )
        digest = of_file(path)
        if self.sha256 is not None and digest != self.sha256:
            raise StorageError(
                f"features=inception: {path} is not the published file (SHA-256 {digest[:16]}..., not {self.sha256[:16]}...): "
                "remove it and download it again, or say features.sha256=null for weights of your own"
            )
        network = _network(path).to(device)

        def look(images: Tensor) -> Seen:
            return Seen(*network(colour(images)))

        return Extractor(self.name if digest == SHA256 else "inception_other", digest[:16], look, logits=True)


def _cached() -> Path:
    """Where torch, and so torch-fidelity, keeps what it downloads."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch")
    return Path(home).expanduser() / "hub" / "checkpoints" / FILE


def _network(path: Path) -> torch.nn.Module:
    mend_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        with _without_code():
            return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
    except Exception as error:  # whatever a file that is no checkpoint raises
        raise StorageError(f"features=inception: {path} cannot be read: {str(error).splitlines()[0]}") from None


@contextmanager
def _without_code() -> Iterator[None]:
    """The library would unpickle whatever the file says; torch reads tensors alone where the environment demands it."""
    word = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(word)
    os.environ[word] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[word]
        else:
            os.environ[word] = before
