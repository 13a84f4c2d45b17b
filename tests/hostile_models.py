"""Hostile checkpoints and pipelines of others: configs that name functions, values, pickles, headers, indices."""

import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile_parts import (
    EVALUATE,
    EVIL,
    HEADERS,
    IGNORED,
    PICKLES,
    REFUSED,
    SAMPLE,
    TINY,
    Case,
    Payload,
    a_run,
    signed,
    told,
    with_values,
)

TARGETS: dict[str, dict[str, object]] = {
    "os.system": {"command": "touch ../outside/owned"},
    "torch.load": {"f": "evil.pt", "weights_only": False},
    "numpy.load": {"file": "evil.npy", "allow_pickle": True},
    "builtins.open": {"file": "../outside/owned", "mode": "w"},
    "pathlib.Path.write_text": {"self": "../outside/owned", "data": "x"},
    "subprocess.Popen": {"args": ["touch", "../outside/owned"]},
    "hydra.utils.instantiate": {"config": {"_target_": "os.system", "command": "touch ../outside/owned"}},
    "diffusion_cli.storage.write": {"path": "../outside/owned", "data": "x"},
    "diffusion_cli.storage.shutil.rmtree": {"path": "../outside"},
    "diffusion_cli.build.importlib.import_module": {"name": "antigravity"},
    "diffusion_cli.cli.os.system": {"command": "touch ../outside/owned"},
    "diffusion_cli.runs.Run": {"folder": "../outside/owned"},
    "diffusion_cli.stages.OfRun": {"ckpt": "../outside"},
    "diffusion_cli.schedules.Flow.__init__.__globals__": {},
    "evilmodule.Evil": {},
}
READ = ("schedule", "prediction", "model", "sampler", "sampler.grid", "objective")
UNREAD = ("optimizer", "ema", "loss", "features", "optimizer.decay")


def _beside(here: Path) -> None:
    """A module and pickles that a target might reach from the current folder."""
    (here / "evilmodule.py").write_text("open('../outside/owned', 'w')\nclass Evil: ...\n")
    (here / "evil.pt").write_bytes(pickle.dumps(Payload()))
    (here / "evil.npy").write_bytes(b"\x93NUMPY" + pickle.dumps(Payload()))


def targets() -> Iterator[Case]:
    for target, words in TARGETS.items():
        node = {"_target_": target, **words}
        for place in (*READ, *UNREAD):
            if place in UNREAD and target not in ("os.system", "torch.load", "diffusion_cli.storage.write"):
                continue
            make = with_values({f"config.{place}": node})
            both = lambda here, make=make: (_beside(here), make(here))  # noqa: E731
            yield Case(f"{place} {target}", told(both, SAMPLE), IGNORED if place in UNREAD else REFUSED)
        evil = with_values({"config.trust": ["os", "torch", "numpy", "evilmodule", "diffusion_cli"], "config.model": node})
        yield Case(f"trust in the checkpoint {target}", told(lambda here, m=evil: (_beside(here), m(here)), SAMPLE))
    evil_node = {"_target_": "os.system", "command": "touch ../outside/owned"}
    for words, place in (
        (EVALUATE, "dataset"),
        ([*SAMPLE, "nearest=1"], "dataset"),
        (["export", "ckpt=run"], "model"),
        (["export", "ckpt=run", "to=safetensors"], "prediction"),
        ([*TINY, "init=run"], "schedule"),
        ([*TINY, "init=run"], "objective"),
        ([*TINY, "init=run"], "sampler"),
        ([*TINY, "codec=latents", "codec.ckpt=run"], "objective"),
        ([*TINY, "texts=clip", "texts.ckpt=run"], "objective"),
        ([*EVALUATE[:2], "metrics=[kid]", "features=classifier", "features.ckpt=run", "n=2", "device=cpu"], "objective"),
    ):
        yield Case(f"{' '.join(words[:1] + words[-1:])} {place}", told(with_values({f"config.{place}": evil_node}), words))
    node = {"_target_": "diffusion_cli.stages.Latents", "ckpt": "/etc/passwd", "weights": "ema"}
    facts = {"digest": "0", "shape": [1, 8, 8]}
    yield Case("codec /etc/passwd", told(with_values({"config.codec": node, "facts.codec": facts}), SAMPLE))
    yield Case("codec os.system", told(with_values({"config.codec": evil_node, "facts.codec": facts}), SAMPLE))
    texts = {"digest": "0", "width": 8, "length": 4}
    yield Case("texts os.system", told(with_values({"config.texts": evil_node, "facts.texts": texts}), SAMPLE))
    adapter = {"_target_": "os.system", "command": "touch ../outside/owned", "alpha": 1}
    yield Case("adapter os.system", told(with_values({"config.adapter": adapter}), SAMPLE), IGNORED)


VALUES: dict[str, dict[str, object]] = {
    "image_size 10^9": {"facts.image_size": 10**9},
    "image_size 30000": {"facts.image_size": 30_000},
    "image_size -8": {"facts.image_size": -8},
    "image_size a word": {"facts.image_size": EVIL},
    "image_size true": {"facts.image_size": True},
    "channels 10^8": {"facts.channels": 10**8},
    "channels null": {"facts.channels": None},
    "classes number": {"facts.classes": 7},
    "classes of nodes": {"facts.classes": [{"_target_": "os.system"}] * 10},
    "classes 10^6": {"facts.classes": ["x"] * 10**6},
    "taught beyond": {"facts.taught": [10**12]},
    "taught words": {"facts.taught": ["../../x"]},
    "taught number": {"facts.taught": 3},
    "width 10^7": {"config.model.width": 10**7},
    "width 3000": {"config.model.width": 3000},
    "width 10^400": {"config.model.width": 10**400},
    "blocks 10^8": {"config.model.blocks": 10**8},
    "multipliers 10^5 long": {"config.model.multipliers": [1] * 10**5},
    "multipliers 10^9": {"config.model.multipliers": [10**9]},
    "groups 10^9": {"config.model.groups": 10**9},
    "head_width word": {"config.model.head_width": "${oc.env:HOME}"},
    "levels deep": {"config.model.attention_levels": [[[[[[1]]]]]]},
    "DiT depth 10^8": {
        "config.model": {
            "_target_": "diffusion_cli.models.DiT",
            "patch_size": 2,
            "width": 8,
            "depth": 10**8,
            "heads": 1,
            "mlp_ratio": 4.0,
            "dropout": 0.0,
        }
    },
    "steps 10^12": {"config.sampler.steps": 10**12},
    "steps -1": {"config.sampler.steps": -1},
    "table of a grid": {"config.sampler.grid": {"_target_": "diffusion_cli.samplers.Leading", "table": 10**12, "offset": 0}},
    "self_conditioning a word": {"config.objective.self_conditioning": EVIL},
    "config a list": {"config": []},
    "facts a list": {"facts": [1]},
    "no model": {"config.model": None},
    "model a word": {"config.model": "os.system"},
    "schedule empty": {"config.schedule": {}},
    "objective of another kind": {"config.objective": {"_target_": "diffusion_cli.objectives.Classifying"}},
    "codec without a node": {"facts.codec": {"digest": "0", "shape": [1, 8, 8]}},
    "codec of 10^9": {"facts.codec": {"digest": "0", "shape": [10**9, 8, 8]}},
    "codec a word": {"facts.codec": EVIL},
    "texts of 10^9": {"facts.texts": {"digest": "0", "width": 10**9, "length": 10**9}},
    "texts a word": {"facts.texts": EVIL},
    "adapter a word": {"config.adapter": EVIL},
    "adapter alpha a word": {"config.adapter": {"_target_": "diffusion_cli.adapters.LoRA", "alpha": EVIL}},
    "interpolation": {"config.schedule": {"_target_": "${oc.env:HOME}"}},
    "newlines": {"config.schedule": {"_target_": "a\nb\n\x1b[2J"}},
}
EVALUATED: dict[str, dict[str, object]] = {
    "dataset a word": {"config.dataset": EVIL},
    "dataset of a file": {
        "config.dataset": {"_target_": "diffusion_cli.data.Folder", "path": "/etc", "size": 8, "channels": 1}
    },
    "dataset of 10^9": {"config.dataset.size": 10**9},
    "dataset workers": {"config.dataset.workers": 10**9, "config.dataset.memory": 1e300},
    "batch a word": {"config.trainer": EVIL},
    "seed a word": {"config.seed": EVIL},
}


def values() -> Iterator[Case]:
    for name, changes in VALUES.items():
        yield Case(name, told(with_values(changes), SAMPLE), IGNORED)
    for name in ("width 3000", "no model", "steps -1", "objective of another kind", "adapter a word", "classes number"):
        yield Case(f"init {name}", told(with_values(VALUES[name]), [*TINY, "init=run"]), IGNORED)
        yield Case(f"export {name}", told(with_values(VALUES[name]), ["export", "ckpt=run"]), IGNORED)
    for name, changes in EVALUATED.items():
        yield Case(f"evaluate {name}", told(with_values(changes), EVALUATE), IGNORED)


def _file(name: str, data: bytes | Callable[[bytes], bytes], sign: bool = True) -> Callable[[Path], None]:
    def make(here: Path) -> None:
        folder = a_run(here)
        path = folder / name
        path.write_bytes(data(path.read_bytes()) if callable(data) else data)
        if sign and name != "manifest.json":
            signed(folder)

    return make


def files() -> Iterator[Case]:
    for name, data in {**PICKLES, **HEADERS}.items():
        yield Case(f"average.safetensors: {name}", told(_file("average.safetensors", data), SAMPLE))
    for name in ("pickle", "zip of torch", "deflate bomb", "zip slip"):
        for suffix in (".pt", ".ckpt", ".safetensors"):
            make = lambda here, data=PICKLES[name], s=suffix: (here / f"model{s}").write_bytes(data)  # noqa: E731
            yield Case(f"ckpt=model{suffix} {name}", told(make, ["sample", f"ckpt=model{suffix}", "n=1"]))
    for name, text in {
        "deep": "[" * 100_000,
        "deep objects": '{"config":' * 100_000,
        "number of 10^5 digits": '{"config": {}, "facts": {}, "x": ' + "9" * 10**5 + "}",
        "yaml": "!!python/object/apply:os.system ['touch ../outside/owned']",
        "NaN": '{"config": {"seed": NaN}, "facts": {"channels": NaN}}',
        "bytes": "\udcff",
        "not an object": "3",
    }.items():
        data = text.encode(errors="surrogateescape")
        yield Case(f"config.json {name}", told(_file("config.json", data), SAMPLE))
        yield Case(f"manifest.json {name}", told(_file("manifest.json", data), SAMPLE))
        yield Case(f"init state.json {name}", told(_file("state.json", data), [*TINY, "init=run"]), IGNORED)
    for name, change in {
        "up": lambda m: m["files"].update({"../../../outside/secret.json": m["files"]["config.json"]}),
        "absolute": lambda m: m["files"].update({"/etc/passwd": m["files"]["config.json"]}),
        "step 10^4000": lambda m: m.update(step=10**4000),
        "step -1": lambda m: m.update(step=-1),
        "step true": lambda m: m.update(step=True),
        "size 10^300": lambda m: m["files"]["config.json"].update(bytes=10**300),
        "format 10^4000": lambda m: m.update(format=10**4000, program=EVIL + "\n" + EVIL),
        "hash a list": lambda m: m["files"]["config.json"].update(sha256=[]),
    }.items():
        yield Case(f"manifest {name}", told(lambda here, c=change: _manifest(here, c), SAMPLE))
    for step in (10**4000, -1, True, "../../../outside", 1e308, None):
        yield Case(
            f"best.json {str(step)[:20]}", told(lambda here, s=step: _best(here, s), [SAMPLE[0], "ckpt=run/checkpoints/best"])
        )


def _manifest(here: Path, change: Callable[[dict[str, Any]], object]) -> None:
    sys.set_int_max_str_digits(0)
    path = a_run(here).rename(here / "run" / "alone") / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    for file in path.parent.iterdir():
        file.rename(here / "run" / file.name)


def _best(here: Path, step: object) -> None:
    (a_run(here).parent / "best.json").write_text(json.dumps({"step": step}))


# -- pipelines of others -----------------------------------------------------------------------------------------------


def _pipeline(index: object, **written: object) -> Callable[[Path], None]:
    """A folder with model_index.json, and files by their paths (__ for /)."""

    def make(here: Path) -> None:
        whole = {"model_index__json": index, **UNET, **written}
        for name, value in whole.items():
            if value is None:
                continue
            path = (
                here
                / "pipe"
                / name.replace("__json", ".json").replace("__bin", ".bin").replace("__py", ".py").replace("__", "/")
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())

    return make


UNET: dict[str, object] = {
    "unet__config__json": {
        "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
        "block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
        "norm_num_groups": 4, "attention_head_dim": None,
    },
    "scheduler__scheduler_config__json": {"_class_name": "DDPMScheduler", "num_train_timesteps": 10, "beta_schedule": "linear"},
}  # fmt: skip
DDPM = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
PIPE = ["sample", "ckpt=pipe", "n=1", "device=cpu", "sampler.steps=1"]
STABLE = {
    "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}  # fmt: skip


def pipelines() -> Iterator[Case]:
    net = UNET["unet__config__json"]
    walk = UNET["scheduler__scheduler_config__json"]
    assert isinstance(net, dict) and isinstance(walk, dict)
    for name, index in {
        "class os.system": {**DDPM, "_class_name": "os.system"},
        "class of a list": {**DDPM, "_class_name": ["DDPMPipeline"]},
        "unet of a module": {**DDPM, "unet": ["evilmodule", "Evil"]},
        "unet of a file": {**DDPM, "unet": ["my_unet", "MyUNet"]},
        "scheduler of a module": {**DDPM, "scheduler": ["subprocess", "Popen"]},
        "class of others": {**DDPM, "_class_name": ["pipeline", "Evil"]},
        "names that lead away": {**DDPM, "../../outside": ["diffusers", "UNet2DModel"]},
        "a list": [DDPM],
        "a word": EVIL,
    }.items():
        evil = b"open('../outside/owned', 'w')\n"
        made = _pipeline(index, pipeline__py=evil, unet__my_unet__py=evil)
        yield Case(f"model_index {name}", told(lambda here, m=made: (_beside(here), m(here)), PIPE))
    for name, changes in {
        "class torch.load": {"_class_name": "torch.load"},
        "width 10^9": {"block_out_channels": [10**9]},
        "width 8192": {"block_out_channels": [8192]},
        "layers 10^9": {"layers_per_block": 10**9},
        "auto_map": {"auto_map": {"AutoModel": "evil.Evil"}, "_class_name": "Evil"},
        "size 10^9": {"sample_size": 10**9},
        "groups 0": {"norm_num_groups": 0},
        "act_fn eval": {"act_fn": "__import__('os').system('touch ../outside/owned')"},
        "blocks of os": {"down_block_types": ["os.system"]},
        "null": {"block_out_channels": None},
    }.items():
        yield Case(f"unet {name}", told(_pipeline(DDPM, unet__config__json={**net, **changes}), PIPE))
    for name, changes in {
        "class os.system": {"_class_name": "os.system"},
        "times 10^12": {"num_train_timesteps": 10**12},
        "times a word": {"num_train_timesteps": EVIL},
        "betas of 10^7": {"trained_betas": [0.1] * 10**6},
        "betas of words": {"trained_betas": [EVIL]},
        "schedule": {"beta_schedule": "__import__('os')"},
    }.items():
        yield Case(f"scheduler {name}", told(_pipeline(DDPM, scheduler__scheduler_config__json={**walk, **changes}), PIPE))
    for name, data in PICKLES.items():
        yield Case(f"bin {name}", told(_pipeline(DDPM, unet__diffusion_pytorch_model__bin=data), PIPE))
    weights = "unet__diffusion_pytorch_model.safetensors"
    for name, data in HEADERS.items():
        yield Case(f"unet.safetensors {name}", told(_pipeline(DDPM, **{weights: data}), PIPE))
    index_file = f"{weights}.index__json"
    for name, weight_map in {"up": "../../../outside/secret", "absolute": "/etc/passwd", "node": {"a": 1}}.items():
        yield Case(f"index {name}", told(_pipeline(DDPM, **{index_file: {"weight_map": {"a": weight_map}}}), PIPE))
    yield Case("index a list", told(_pipeline(DDPM, **{index_file: {"weight_map": [1, 2]}}), PIPE))
    clip = {
        "model_type": "clip_text_model",
        "hidden_size": 8,
        "max_position_embeddings": 8,
        "auto_map": {"AutoModel": "evil.Evil"},
    }
    for name, encoder, words in (
        ("encoder of others", {**clip, "model_type": "evil"}, {}),
        ("encoder of 10^9", {**clip, "hidden_size": 10**9}, {}),
        ("tokenizer of others", clip, {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
        ("tokenizer a list", clip, [1]),
        ("tokenizer of 10^9", clip, {"model_max_length": 10**9}),
    ):
        made = _pipeline(
            STABLE, text_encoder__config__json=encoder, tokenizer__tokenizer_config__json=words,
            tokenizer__evil__py=b"open('../outside/owned', 'w')\n", text_encoder__evil__py=b"open('../outside/owned', 'w')\n",
        )  # fmt: skip
        yield Case(f"texts {name}", told(made, [*PIPE, "prompt=x"]))
