"""recompute=true: activations inside a network's blocks are not kept for the backward pass but computed again there.

Of a block only its input stays in memory, so that a network of L blocks keeps L inputs and the insides of one block, for about
a third more time (Chen et al. 2016, "Training deep nets with sublinear memory cost"). Gradients are the same to the bit, for
what dropout drew is drawn again; of EDM2, which normalises its weights in each forward, to rounding.
"""

from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusion_cli.errors import ConfigError


def recompute(network: nn.Module) -> None:
    """Every block. Names of weights stay; a copy of the network does the same. ConfigError: a network without blocks."""
    found = blocks(network)
    if not found:
        raise ConfigError(f"recompute=true: {type(network).__name__} has no blocks whose insides could be computed again")
    for block in found:
        block.__class__ = _again(cast(Any, type(block)))


def blocks(network: nn.Module) -> list[nn.Module]:
    """Members of lists that have parts, but no block among them."""
    lists = [part for part in network.modules() if isinstance(part, nn.ModuleList)]
    outer = [block for members in lists for block in members if any(True for _ in block.children())]
    return [block for block in outer if not any(part in outer for part in block.modules() if part is not block)]


@cache
def _again(kind: Any) -> Any:
    """The same module, whose forward keeps nothing but its arguments where gradients are wanted."""

    def forward(self: nn.Module, *args: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args, **named)
        return checkpoint(kind.forward, self, *args, use_reentrant=False, **named)

    return type(kind.__name__, (kind,), {"forward": forward})
