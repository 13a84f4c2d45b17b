"""What a stranger could send, as a table: each case makes files in a folder of its own and says the command that meets them.

`python hostile.py` reads cases on standard input, warms up with harmless ones, and runs each in a fork, under limits, with an audit
hook that hears every import, process, socket, unpickling and write; test_hostile.py judges what it tells.
"""

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import sys
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

GOLDEN = Path(__file__).parent / "golden" / "format_1" / "step_00000004"
REFUSED = (64, 65, 70, 71, 74)
IGNORED = (0, *REFUSED)  # what is not read may lie there
MORE = 192  # MB that a case may take beyond what the program itself holds
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


class Case(NamedTuple):
    """make: fills the folder that it is given, which becomes the current one, and returns the command's words."""

    name: str
    make: Callable[[Path], list[str]]
    codes: tuple[int, ...] = REFUSED
    more: float = MORE


class Payload:
    """What runs where it is unpickled: it makes a file `owned`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ../outside/owned",)


SAMPLE = ["sample", "ckpt=run", "n=1", "batch=1", "device=cpu"]
EVALUATE = ["evaluate", "ckpt=run", "metrics=[denoising]", "n=2", "device=cpu"]
TINY = [
    "train", "name=mine", "device=cpu", "dataset.limit=20", "dataset.labels=false", "trainer.batch=4", "trainer.steps=1",
    "trainer.preview=1", "model.width=4", "model.groups=2", "model.multipliers=[1]", "sampler.steps=1",
]  # fmt: skip
SEEN = ["train", "name=mine", "preview=data", "trainer.batch=2"]


# -- checkpoints -------------------------------------------------------------------------------------------------------


def a_run(here: Path, name: str = "run") -> Path:
    """The folder of a checkpoint, in a run of that name."""
    return Path(shutil.copytree(GOLDEN, here / name / "checkpoints" / GOLDEN.name))


def signed(folder: Path) -> None:
    """The manifest of what lies there now: a stranger signs their own work."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def put(node: dict[str, Any], path: str, value: object) -> None:
    *folders, key = path.split(".")
    for folder in folders:
        node = node.setdefault(folder, {})
    node[key] = value


def with_values(values: dict[str, object], file: str = "config") -> Callable[[Path], None]:
    def make(here: Path) -> None:
        folder = a_run(here)
        node = json.loads((folder / f"{file}.json").read_text())
        for path, value in values.items():
            put(node, path, value)
        (folder / f"{file}.json").write_text(json.dumps(node))
        signed(folder)

    return make


def told(make: Callable[[Path], object], words: list[str]) -> Callable[[Path], list[str]]:
    def whole(here: Path) -> list[str]:
        make(here)
        return words

    return whole


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


def _header(header: bytes, rest: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


def _zip(names: list[str], bomb: bool = False) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for name in names:
            made.writestr(name, bytes(300 * 2**20) if bomb else pickle.dumps(Payload()))
    return file.getvalue()


MANY = json.dumps({f"t{k}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(20_000)}).encode()
PICKLES = {
    "pickle": pickle.dumps(Payload()),
    "zip of torch": _zip(["archive/data.pkl", "archive/version"]),
    "zip slip": _zip(["../../outside/owned", "/tmp/owned", "data.pkl"]),
    "deflate bomb": _zip(["archive/data.pkl", "archive/data/0"], bomb=True),
    "old torch": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + pickle.dumps(Payload()),
    "numpy": b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    + pickle.dumps([Payload()]),
    "gzip": b"\x1f\x8b" + zlib.compress(bytes(2**26)),
}  # fmt: skip
HEADERS = {
    "header 2^63": (2**63).to_bytes(8, "little"),
    "header 99 MB": (99_000_000).to_bytes(8, "little") + b"{}",
    "header of words": _header(b'{"__metadata__": {"_target_": "os.system"}, "w": {"dtype": "F32"}}'),
    "overlapping": _header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    ),
    "20,000 tensors": _header(MANY),
    "tensors of 10^12": _header(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}', bytes(4)),
    "another dtype": _header(b'{"a":{"dtype":"OBJ","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "names that lead away": _header(b'{"../../outside/owned":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "deep": _header(b'{"a":' * 50_000),
    "empty": b"",
}


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
    "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
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


# -- pictures and data sets --------------------------------------------------------------------------------------------


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *more: bytes, depth: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min((width + 1) * height, 2**20)))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + b"".join(more) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _encoded(kind: str, width: int, height: int, frames: int = 1) -> bytes:
    from PIL import Image

    file, image = io.BytesIO(), Image.new("L", (width, height))
    image.save(file, kind, **({"save_all": True, "append_images": [image] * (frames - 1)} if frames > 1 else {}))
    return file.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(../outside/owned) (w) file closefile\nshowpage\n"
PICTURES: dict[str, Callable[[], bytes]] = {
    "png of 20000 x 20000": lambda: _encoded("PNG", 20_000, 20_000),
    "png that says 2^31": lambda: _png(2**31 - 1, 2**31 - 1),
    "png text bomb": lambda: _png(8, 8, *[_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**24)))] * 20),
    "png profile bomb": lambda: _png(8, 8, _chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**28)))),
    "png chunk of 2^31": lambda: _png(8, 8)[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt",
    "webp of 16383 x 16383": lambda: _encoded("WEBP", 8, 8)[:24] + b"\xfe\x3f\xfe\x3f" + bytes(64),
    "webp of 16000 x 16000": lambda: _encoded("WEBP", 16_000, 16_000),
    "gif of 65535 x 65535": lambda: b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x08\x01\0\0;",
    "gif of 10^4 frames": lambda: _encoded("GIF", 64, 64) * 10_000,
    "bmp of 2^31": lambda: b"BM" + struct.pack("<IHHIIiiHH", 60, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24) + bytes(30),
    "jpeg of 65535 x 65535": lambda: _encoded("JPEG", 8, 8).replace(b"\0\x08\0\x08\x01", b"\xff\xff\xff\xff\x01"),
    "eps": lambda: EPS,
    "pdf": lambda: b"%PDF-1.7\n1 0 obj<</OpenAction<</S/JavaScript/JS(app.alert(1))>>>>endobj",
    "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "tiff": lambda: b"II*\0\x08\0\0\0\x01\0\0\x01\x04\0\x01\0\0\0\xff\xff\xff\x7f",
    "fli": lambda: b"\x80\0\0\0\x11\xaf" + b"\xff" * 122,
    "psd": lambda: b"8BPS\0\x01" + b"\xff" * 64,
    "icns": lambda: b"icns\xff\xff\xff\xff" + b"ic10\0\0\0\0" * 8,
    "pickle": lambda: pickle.dumps(Payload()),
    "zip": lambda: PICKLES["zip slip"],
    "numpy": lambda: PICKLES["numpy"],
    "html": lambda: EVIL.encode(),
    "empty": lambda: b"",
}  # fmt: skip


def pictures() -> Iterator[Case]:
    for name, data in PICTURES.items():
        given = lambda here, data=data: (a_run(here), (here / "given.png").write_bytes(data()))  # noqa: E731
        codes = IGNORED if name in ("png text bomb", "png profile bomb", "gif of 10^4 frames") else REFUSED
        yield Case(f"init={name}", told(given, [*SAMPLE, "init=given.png", "sampler.steps=2"]), codes)
        yield Case(f"in a folder: {name}", told(lambda here, d=data: _folder(here, d()), [*SEEN, "dataset=folder",
            "dataset.path=pictures", "dataset.size=8", "dataset.channels=1", "dataset.max_bad=0"]), IGNORED)  # fmt: skip
        yield Case(f"in a report: {name}", told(lambda here, d=data: _reported(here, d()), ["report", "runs=[mine]"]), (0,))


def _folder(here: Path, data: bytes, metadata: bytes | None = None, kind: str = "jsonl") -> None:
    (here / "pictures").mkdir()
    for k in range(4):
        (here / "pictures" / f"{k}.png").write_bytes(_encoded("PNG", 8, 8))
    if data:
        (here / "pictures" / "bad.png").write_bytes(data)
    if metadata is not None:
        (here / "pictures" / f"metadata.{kind}").write_bytes(metadata)


def datasets() -> Iterator[Case]:
    words = [*SEEN, "dataset=folder", "dataset.path=pictures", "dataset.size=8", "dataset.channels=1"]
    for name, text in {
        "up": '{"file_name": "../../outside/secret.png"}',
        "absolute": '{"file_name": "/etc/passwd"}',
        "a node": '{"file_name": {"_target_": "os.system"}}',
        "a list": '["0.png"]',
        "deep": '{"file_name": "0.png", "x": ' + "[" * 100_000,
        "NUL": '{"file_name": "0.png\\u0000.txt"}',
        "yaml": "!!python/object/apply:os.system [touch owned]",
        "long": json.dumps({"file_name": "x" * 10**6}),
    }.items():
        yield Case(f"metadata.jsonl {name}", told(lambda here, t=text: _folder(here, b"", t.encode()), words))
    for name, text in {
        "up": "file_name\n../../outside/secret.png\n",
        "formula": "file_name\n=cmd|'/c calc'!A1\n",
        "NUL": "file_name\n\0\n",
        "field of 1 MB": "file_name\n" + "x" * 10**6,
        "other columns": "_target_\nos.system\n",
    }.items():
        yield Case(f"metadata.csv {name}", told(lambda here, t=text: _folder(here, b"", t.encode(), "csv"), words))
    table = [*SEEN, "dataset=parquet", "dataset.path=set.parquet", "dataset.size=8", "dataset.channels=1"]
    for name, made in {
        "pickle": lambda here: (here / "set.parquet").write_bytes(pickle.dumps(Payload())),
        "cut": lambda here: (here / "set.parquet").write_bytes(b"PAR1" + b"\xff" * 64 + b"PAR1"),
        "paths": lambda here: _parquet(
            here, [{"bytes": None, "path": "/dev/zero"}, {"bytes": None, "path": "../outside/secret.png"}]
        ),
        "bombs": lambda here: _parquet(here, [{"bytes": PICTURES["png that says 2^31"](), "path": None}] * 3),
        "a script": lambda here: (
            (here / "set.parquet").mkdir(),
            (here / "set.parquet/set.parquet.py").write_text("open('../outside/owned','w')"),
        ),
    }.items():
        yield Case(f"parquet {name}", told(made, table))
    yield Case("parquet of 1 GB in 1 MB", told(_swollen, table), IGNORED, 1200)  # docs/security.md says so
    yield Case(
        "prompts of no text",
        told(lambda here: (a_run(here), (here / "p").write_bytes(PICKLES["pickle"])), [*SAMPLE, "prompts=p"]),
    )
    yield Case("prompts away", told(a_run, [*SAMPLE, "prompts=../outside"]))


def _parquet(here: Path, cells: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    about = {"info": {"features": {"image": {"_type": "Image"}}}}
    schema = pyarrow.schema([("image", kind)], metadata={"huggingface": json.dumps(about)})
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}, schema=schema), here / "set.parquet")


def _swollen(here: Path) -> None:
    """One picture of 4 MB, 256 times: a dictionary holds it once."""
    _parquet(here, [{"bytes": _encoded("PNG", 8, 8) + bytes(4 * 2**20), "path": None}] * 256)


# -- the folder of a run -----------------------------------------------------------------------------------------------

LAUGH = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def _reported(here: Path, picture: bytes | None = None, **written: bytes) -> Path:
    """A run as diffusion-report reads it."""
    run = here / "mine"
    (run / "samples").mkdir(parents=True)
    (run / "status.json").write_text('{"state": "finished", "step": 1, "pid": 1}')
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    if picture is not None:
        (run / "samples" / "samples_00000001.png").write_bytes(picture)
        (run / "growth.gif").write_bytes(picture)
    for name, data in written.items():
        (run / name.replace("__", ".")).write_bytes(data)
    return run


def reports() -> Iterator[Case]:
    words = ["report", "runs=[mine]"]
    whole = {
        "laughs": {"config__yaml": LAUGH.encode()},
        "python": {"config__yaml": b"a: !!python/object/apply:os.system ['touch ../outside/owned']"},
        "module": {"config__yaml": b"a: !!python/module:antigravity"},
        "deep yaml": {"config__yaml": b"[" * 50_000},
        "large yaml": {"config__yaml": b"a: " + b"x" * 6_000_000},
        "merge": {"config__yaml": b"a: &a {b: 1}\n<<: *a\n"},
        "recursive": {"config__yaml": b"a: &a [*a]\n"},
        "interpolation": {"config__yaml": b"a: ${oc.env:HOME}\n"},
        "markup": {
            "status__json": json.dumps(
                {"state": EVIL, "step": EVIL, "reason": EVIL, "pid": EVIL, "figures": {EVIL: EVIL}}
            ).encode()
        },
        "status a list": {"status__json": b"[1]"},
        "status of nodes": {
            "status__json": b'{"state": {"a": 1}, "step": [1], "pid": -1, "total": {}, "figures": 3, "time": 7}'
        },
        "deep status": {"status__json": b"[" * 100_000},
        "digits": {"status__json": b'{"step": ' + b"9" * 10_000 + b"}"},
        "figures": {"metrics__jsonl": json.dumps({"step": 1, EVIL: 1, "b": "x", "c": {"d": 1}}).encode() + b"\n[1]\nx\n"},
        "endless figures": {"metrics__jsonl": b'{"step": 1, "a": 1e999, "b": NaN, "c": -Infinity}\n' * 1000},
        "5,000 names": {"metrics__jsonl": json.dumps({"step": 1, **{f"t{k}": 1 for k in range(5_000)}}).encode() + b"\n"},
        "one long line": {"metrics__jsonl": b"[" * 10_000_000},
        "steps": {"metrics__jsonl": b'{"step": -1}\n{"step": true}\n{"step": 1e300}\n{"step": "x", "a": 1}\n'},
        "sweep": {"sweep__json": json.dumps({"swept": [EVIL, {}, 3], "metric": EVIL, "direction": EVIL, "runs": 3}).encode()},
    }
    for name, written in whole.items():
        yield Case(f"report {name}", told(lambda here, w=written: _reported(here, **w), words), (0,))
    for link in ("config.yaml", "status.json", "metrics.jsonl", "samples/samples_00000001.png", "growth.gif", "report.html"):
        yield Case(f"report with {link} a link", lambda here, link=link: _linked(here, link), IGNORED)


def _linked(here: Path, link: str) -> list[str]:
    run = _reported(here)
    target = {".png": "secret.png", ".gif": "secret.png"}.get(Path(link).suffix, "secret.json")
    (run / link).unlink(missing_ok=True)
    (run / link).symlink_to(here.parent / "outside" / target)
    return ["report", "runs=[mine]"]


INSIDE = ("checkpoints", "samples", "tensorboard", "generated", "parts", "evaluated", "exported")
INSIDE_FILES = ("metrics.jsonl", "status.json", "config.yaml", "loss.png", ".lock", ".status.json.tmp", ".metrics.jsonl.tmp")


def runs() -> Iterator[Case]:
    train = [*TINY[:1], "name=mine", "outputs=.", *TINY[2:]]
    for name in INSIDE:
        words = {"generated": SAMPLE, "evaluated": EVALUATE, "exported": ["export", "ckpt=run"]}.get(name, train)
        yield Case(f"{name} a link out of the run", lambda here, n=name, w=words: _led_out(here, n, w), IGNORED)
    for name in INSIDE_FILES:
        yield Case(f"{name} a link out of the run", lambda here, n=name: _led_out(here, n, train, "secret.json"), IGNORED)
    for name, text in {
        "nothing of ours": '{"a": 1}\n{"step": "x"}\n[1]\n{"step": 1, "b": "c"}\n',
        "deep": "[" * 100_000,
        "NaN": '{"step": NaN, "train/loss": NaN}\n{"step": 1, "train/loss": "x"}\n',
    }.items():
        yield Case(f"metrics.jsonl {name}", told(lambda here, t=text: _begun(here, "metrics.jsonl", t), train), IGNORED)
    for name, text in {
        "of others": '{"state": "finished", "step": "x", "figures": 3}',
        "deep": "[" * 100_000,
        "pid": '{"state": "running", "pid": -1, "step": -5}',
    }.items():
        yield Case(f"status.json {name}", told(lambda here, t=text: _begun(here, "status.json", t), train), IGNORED)


def _begun(here: Path, name: str, text: str) -> None:
    (here / "mine").mkdir()
    (here / "mine" / name).write_text(text)


def _led_out(here: Path, name: str, words: list[str], target: str = "") -> list[str]:
    run = here / ("mine" if words[0] == "train" else "run")
    if words[0] != "train":
        a_run(here)
    run.mkdir(exist_ok=True)
    (run / name).symlink_to(here.parent / "outside" / target)
    return words


# -- configs and names -------------------------------------------------------------------------------------------------


def configs() -> Iterator[Case]:
    for name, text in {
        "laughs": f"# x\n{LAUGH}",
        "laughs in a value": f"# x\ntrust: &t [x]\n{LAUGH}",
        "python": "trust: !!python/object/apply:os.system ['touch ../outside/owned']\n",
        "deep": "trust: " + "[" * 20_000,
        "recursive": "trust: &a [*a]\n",
        "a target": "model:\n  _target_: os.system\n  command: touch ../outside/owned\n",
        "defaults that lead away": "defaults: [../../../outside/secret]\n",
        "defaults of itself": "defaults: [hostile]\n",
        "no YAML": EVIL,
        "NUL": "trust: \0",
    }.items():
        yield Case(
            f"--config-dir {name}",
            told(lambda here, t=text: _config(here, t), [*TINY, "main", "--config-dir", "dir", "experiment=hostile"]),
        )
    for word in (
        "name=../../outside/owned", "name=/tmp/owned", "name=..", "name=a/../../outside/owned", "name=.ssh/x", "name=a\nb",
        "name=${oc.env:HOME}", "name=~root/x", "experiment=../../../outside/secret", "model=../../x", "model._target_=os.system",
        "hydra.callbacks={a:{_target_:os.system,command:'touch ../outside/owned'}}",
        "hydra.job_logging={root:{handlers:[a]},handlers:{a:{class:logging.FileHandler,filename:../outside/owned}},version:1}",
        "hydra.launcher._target_=os.system", "hydra.sweeper._target_=os.system", "hydra.searchpath=[pkg://os]",
    ):  # fmt: skip
        yield Case(
            word[:60],
            told(lambda here: None, [*TINY[:1], "main", *TINY[2:], word]),
            IGNORED if word.startswith("hydra") else REFUSED,
        )


def _config(here: Path, text: str) -> None:
    (here / "dir" / "experiment").mkdir(parents=True)
    (here / "dir" / "experiment" / "hostile.yaml").write_text("# @package _global_\n" + text)


KINDS: dict[str, Callable[[], Iterator[Case]]] = {
    "targets": targets, "values": values, "files": files, "pipelines": pipelines, "pictures": pictures, "datasets": datasets,
    "reports": reports, "runs": runs, "configs": configs,
}  # fmt: skip
HARMLESS = [
    Case("sample", told(a_run, SAMPLE), (0,)),
    Case("evaluate", told(a_run, EVALUATE), (0,)),
    Case("export", told(a_run, ["export", "ckpt=run"]), (0,)),
    Case("train", told(lambda here: None, TINY), (0,)),
    Case("init", told(a_run, [*SAMPLE, "init=given.png"]), REFUSED),
    Case("folder", told(lambda here: _folder(here, b""), [*SEEN, "dataset=folder", "dataset.path=pictures", "dataset.size=8",
        "dataset.channels=1"]), (0,)),
    Case("csv", told(lambda here: _folder(here, b"", b"file_name\n0.png\n", "csv"), [*SEEN, "dataset=folder",
        "dataset.path=pictures", "dataset.size=8", "dataset.channels=1"]), (0,)),
    Case("parquet", told(lambda here: _parquet(here, [{"bytes": _encoded("PNG", 8, 8), "path": None}] * 3), [*SEEN,
        "dataset=parquet", "dataset.path=set.parquet", "dataset.size=8", "dataset.channels=1"]), (0,)),
    Case("report", told(lambda here: _reported(here, _encoded("PNG", 8, 8), config__yaml=b"a: 1\n"), ["report", "runs=[mine]"]), (0,)),
    Case("pipeline", told(_pipeline(DDPM), PIPE)),
]  # fmt: skip


# -- the process that meets them ---------------------------------------------------------------------------------------

PROCESSES = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "marshal.loads", "ctypes.dlopen",
             "socket.connect", "socket.getaddrinfo", "socket.bind", "webbrowser.open")  # fmt: skip
CHANGES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
)


class Told(NamedTuple):
    """What became of a case. heard: what no case may do; modules: what it imported; more: MB beyond the program's own."""

    name: str
    code: Any
    said: str
    heard: list[str]
    modules: list[str]
    more: float
    seconds: float


def _ears(here: Path, heard: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    caches = [os.path.realpath(os.environ[name]) for name in ("HF_HOME", "XDG_CACHE_HOME") if name in os.environ]
    inside = (os.path.realpath(here), *caches, "/dev/")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in PROCESSES:
            heard.append(f"{event} {str(arguments)[:120]}")
        elif event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                whole = os.path.realpath(path) if isinstance(path, str | os.PathLike) else ""
                if whole and (event in CHANGES or arguments[2] & os.O_NOFOLLOW):  # of the link itself
                    whole = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
                if whole and not whole.startswith(inside):
                    heard.append(f"{event} {whole}")

    return hook


@cache
def composed(command: str, words: tuple[str, ...]) -> dict[str, Any]:
    """The plain config of a command line that many cases share: composing takes longer than most cases."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from diffusion_cli import config

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        return config.plain(hydra.compose(command, list(words)))


def asked(words: list[str]) -> None:
    """What the command does with its words. Raises UserError or SystemExit."""
    from diffusion_cli import config
    from diffusion_cli.commands import sample, train
    from diffusion_cli.evaluation.run import evaluate
    from diffusion_cli.exporting import export
    from diffusion_cli.report.making import make
    from diffusion_cli.sampling import sample as draw
    from diffusion_cli.training import train as fit

    if "main" in words:
        sys.argv = [f"diffusion-{words[0]}", *(word for word in words[1:] if word != "main")]
        {"sample": sample, "train": train}[words[0]].main()
        return
    node = copy.deepcopy(composed(words[0], tuple(words[1:])))
    {
        "train": lambda: fit(config.planned(node, words[1:])),
        "sample": lambda: draw(config.check_sample(node)),
        "evaluate": lambda: evaluate(config.check_evaluate(node)),
        "export": lambda: export(config.check_export(node)),
        "report": lambda: make(config.check_report(node)),
    }[words[0]]()


def met(case: Case, words: list[str], here: Path) -> Told:
    """One case whose files are there, in this process, in the current folder."""
    from diffusion_cli import cli
    from diffusion_cli.errors import UserError, advising_on_memory

    heard, before, began = list[str](), set(sys.modules), time.monotonic()
    sys.addaudithook(_ears(here, heard))
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            with advising_on_memory("a smaller batch", "fewer pictures"):  # as cli.run has it
                asked(words)
        except UserError as error:
            code = cli.tell("diffusion", error)
        except SystemExit as error:
            code = error.code  # type: ignore[assignment]
        except BaseException:
            said.write(traceback.format_exc()[-1500:])
            code = -1
    listened = list(heard)
    new = [name for name in set(sys.modules) - before if name.partition(".")[0] not in ("diffusion_cli", "encodings")]
    return Told(case.name, code, said.getvalue()[-2500:], listened, new, 0, time.monotonic() - began)


def forked(case: Case, root: Path) -> Told:
    here = root / "here"
    shutil.rmtree(root, ignore_errors=True)
    here.mkdir(parents=True)
    shutil.copytree(root.parent / "outside", root / "outside")
    words = case.make(here)
    if "main" not in words:
        with contextlib.suppress(Exception):  # here once, and not in each fork
            composed(words[0], tuple(words[1:]))
    base = held()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.chdir(here)
        most = held(0) * 2**20 + 2**30
        resource.setrlimit(resource.RLIMIT_AS, (int(most), int(most)))  # the machine is not to suffer from a defect
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
        found = met(case, words, here)
        with os.fdopen(write, "w") as file:
            file.write(json.dumps(found))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    _, status, used = os.wait4(child, 0)
    more = used.ru_maxrss / 1024 - base
    if not text:
        return Told(case.name, f"ended by {os.waitstatus_to_exitcode(status)}", "", [], [], more, 0)
    found = Told(*json.loads(text))._replace(more=round(more, 1), seconds=round(json.loads(text)[-1], 2))
    changed = contents(root / "outside") != contents(root.parent / "outside")
    return found._replace(heard=[*found.heard, *["something outside was written"] * changed])


def held(which: int = 1) -> float:
    """MB of this process: 0 reserved, 1 in memory."""
    return int(Path("/proc/self/statm").read_text().split()[which]) * resource.getpagesize() / 2**20


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main(root: Path, kinds: list[str]) -> None:
    out = os.fdopen(os.dup(1), "w")
    (root / "outside").mkdir(parents=True)
    (root / "outside" / "secret.json").write_text('{"secret": "SECRET"}')
    (root / "outside" / "secret.yaml").write_text("# secret\nseed: 7\n")
    (root / "outside" / "secret.png").write_bytes(_encoded("PNG", 8, 8))
    for k, case in enumerate(HARMLESS):
        here = root / f"warm{k}"
        here.mkdir()
        os.chdir(here)
        found = met(case, case.make(here), here)
        out.write(json.dumps(found._replace(modules=[], heard=[])) + "\n")
    sys.stdout.flush()
    for kind in kinds:
        for case in KINDS[kind]():
            out.write(json.dumps(forked(case, root / "case")) + "\n")
            out.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
