#!/usr/bin/env python3
"""Public weights of guided-diffusion and of EDM as a folder for diffusion-sample ckpt= and diffusion-train init=.

    python scripts/convert_checkpoint.py guided 64x64_diffusion.pt adm64 --size 64 --head-width 64 --order qhc --betas cosine
    python scripts/convert_checkpoint.py guided 256x256_diffusion.pt adm256 --size 256 --head-width 64    # also _uncond, lsun_*
    python scripts/convert_checkpoint.py edm edm.safetensors edm32 --size 32

guided-diffusion's networks, and EDM's for ImageNet, are the U-Net of Dhariwal and Nichol 2021 (appendix C, "ADM"), model=adm
here and a UNet2DModel of diffusers; EDM's for CIFAR-10, FFHQ and AFHQ are DDPM++ (of the names *-vp) and NCSN++ (*-ve), here
model=ddpmpp and ncsnpp. Widths and levels are read off the shapes; what the shapes do not say is an option. guided-diffusion
publishes bare tensors (.pt), which torch's restricted reader opens without running code. EDM publishes pickled objects with
code of their own (.pkl), which nothing here opens: in EDM's own environment, and only if you trust the file, its tensors are
written as safetensors first:

    import pickle, safetensors.torch                                            # in a clone of NVlabs/edm
    net = pickle.load(open("edm-cifar10-32x32-uncond-vp.pkl", "rb"))["ema"]      # this runs the code in the file
    print(type(net).__name__, net.sigma_data)                                    # EDMPrecond 0.5: others are not converted
    safetensors.torch.save_file({k: v.float().contiguous() for k, v in net.state_dict().items()}, "edm.safetensors")

What has no counterpart is refused: networks that halve their size by convolutions, upsamplers (their input has
six channels), a time embedding that is not as wide as the first level (512x512). The shapes do not say how many heads there
are: a UNet2DModel's have one width (--num_head_channels); 128x128_diffusion has 4 at every level (--num_heads).
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
# of a residual block and of attention: theirs -> diffusers
GUIDED = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
GUIDED_ATTENTION = {"norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0"}
EDM = {
    "norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2", "skip": "conv_shortcut",
}  # fmt: skip
EDM_ATTENTION = {"norm2": "group_norm", "qkv": "qkv", "proj": "to_out.0"}
DDPMPP = {  # to the names of our own network
    "norm0": "norm1", "conv0": "conv1", "affine": "time", "norm1": "norm2", "conv1": "conv2", "skip": "shortcut",
    "norm2": "attention.norm", "qkv": "attention.qkv", "proj": "attention.out",
}  # fmt: skip


class Refused(Exception):
    """The line that says why."""


def guided(weights: Weights) -> Iterator[tuple[str, str]]:
    """(the beginning of a name there, what it becomes), level by level."""
    outputs = len({name.split(".")[1] for name in weights if name.startswith("output_blocks.")})
    ups = [k for k in range(outputs) for i in (1, 2) if f"output_blocks.{k}.{i}.in_layers.0.weight" in weights]
    if not ups:
        raise Refused("its levels are joined by convolutions and not by residual blocks (resblock_updown=False)")
    rows = ups[0] + 1  # residual blocks of a level on the way up: one more than on the way down
    levels = outputs // rows
    yield from {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}.items()
    yield from {"label_emb": "class_embedding", "input_blocks.0.0": "conv_in"}.items()
    yield from {"out.0": "conv_norm_out", "out.2": "conv_out"}.items()
    for level in range(levels):
        for i in range(rows):
            here, there = 1 + level * rows + i, f"down_blocks.{level}"
            yield from _block(f"input_blocks.{here}.0", f"{there}.resnets.{i}" if i < rows - 1 else f"{there}.downsamplers.0")
            yield from _attention(f"input_blocks.{here}.1", f"{there}.attentions.{i}")
            here, there = level * rows + i, f"up_blocks.{level}"
            yield from _block(f"output_blocks.{here}.0", f"{there}.resnets.{i}")
            yield from _attention(f"output_blocks.{here}.1", f"{there}.attentions.{i}")
            if here in ups:
                last = 2 if f"output_blocks.{here}.2.in_layers.0.weight" in weights else 1
                yield from _block(f"output_blocks.{here}.{last}", f"{there}.upsamplers.0")
    yield from _block("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0")
    yield from _block("middle_block.2", "mid_block.resnets.1")


def _block(there: str, here: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{there}.{a}", f"{here}.{b}") for a, b in GUIDED.items())


def _attention(there: str, here: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{there}.{a}", f"{here}.{b}") for a, b in GUIDED_ATTENTION.items())


def edm(weights: Weights) -> Iterator[tuple[str, str]]:
    """The same for EDM's ADM, whose parts are named by their resolution."""
    sizes, count = levels_of(weights)
    yield from {"map_layer0": "time_embedding.linear_1", "map_layer1": "time_embedding.linear_2"}.items()
    yield from {"map_label": "class_embedding", f"enc.{sizes[0]}x{sizes[0]}_conv": "conv_in"}.items()
    yield from {"out_norm": "conv_norm_out", "out_conv": "conv_out"}.items()
    parts: dict[str, tuple[str, str]] = {}  # theirs -> the residual block, and the attention in it
    for level, size in enumerate(sizes):
        down, up = f"down_blocks.{level}", f"up_blocks.{len(sizes) - 1 - level}"
        enc, dec = f"enc.{size}x{size}", f"dec.{size}x{size}"
        parts[f"{enc}_down"] = f"down_blocks.{level - 1}.downsamplers.0", ""
        parts[f"{dec}_up"] = f"up_blocks.{len(sizes) - 2 - level}.upsamplers.0", ""
        for i in range(count):
            parts[f"{enc}_block{i}"] = f"{down}.resnets.{i}", f"{down}.attentions.{i}"
        for i in range(count + 1):
            parts[f"{dec}_block{i}"] = f"{up}.resnets.{i}", f"{up}.attentions.{i}"
    deepest = f"dec.{sizes[-1]}x{sizes[-1]}"
    parts[f"{deepest}_in0"] = "mid_block.resnets.0", "mid_block.attentions.0"
    parts[f"{deepest}_in1"] = "mid_block.resnets.1", ""
    for there, (block, attention) in parts.items():
        yield from ((f"{there}.{a}", f"{block}.{b}") for a, b in EDM.items())
        yield from ((f"{there}.{a}", f"{attention}.{b}") for a, b in EDM_ATTENTION.items() if attention)


def levels_of(weights: Weights) -> tuple[list[int], int]:
    """The resolutions, largest first, and the blocks of each on the way down."""
    sizes = sorted({int(m[1]) for name in weights if (m := re.match(r"enc\.(\d+)x", name))}, reverse=True)
    count = len({m[0] for name in weights if (m := re.match(rf"enc\.{sizes[0]}x{sizes[0]}_block\d+", name))} if sizes else ())
    if not count:
        raise Refused("its names are not those of a network of EDM")
    return sizes, count


def ddpmpp(weights: Weights) -> Iterator[tuple[str, str]]:
    """The same for EDM's SongUNet, of the kinds DDPM++ and NCSN++."""
    sizes, count = levels_of(weights)
    first, deepest = f"{sizes[0]}x{sizes[0]}", f"{sizes[-1]}x{sizes[-1]}"
    yield from {"map_layer0": "linear1", "map_layer1": "linear2", f"enc.{first}_conv": "conv_in"}.items()
    yield from {f"dec.{first}_aux_norm": "norm_out", f"dec.{first}_aux_conv": "conv_out"}.items()
    down = [f"{size}x{size}_{part}" for size in sizes for part in ("down", *(f"block{i}" for i in range(count)))]
    up = [f"{size}x{size}_{part}" for size in reversed(sizes) for part in ("up", *(f"block{i}" for i in range(count + 1)))]
    rows = {"down": ("enc", down[1:]), "mid": ("dec", [f"{deepest}_in0", f"{deepest}_in1"]), "up": ("dec", up[1:])}
    for here, (side, names) in rows.items():
        for i, name in enumerate(names):
            yield from ((f"{side}.{name}.{a}", f"{here}.{i}.{b}") for a, b in DDPMPP.items())
    yield "map_noise", "waves"
    yield from ((f"enc.{size}x{size}_aux_residual", f"rereads.{i}.conv") for i, size in enumerate(sizes[1:]))


def of_ddpmpp(weights: Weights, size: int, taps: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by our names, and the keys of the network. taps: of its filter."""
    sizes, count = levels_of(weights)
    classes, augment = [name for name in weights if name.startswith("map_label.")], "map_augment.weight"
    kept = {name: value for name, value in weights.items() if name not in (*classes, augment)}  # what was said of distortions
    found = split(renamed(kept, dict(ddpmpp(weights))), None, "hcq")
    if "waves.freqs" in found:
        found["waves.frequencies"] = found.pop("waves.freqs")
    if classes:  # a linear layer of sqrt(N) times the one-hot label
        label = weights["map_label.weight"]  # [width, N]
        table = label.T * label.shape[1] ** 0.5 + weights["map_label.bias"]  # [N, width]
        found["class_embedding.weight"] = table.contiguous()
    width = len(found["conv_in.weight"])
    ends = [len(found[f"down.{level * (count + 1) + count - 1}.conv1.weight"]) for level in range(len(sizes))]
    attends = [level for level in range(len(sizes)) if f"down.{level * (count + 1)}.attention.q.weight" in found]
    return found, {
        "_class_name": "DDPMpp", "sample_size": size, "in_channels": found["conv_in.weight"].shape[1], "width": width,
        "multipliers": [end // width for end in ends], "blocks": count, "attention_levels": attends, "groups": 32,
        "dropout": 0.0, "num_class_embeds": len(found["class_embedding.weight"]) if classes else None,
        "resample": "fir" if taps == 4 else "mean", "embedding": "fourier" if "waves.frequencies" in found else "sines",
        "encoder": "residual" if "rereads.0.conv.weight" in found else "plain",
    }  # fmt: skip


def renamed(weights: Weights, pairs: Mapping[str, str]) -> dict[str, Tensor]:
    found, strange = dict[str, Tensor](), list[str]()
    for name, value in weights.items():
        stem, _, kind = name.rpartition(".")
        if stem in pairs:
            found[f"{pairs[stem]}.{kind}"] = value.float()
        else:
            strange.append(name)
    if strange:
        raise Refused(f"{strange[0]} has no place in this network ({len(strange)} of {len(weights)} tensors)")
    return found


def split(weights: Weights, head_width: int | None, order: str, to: str = "") -> dict[str, Tensor]:
    """q, k and v out of one convolution [3 C, C, 1]; order: how its rows run, slowest first: heads, q k v, channels.

    head_width: None for a single head; to: how their new names begin.
    """
    found = {name: value for name, value in weights.items() if ".qkv." not in name}
    for name in weights.keys() - found.keys():
        value = weights[name].flatten(1) if name.endswith("weight") else weights[name]  # [3 C, C] or [3 C]
        width = len(value) // 3
        one = head_width or width
        if width % one:
            raise Refused(f"attention over {width} channels is not made of heads of {one}: another --head-width")
        sizes = {"h": width // one, "q": 3, "c": one}
        whole = value.reshape(*(sizes[letter] for letter in order), *value.shape[1:])
        for k, letter in enumerate("qkv"):
            part = whole.select(order.index("q"), k)  # [h, c, ...]
            found[name.replace(".qkv.", f".{to}{letter}.")] = part.reshape(width, *value.shape[1:]).contiguous()
    return {n: v.flatten(1) if n.endswith((".to_out.0.weight", ".attention.out.weight")) else v for n, v in found.items()}


def config_of(weights: Weights, size: int, head_width: int) -> dict[str, Any]:
    """config.json of the UNet2DModel that has tensors of these shapes."""
    levels = len({name.split(".")[1] for name in weights if name.startswith("down_blocks.")})
    widths = [len(weights[f"down_blocks.{level}.resnets.0.conv1.weight"]) for level in range(levels)]
    attends = [f"down_blocks.{level}.attentions.0.to_q.weight" in weights for level in range(levels)]
    channels, told = weights["conv_in.weight"].shape[1], weights["time_embedding.linear_1.weight"].shape[1]
    if told != widths[0]:
        raise Refused(
            f"its time is told in {told} waves and its first level has {widths[0]} channels: UNet2DModel has one for both"
        )
    if channels not in (1, 3):
        raise Refused(f"its input has {channels} channels: an upsampler's, which is told a small picture too")
    if len(weights["down_blocks.0.resnets.0.time_emb_proj.weight"]) != 2 * widths[0]:
        raise Refused("its time is added and not a scale and a shift (use_scale_shift_norm=False)")
    down = ["AttnDownBlock2D" if attend else "ResnetDownsampleBlock2D" for attend in attends]
    up = ["AttnUpBlock2D" if attend else "ResnetUpsampleBlock2D" for attend in reversed(attends)]
    rows = len(weights["class_embedding.weight"]) if "class_embedding.weight" in weights else None
    blocks = len({name.split(".")[3] for name in weights if name.startswith("down_blocks.0.resnets.")})
    return {
        "_class_name": "UNet2DModel", "sample_size": size, "in_channels": channels, "num_class_embeds": rows,
        "out_channels": len(weights["conv_out.weight"]), "block_out_channels": widths, "down_block_types": down,
        "up_block_types": up, "layers_per_block": blocks,
        "attention_head_dim": head_width, "norm_num_groups": 32, "attn_norm_num_groups": 32, "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet", "act_fn": "silu",
        "flip_sin_to_cos": True, "freq_shift": 0, "time_embedding_type": "positional", "center_input_sample": False,
    }  # fmt: skip


def converted(
    kind: str, weights: Weights, size: int, head_width: int | None, order: str, betas: str
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, config.json and scheduler_config.json. Raises Refused."""
    if kind == "edm":
        weights = {name.removeprefix("model."): value for name, value in weights.items()}
        taps = {value.shape[-1] for name, value in weights.items() if name.endswith("resample_filter")}
        if not taps <= {2, 4}:
            raise Refused(f"its filters have {sorted(taps)} taps, and those of 2 and 4 are known")
        weights = {name: value for name, value in weights.items() if not name.endswith("resample_filter")}
        scheduler = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
        if "out_norm.weight" not in weights:
            return *of_ddpmpp(weights, size, max(taps, default=2)), scheduler
        pairs, order, head_width = dict(edm(weights)), "hcq", head_width or 64
    else:
        pairs = dict(guided(weights))
        curve = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[betas]
        scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": curve, "beta_start": 1e-4}
        scheduler |= {"beta_end": 0.02, "prediction_type": "epsilon", "clip_sample": True, "variance_type": "fixed_small"}
    if head_width is None:
        raise Refused("how wide its heads are is not in the file: --head-width, what --num_head_channels was in training")
    found = split(renamed(weights, pairs), head_width, order, "to_")
    if kind == "guided" and len(found["conv_out.weight"]) > found["conv_in.weight"].shape[1]:
        scheduler["variance_type"] = "learned_range"
    if kind == "edm" and "class_embedding.weight" in found:
        found["class_embedding.weight"] = found["class_embedding.weight"].T.contiguous()  # a linear layer of a one-hot label
    return found, config_of(found, size, head_width), scheduler


def read(path: Path) -> Weights:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix != ".pt":
        raise Refused("neither .safetensors nor .pt: a .pkl has code in it, and is not opened here (--help says what to do)")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what the reader meets in a file from elsewhere, it says with errors of many kinds
        raise Refused(f"it cannot be opened without running code in it ({type(error).__name__})") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise Refused("it holds more than tensors by name")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["guided", "edm"])
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path, help="is made, and must not be there yet")
    parser.add_argument("--size", type=int, required=True, help="of the pictures")
    parser.add_argument("--head-width", type=int, help="channels of an attention head (num_head_channels)")
    parser.add_argument("--betas", choices=["linear", "cosine"], default="linear", help="guided: noise_schedule")
    parser.add_argument("--order", choices=["hqc", "qhc"], default="hqc", help="guided: qhc for use_new_attention_order=True")
    said = parser.parse_args()
    try:
        made = converted(said.kind, read(said.file), said.size, said.head_width, said.order, said.betas)
        if said.folder.exists():
            raise Refused(f"{said.folder} is there already")
        write(said.folder, *made)
    except (Refused, OSError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        sys.exit(f"convert_checkpoint: {said.file}: {' '.join(str(error).split())}")
    print(f"{said.folder}: diffusion-sample ckpt={said.folder} n=4")


def write(folder: Path, tensors: dict[str, Tensor], config: Any, scheduler: Any) -> None:
    """The two parts of a pipeline, without an index: no class of diffusers' pipelines knows DDPM++, and none is needed."""
    for name in ("unet", "scheduler"):
        (folder / name).mkdir(parents=True)
    for name, value in {"unet/config.json": config, "scheduler/scheduler_config.json": scheduler}.items():
        (folder / name).write_text(json.dumps(value, indent=1) + "\n")
    safetensors.torch.save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors")


if __name__ == "__main__":
    main()
