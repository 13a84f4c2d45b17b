"""A network of diffusers, made by its own class and behind no contract yet."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffusion_cli.vision import mend_torchvision


def peer(name: str, keys: Mapping[str, Any]) -> nn.Module:
    """ValueError: diffusers is not installed, or its class of that name refuses the keys."""
    mend_torchvision()
    try:
        import diffusers
    except ImportError:
        raise ValueError("this network needs the package diffusers: pip install 'diffusion-cli[diffusers]'") from None
    try:
        made: nn.Module = getattr(diffusers, name)(**keys)
    except (TypeError, AttributeError, RuntimeError, IndexError, NotImplementedError) as error:  # it checks little itself
        raise ValueError(f"{name} of diffusers refuses these keys: {' '.join(str(error).split())}") from None
    return made
