"""A network of diffusers in our words: the node of a model, the facts of its pictures, and its weights by our names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffusion_cli.assembly import Facts
from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.models.ddpmpp import DDPMpp
from diffusion_cli.models.diffusers_dit import ours_of as ours_of_dit
from diffusion_cli.models.diffusers_dit import weights_of_ours as weights_of_our_dit
from diffusion_cli.models.diffusers_text import AuraFlow, UNet2DCondition
from diffusion_cli.models.diffusers_unet import UNet2D, keys_of_theirs, ours_of, weights_of_ours, with_null
from diffusion_cli.models.network import Network

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Net:
    """node: without what the facts say. channels, size: of what it knows, pictures or latents. rename: their tensors -> ours.
    rows: of the class table; 0 without one. null_taught: is the last row known to be trained for no label? text_width: of the
    tokens that it reads; 0: none. varied: does it say a variance too?"""

    node: dict[str, Any]
    channels: int
    size: int
    rows: int
    rename: Callable[[Weights, int], dict[str, Tensor]]  # and the number of classes
    null_taught: bool = False
    text_width: int = 0
    varied: bool = False

    def facts(self, said: Any, named: Mapping[str, str], place: str) -> Facts:
        """As of pictures that it knows. said: the facts that an export of ours has beside it; named: the classes by number.
        Without them classes are numbers, and all rows are classes."""
        names = [named.get(str(k), str(k)) for k in range(self.rows - self.null_taught)]
        sizes = {"channels": self.channels, "image_size": self.size}
        facts: dict[str, Any] = {**sizes, "classes": names, "taught": list(range(len(names))), "fingerprint": ""}
        if said is None:
            return Facts(**facts)  # type: ignore[typeddict-item]
        kinds = {"classes": str, "taught": int}
        lists = isinstance(said, Mapping) and all(isinstance(said.get(key), list) for key in kinds)
        right = lists and all(isinstance(one, kind) for key, kind in kinds.items() for one in said[key])
        if not right or any(not 0 <= label < len(said["classes"]) for label in said["taught"]):
            raise StorageError(f"{place}: its facts.json is not what diffusion-export wrote")
        if said["taught"] and self.rows != len(said["classes"]) + 1:
            raise StorageError(
                f"{place}: facts.json names {len(said['classes'])} classes, and the network has {self.rows} rows"
            )
        told = {**{key: said[key] for key in kinds}, "fingerprint": str(said.get("fingerprint", ""))}
        return Facts(**{**facts, **told})  # type: ignore[typeddict-item]


def net_of(config: Mapping[str, Any], place: str) -> Net:
    """config: a network's config.json. place: whose, for messages. Raises ConfigError for what has no counterpart here."""
    name = str(config.get("_class_name"))
    if name not in _READERS:
        raise ConfigError(f"{place}: its network is a {name}, and {', '.join(_READERS)} are read here")
    net = _READERS[name](config, place)
    return replace(net, varied=config.get("out_channels") == 2 * net.channels)


def _unet(config: Mapping[str, Any], place: str) -> Net:
    """UNet2DModel: our own UNet where it computes the same, which needs no diffusers; else that class behind our contract."""
    channels = _channels(config, 3, place)
    if config.get("class_embed_type") is not None:
        raise ConfigError(
            f"{place}: its labels come by class_embed_type {config['class_embed_type']}, and tables are read here"
        )
    rows = int(config.get("num_class_embeds") or 0)
    ours = ours_of(config, channels)
    if ours is not None:
        return Net({"_target_": "diffusion_cli.models.UNet", **ours}, channels, _size(config, place), rows, _as_ours)
    node = {"_target_": "diffusion_cli.models.UNet2D", **keys_of_theirs(config, UNet2D)}
    return Net(node, channels, _size(config, place), rows, _as_theirs)


def _as_ours(weights: Weights, classes: int) -> dict[str, Tensor]:
    return _filled(weights_of_ours(weights), "class_embedding.weight", classes)


def _as_theirs(weights: Weights, classes: int) -> dict[str, Tensor]:
    return _filled({f"peer.{name}": value for name, value in weights.items()}, "peer.class_embedding.weight", classes)


def _filled(weights: dict[str, Tensor], table: str, classes: int) -> dict[str, Tensor]:
    return {**weights, table: with_null(weights[table], classes)} if table in weights else weights


def _size(config: Mapping[str, Any], place: str) -> int:
    size = config.get("sample_size")
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise ConfigError(f"{place}: its pictures are of size {size}, and square ones of a stated size are made here")
    return side


def _dit(config: Mapping[str, Any], place: str) -> Net:
    """DiTTransformer2DModel, of pixels as diffusion-export writes it; it is always told a label, and its last one is none."""
    channels, ours = _channels(config, 4, place), ours_of_dit(config)
    if ours is None:
        raise ConfigError(f"{place}: its DiT has norms, activations or biases that ours has not")
    rename = lambda weights, classes: weights_of_our_dit(weights, ours["patch_size"], classes)  # noqa: E731
    rows = int(config.get("num_embeds_ada_norm", 1000)) + 1
    return Net({"_target_": "diffusion_cli.models.DiT", **ours}, channels, _size(config, place), rows, rename, True)


def _ddpmpp(config: Mapping[str, Any], place: str) -> Net:
    """Our own DDPM++ or NCSN++ by our own keys, as scripts/convert_checkpoint.py writes EDM's: diffusers has none."""
    node = {"_target_": "diffusion_cli.models.DDPMpp", **keys_of_theirs(config, DDPMpp)}
    rename = lambda weights, classes: _filled(dict(weights), "class_embedding.weight", classes)  # noqa: E731
    return Net(node, _channels(config, 3, place), _size(config, place), int(config.get("num_class_embeds") or 0), rename)


def _channels(config: Mapping[str, Any], silent: int, place: str) -> int:
    channels = int(config.get("in_channels", silent))
    if config.get("out_channels") not in (None, channels, 2 * channels):
        raise ConfigError(f"{place}: its network gives {config['out_channels']} channels for {channels}")
    return channels


@dataclass(frozen=True)
class _Reader:
    """A network of models/diffusers_text.py. width: the key of its tokens' width. lacks: keys of it that are not read
    here, with the only values that mean nothing."""

    kind: type[Network]
    width: str
    lacks: Mapping[str, tuple[Any, ...]]

    def __call__(self, config: Mapping[str, Any], place: str) -> Net:
        for key, silent in self.lacks.items():
            if config.get(key, silent[0]) not in silent:
                raise ConfigError(f"{place}: its network has {key} {config[key]}, which is not read here")
        channels, width = _channels(config, 4, place), config.get(self.width)
        if not isinstance(width, int):
            raise ConfigError(f"{place}: its network has {self.width} {width}, and tokens of one stated width are read here")
        node = {"_target_": f"diffusion_cli.models.{self.kind.__name__}", **keys_of_theirs(config, self.kind)}
        return Net(node, channels, _size(config, place), 0, _as_theirs, text_width=width)


_CONDITIONS = (  # of a U-Net: what it would be told beside its tokens, and how
    "encoder_hid_dim", "encoder_hid_dim_type", "class_embed_type", "addition_embed_type", "num_class_embeds",
    "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim", "projection_class_embeddings_input_dim",
    "cross_attention_norm", "reverse_transformer_layers_per_block", "mid_block_only_cross_attention",
)  # fmt: skip
_FLAGS = {
    "dual_cross_attention": (False,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "class_embeddings_concat": (False,),
    "attention_type": ("default",),
}
_READERS: dict[str, Callable[[Mapping[str, Any], str], Net]] = {
    "UNet2DModel": _unet,
    "DiTTransformer2DModel": _dit,
    "Transformer2DModel": _dit,  # the name of the published DiT's class, once
    "UNet2DConditionModel": _Reader(UNet2DCondition, "cross_attention_dim", {**dict.fromkeys(_CONDITIONS, (None,)), **_FLAGS}),
    "AuraFlowTransformer2DModel": _Reader(AuraFlow, "joint_attention_dim", {}),
    "DDPMpp": _ddpmpp,
}
