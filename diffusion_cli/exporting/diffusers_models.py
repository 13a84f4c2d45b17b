"""Our networks as classes of diffusers with the same weights, where both compute the same; else the reason why not."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from torch import nn

from diffusion_cli.errors import ConfigError
from diffusion_cli.models import DiT, UNet, UNet2DCondition
from diffusion_cli.models.diffusers_dit import weights_of_theirs
from diffusion_cli.models.diffusers_names import renamed
from diffusion_cli.models.diffusers_unet import theirs_of
from diffusion_cli.models.network import Network


def peer_of(network: Network, node: Mapping[str, Any], label: int | None) -> nn.Module:
    """node: the network's own config. label: a label to be told for good, or None. Raises ConfigError."""
    name = type(network).__name__
    if network.text_width and type(network) is not UNet2DCondition:
        raise ConfigError(
            f"to=diffusers: this {name} reads texts, and no network of diffusers reads them as it does: model=unet2d_condition "
            "is one of theirs; to=folder, onnx and torch_export take any network"
        )
    if type(network) not in _MAKERS:
        known = " and ".join(cls.__name__ for cls in _MAKERS)
        raise ConfigError(
            f"to=diffusers: diffusers has no {name}: {known} map; to=folder, onnx and torch_export take any network"
        )
    if network.two_times:
        raise ConfigError(
            "to=diffusers: this network has two times (objective=meanflow), and none of diffusers has; to=folder takes it"
        )
    if network.hint_channels:
        raise ConfigError(
            "to=diffusers: this network is self-conditioned, and no pipeline of diffusers feeds it its answer before"
        )
    defaults = {key: parameter.default for key, parameter in signature(type(network)).parameters.items()}
    return _MAKERS[type(network)](network, {**defaults, **node}, label).eval()


def _unet(network: Network, keys: Mapping[str, Any], label: int | None) -> nn.Module:
    """UNet2DModel, which differs in names alone. A label told for good is a constant of the time embedding."""
    from diffusers import UNet2DModel

    if keys["patch_size"] != 1:
        raise ConfigError(
            f"to=diffusers: model.patch_size is {keys['patch_size']}, and diffusers' UNet2DModel has no patches; "
            "to=folder, onnx and torch_export take any network"
        )
    open_labels = network.num_classes and label is None
    peer = UNet2DModel(
        sample_size=network.image_size,
        in_channels=network.channels,
        out_channels=network.channels + network.variance_channels,
        **theirs_of(keys),
        num_class_embeds=network.num_classes + 1 if open_labels else None,
    )
    ours = dict(network.state_dict())
    if label is not None:
        ours["time_embedding.linear2.bias"] = ours["time_embedding.linear2.bias"] + ours["class_embedding.weight"][label]
    peer.load_state_dict({name: ours[renamed(name)] for name in peer.state_dict()})
    return peer


def _dit(network: Network, keys: Mapping[str, Any], label: int | None) -> nn.Module:
    """DiTTransformer2DModel: it keeps the embeddings of time and label in every block, and is always told a label."""
    from diffusers import DiTTransformer2DModel

    assert isinstance(network, DiT)
    width = keys["width"]
    if network.time_embedding.shift != 1:
        raise ConfigError(
            "to=diffusers: diffusers' DiT is told time by waves of other frequencies, 10000^(-i / 127) for 10000^(-i / 128): "
            "what maps is trained with model.time_shift=1"
        )
    if round(width * keys["mlp_ratio"]) != 4 * width:
        raise ConfigError(f"to=diffusers: model.mlp_ratio is {keys['mlp_ratio']:g}, and diffusers' DiT has 4")
    if label is not None:
        raise ConfigError(
            f"to=diffusers: label={label} cannot be told for good to diffusers' DiT, which is always asked with one"
        )
    peer = DiTTransformer2DModel(
        num_attention_heads=keys["heads"],
        attention_head_dim=width // keys["heads"],
        in_channels=network.channels,
        out_channels=network.channels,  # DiTPipeline asks it of the config
        num_layers=keys["depth"],
        dropout=keys["dropout"],
        sample_size=network.image_size,
        patch_size=network.patch_size,
        num_embeds_ada_norm=max(network.num_classes, 1),
        norm_eps=keys["norm_eps"],
    )
    peer.load_state_dict(weights_of_theirs(network, peer))
    return peer


def _condition(network: Network, keys: Mapping[str, Any], label: int | None) -> nn.Module:
    """UNet2DConditionModel, which ours is."""
    assert isinstance(network, UNet2DCondition)
    return network.peer


_MAKERS: dict[type[Network], Callable[[Network, Mapping[str, Any], int | None], nn.Module]] = {
    UNet: _unet,
    DiT: _dit,
    UNet2DCondition: _condition,
}
