"""export.json: what was asked and a SHA-256 for each file, so that the same command finds an export there, and never another.

The card may be edited by hand: an edited one is kept, and pushed as it is.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_cli import __version__
from diffusion_cli.checkpoint import Checkpoint
from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.pretrained.trained import suffix
from diffusion_cli.settings import Export

NAME = "export.json"
CARD = "README.md"


@dataclass(frozen=True)
class Record:
    """asked: what the files depend on. told: a digest of what the card says of the run. files: SHA-256 of each."""

    asked: dict[str, Any]
    told: str
    files: dict[str, str]

    def packed(self) -> bytes:
        text = {"program": f"diffusion_cli {__version__}", "asked": self.asked, "told": self.told, "files": self.files}
        return (json.dumps(text, indent=1) + "\n").encode()


def asked_of(settings: Export, found: Checkpoint) -> dict[str, Any]:
    words = {key: getattr(settings, key) for key in ("weights", "label", "steps", "licence")}
    return {"to": settings.written, **words, "step": found.step, "checkpoint": found.digest}


def place(settings: Export, found: Checkpoint) -> Path:
    """The folder that was named, or one of the run that says what was asked. Raises ConfigError."""
    if settings.out is not None:
        path = Path(settings.out).expanduser()
        if path.name in ("", ".."):
            raise ConfigError(f"out={settings.out}: name a folder that is not there yet")
        return path
    words = [f"step_{found.step:08d}", settings.written, *suffix(settings.weights)]
    words += [f"{key}_{value}" for key in ("label", "steps") if (value := getattr(settings, key)) is not None]
    return found.run / "exported" / "-".join(words)


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def standing(folder: Path, asked: Mapping[str, Any]) -> Record | None:
    """The record of this very export in the folder, its files verified; None where nothing is. Raises UserError."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        text = json.loads((folder / NAME).read_bytes())
        record = Record(dict(text["asked"]), str(text["told"]), dict(text["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"out={folder} is there and is no export: choose another folder") from None
    now = json.loads(json.dumps(dict(asked)))
    other = [key for key in now if record.asked.get(key) != now[key]]
    if other:
        words = ", ".join(f"{key} {record.asked.get(key)} and not {now[key]}" for key in other if key != "checkpoint")
        raise ConfigError(f"out={folder} holds another export ({words or 'of another checkpoint'}): choose another folder")
    for name, digest in record.files.items():
        if name != CARD and _digest(folder / name) != digest:
            raise StorageError(
                f"{folder / name} is missing or is not what was exported: remove {folder}, or choose another out="
            )
    return record


def edited(folder: Path, record: Record) -> bool:
    """Whether the card was changed, or removed, by hand."""
    return _digest(folder / CARD) != record.files[CARD]


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
