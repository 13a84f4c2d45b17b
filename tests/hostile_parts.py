"""What hostile cases are made of: a case, a stranger's checkpoint, pickles and headers, and the commands that meet them."""

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable
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


def _encoded(kind: str, width: int, height: int, frames: int = 1) -> bytes:
    from PIL import Image

    file, image = io.BytesIO(), Image.new("L", (width, height))
    image.save(file, kind, **({"save_all": True, "append_images": [image] * (frames - 1)} if frames > 1 else {}))
    return file.getvalue()
