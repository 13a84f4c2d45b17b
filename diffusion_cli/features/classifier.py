"""Features of a classifier that this project trained, asked without noise: what its last linear map reads.

No other weights are needed, so it is there on any machine and for any data with labels. Figures in it are not comparable with
those of Inception, and between runs only where both were judged by the same checkpoint (its digest says so).
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion_cli.assembly import Facts
from diffusion_cli.data.pixels import to_float
from diffusion_cli.errors import ConfigError
from diffusion_cli.features.features import Extractor, Features, Seen
from diffusion_cli.finding import find, load_classifier
from diffusion_cli.models import Classifier as Network


@dataclass(frozen=True)
class Classifier(Features):
    """ckpt: a run or checkpoint of objective=classifying, trained on pictures of the same size; weights: ema or raw."""

    ckpt: str | None = None
    weights: Literal["ema", "raw"] = "ema"

    def __post_init__(self) -> None:
        if self.ckpt is None:
            raise ValueError("features.ckpt= a classifier run is needed, as experiment=classifier_digits makes one")

    def open(self, facts: Facts, device: torch.device, trust: Collection[str] = ()) -> Extractor:
        found = find(Path(str(self.ckpt)), "features.ckpt")
        network = load_classifier(found, self.weights, tuple(trust)).network.to(device)
        theirs = found.config["facts"]
        for key in ("channels", "image_size"):
            if theirs[key] != facts[key]:
                sizes = f"{key} is {theirs[key]} there and {facts[key]} in this run"
                raise ConfigError(f"features.ckpt={found.folder} is for other pictures: {sizes}")
        last = _last_linear(network)

        def look(images: Tensor) -> Seen:
            read: list[Tensor] = []
            handle = last.register_forward_pre_hook(lambda module, given: read.append(given[0]))
            try:
                logits = network(to_float(images), torch.zeros(len(images), device=images.device))
            finally:
                handle.remove()
            return Seen(read[-1].flatten(1), logits)

        digest = found.digest[:16] if self.weights == "ema" else f"{found.digest[:12]}-raw"
        return Extractor(self.name, digest, look, True, list(theirs["classes"]))


def _last_linear(network: Network) -> nn.Linear:
    """The map to the logits."""
    maps = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not maps or maps[-1].out_features != network.num_classes:
        raise ConfigError(f"features.ckpt: {type(network).__name__} does not end in a linear map to its classes")
    return maps[-1]
