"""Low-rank adapters: a trained network is taught more by few new weights beside its own, which stay as they are.

    W x  ->  W x + (alpha / r) B A x        A [r, in] at random, B [out, r] = 0: at first nothing changes

Hu et al. 2021, "LoRA", section 4.1. A of a convolution has its kernel, B is one of 1 x 1. peft puts them into the layers and
trains them there. A checkpoint keeps its names, with the base beside A and B, so that it needs no other file; `merged` makes
the plain network's weights of them, W + (alpha / r) B A, by which such a run is sampled, exported and begun from without peft.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from diffusion_cli.ranges import PositiveFloat, PositiveInt, Rate
from diffusion_cli.vision import mend_torchvision

_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."
_ADAPTED = (nn.Linear, nn.Conv2d)  # these very classes: one inside nn.MultiheadAttention is read past its own forward


@dataclass(frozen=True)
class LoRA:
    """targets: last parts of the names of layers that get an adapter, null: every linear and convolutional one. whole: those of
    layers that are trained themselves, by default the table of classes, whose new rows no product of a few columns would hold.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 8.0
    dropout: Rate = 0.0
    targets: tuple[str, ...] | None = None
    whole: tuple[str, ...] = ("class_embedding",)

    def put_into(self, network: nn.Module) -> None:
        """In place. ValueError: peft is not installed, or no layer has such a name."""
        mend_torchvision()
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ValueError("adapters need the package peft: pip install 'diffusion-cli[lora]'") from None
        layers = [name for name, part in network.named_modules() if type(part) in _ADAPTED and getattr(part, "groups", 1) == 1]
        if not layers:
            raise ValueError(
                "this network has no linear or convolutional layer of the usual kind, and an adapter goes into those"
            )
        chosen = [name for name in layers if self.targets is None or _last(name) in self.targets]
        strange = sorted(set(self.targets or ()) - {_last(name) for name in chosen})
        if strange or not chosen:
            there = ", ".join(sorted({_last(name) for name in layers}))
            raise ValueError(f"targets names {', '.join(strange) or 'nothing'}, and this network's layers are {there}")
        config = LoraConfig(
            r=self.rank,
            lora_alpha=cast(Any, self.alpha),  # it is only divided by r
            lora_dropout=self.dropout,
            target_modules="|".join(map(re.escape, chosen)),
        )
        inject_adapter_in_model(config, network)  # and all else needs no gradient from here on
        for name, part in network.named_modules():
            if _last(name) in self.whole:
                part.requires_grad_(True)


def _last(name: str) -> str:
    """The last word of a layer's name: the 0 of to_out.0 says nothing."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def merged(weights: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The plain network's weights, from those with adapters. RuntimeError: A and B do not fit the layer."""
    found = dict(weights)
    for layer in [name.removesuffix(_A) for name in weights if name.endswith(_A)]:
        A, B = found.pop(layer + _A), found.pop(layer + _B)  # [r, in], [out, r], or with a kernel behind: [r, in, k, k]
        W = found[f"{layer}{_BASE}weight"]
        found[f"{layer}{_BASE}weight"] = W + alpha / len(A) * (B.flatten(1) @ A.flatten(1)).view_as(W)
    return {name.replace(_BASE, "."): value for name, value in found.items()}
