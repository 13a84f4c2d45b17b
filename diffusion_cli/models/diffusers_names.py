"""The names of the weights of diffusers' UNet2DModel in our UNet: the two differ in nothing else."""

import re

_OLD = (  # attention in files of before 2023, as google/ddpm-* and the autoencoder of Stable Diffusion 1
    (r"(\.attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)
_RENAMES = (  # in this order
    (r"^time_embedding\.linear_(\d)", r"time_embedding.linear\1"),
    (r"^conv_norm_out", "norm_out"),
    (r"^(down|up)_blocks\.(\d+)\.resnets\.(\d+)", r"\1.\2.blocks.\3.residual"),
    (r"^(down|up)_blocks\.(\d+)\.attentions\.(\d+)", r"\1.\2.blocks.\3.attention"),
    (r"^(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0", r"\1.\2.resize"),
    (r"^mid_block\.resnets\.(\d)", r"mid.\1.residual"),
    (r"^mid_block\.attentions\.0", "mid.0.attention"),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.time_emb_proj\.", ".time."),
    (r"\.attention\.group_norm\.", ".attention.norm."),
    (r"\.attention\.to_([qkv])\.", r".attention.\1."),
    (r"\.attention\.to_out\.0\.", ".attention.out."),
)


def current(name: str) -> str:
    """The name that diffusers has for a weight today."""
    return _applied(_OLD, name)


def renamed(name: str) -> str:
    """Their name of a weight -> ours."""
    return _applied(_RENAMES, current(name))


def _applied(pairs: tuple[tuple[str, str], ...], name: str) -> str:
    for pattern, replacement in pairs:
        name = re.sub(pattern, replacement, name)
    return name
