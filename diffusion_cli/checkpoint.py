"""A checkpoint is a folder: tensors as safetensors, everything else as JSON, and a manifest with a SHA-256 for each file.

    step_00001000/  weights.safetensors  average.safetensors  optimizer.safetensors  trainer.safetensors
                    config.json  state.json  manifest.json

It appears whole or not at all (storage.commit), is verified before any of it is used, and holds no code: no pickle anywhere.
The manifest proves that the files are what was written, not who wrote them.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from diffusion_cli import __version__, storage
from diffusion_cli.errors import StorageError

FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")
_MANIFEST = "manifest.json"
_BEST = "best.json"
_LARGEST_JSON = 16 * 2**20  # bytes


class Damaged(Exception):
    """Not what was written: the message says which file and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified folder. config: the resolved config and the facts of the data; state: the trainer's counters."""

    folder: Path
    step: int
    digest: str  # SHA-256 of the manifest: names this very checkpoint
    config: dict[str, Any]
    state: dict[str, Any]

    @property
    def run(self) -> Path:
        """The run that it belongs to, or the checkpoint itself where it lies alone."""
        return self.folder.parent.parent if self.folder.parent.name in ("checkpoints", "averages") else self.folder

    @property
    def mark(self) -> str:
        """A word for names of files: which state of the run this is."""
        return f"step_{self.step:08d}"

    @property
    def said(self) -> str:
        """What finds it again."""
        return str(self.folder)

    def groups(self) -> list[str]:
        """Which of weights, average, optimizer and trainer there are: an exported checkpoint has one of the first two."""
        return [Path(name).stem for name in _manifest(self.folder)["files"] if name.endswith(".safetensors")]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """weights, average, optimizer or trainer. Raises Damaged."""
        data = _verified(self.folder, f"{name}.safetensors", _manifest(self.folder)["files"])
        try:
            return safetensors.torch.load(data)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise Damaged(f"{self.folder / name}.safetensors: {error}") from None


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], state: Mapping[str, Any]
) -> Path:
    """Writes checkpoint number `step` into the folder of checkpoints and returns its path. Raises StorageError."""
    files = packed(step, tensors, config, state)
    path = folder / f"step_{step:08d}"
    storage.make_folder(folder)
    if path.exists():  # of an earlier attempt at this very step, and damaged: a good one would have been continued from
        storage.remove(path)
    storage.commit(path, files)
    return path


def packed(
    step: int, tensors: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, bytes]:
    """The files of a checkpoint by name, the manifest last: what is cut short lacks it."""
    files = {f"{name}.safetensors": safetensors.torch.save(_apart(group)) for name, group in tensors.items()}
    files |= {"config.json": _json(config), "state.json": _json(state)}
    listed = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    files[_MANIFEST] = _json({"format": FORMAT, "program": f"diffusion_cli {__version__}", "step": step, "files": listed})
    return files


def _apart(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, and none sharing its memory with another, which safetensors refuses."""
    found, places = dict[str, Tensor](), set[int]()
    for key, value in group.items():
        plain = value.detach().cpu().contiguous()
        found[key] = plain.clone() if plain.untyped_storage().data_ptr() in places else plain
        places.add(plain.untyped_storage().data_ptr())
    return found


def load(folder: Path) -> Checkpoint:
    """The checkpoint in that folder, all its files verified. Raises Damaged, or StorageError for a newer format."""
    manifest = _manifest(folder)
    for name in manifest["files"]:
        if not name.endswith(".json"):
            _verified(folder, name, manifest["files"])
    config, state = (
        _parsed(_verified(folder, f"{name}.json", manifest["files"]), folder / name) for name in ("config", "state")
    )
    if not all(isinstance(config.get(part), dict) for part in ("config", "facts")):
        raise Damaged(f"{folder / 'config.json'}: without the config and the facts of a run")
    digest = hashlib.sha256(_read(folder / _MANIFEST)).hexdigest()
    return Checkpoint(folder, manifest["step"], digest, config, state)


def folders(parent: Path) -> list[Path]:
    """Folders that are named as checkpoints, newest first."""
    if not parent.is_dir():
        return []
    found = [(int(m[1]), path) for path in parent.iterdir() if (m := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def good(parent: Path) -> Iterator[Checkpoint | Damaged]:
    """Checkpoints newest first, each verified when asked for; a damaged one comes as the error."""
    for path in folders(parent):
        try:
            yield load(path)
        except Damaged as error:
            yield error


def sweep(parent: Path) -> None:
    """Removes what an interrupted save or removal left."""
    for path in parent.glob(".step_*"):
        storage.remove(path)


def tidy(parent: Path, keep: int, best: int | None = None) -> None:
    """Removes what an interrupted save left, and all but the newest `keep` checkpoints and that of step `best`, once the newest
    is known to be good."""
    sweep(parent)
    names = folders(parent)
    old = [path for path in names[keep:] if best is None or path.name != f"step_{best:08d}"]
    if keep and old:
        try:
            load(names[0])
        except Damaged as error:
            raise StorageError(f"what was just saved cannot be read back, so no older checkpoint is removed: {error}") from None
        for path in old:
            storage.remove(path)


def point(parent: Path, best: Mapping[str, Any] | None) -> None:
    """best.json of the folder of checkpoints: which step was the best, and in what; None removes it."""
    if best is None:
        storage.remove_file(parent / _BEST)
    else:
        storage.write(parent / _BEST, _json(best))


def pointed(parent: Path) -> Path:
    """The folder of the best checkpoint. Raises Damaged where none is named."""
    step = _parsed(_read(parent / _BEST), parent / _BEST).get("step")
    if not _is_step(step):
        raise Damaged(f"{parent / _BEST}: it names no step")
    return parent / f"step_{step:08d}"


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode()


def _read(path: Path) -> bytes:
    try:
        if path.is_symlink() or not path.is_file():
            raise Damaged(f"{path}: missing, or not a plain file")
        return path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror}") from None


def _parsed(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Damaged(f"{path}: not a JSON object")
    return value


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if path.is_file() and path.stat().st_size > _LARGEST_JSON:
        raise Damaged(f"{path}: larger than a manifest can be")
    manifest = _parsed(_read(path), path)
    if isinstance(manifest.get("format"), int) and manifest["format"] > FORMAT:
        program = str(manifest.get("program"))
        version = re.fullmatch(r"diffusion_cli (\d[\w.]*)", program)
        remedy = f"pip install 'diffusion-cli>={version[1]}'" if version else "install a newer version"
        raise StorageError(
            f"{folder} was written by {program} in format {manifest['format']}, and this is diffusion_cli {__version__}, which "
            f"reads up to {FORMAT}: {remedy}"
        )
    files = manifest.get("files")
    whole = isinstance(files, dict) and all(isinstance(f, dict) and {"bytes", "sha256"} <= f.keys() for f in files.values())
    named = whole and all(re.fullmatch(r"[a-z]+\.(safetensors|json)", name) for name in files)
    if not named or manifest.get("format") != FORMAT or not _is_step(manifest.get("step")):
        raise Damaged(f"{path}: not a manifest")
    if folder.name != f"step_{manifest['step']:08d}" and _NAME.fullmatch(folder.name):
        raise Damaged(f"{folder}: its manifest is of step {manifest['step']}")
    return manifest


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value < 10**15


def _verified(folder: Path, name: str, files: Mapping[str, Mapping[str, Any]]) -> bytes:
    path = folder / name
    if name not in files:
        raise Damaged(f"{path}: not in the manifest")
    if path.is_file() and path.stat().st_size != files[name]["bytes"]:
        raise Damaged(f"{path}: {path.stat().st_size} bytes instead of {files[name]['bytes']}")
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != files[name]["sha256"]:
        raise Damaged(f"{path}: its SHA-256 is not the manifest's")
    return data
