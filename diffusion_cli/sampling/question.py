"""What was asked, word for word, and the folder that belongs to it: never over the pictures of another question."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_cli.checkpoint import Checkpoint
from diffusion_cli.errors import ConfigError, DataError
from diffusion_cli.settings import Sample


def folder_of(settings: Sample, found: Checkpoint, asked: Mapping[str, Any]) -> Path:
    """Where the pictures go: never over those of another question."""
    if settings.out is not None:
        folder = Path(settings.out)
    else:
        run = found.folder.parent.parent if found.folder.parent.name == "checkpoints" else found.folder
        sampler = asked["sampler"]
        words = [f"step_{found.step:08d}", sampler["_target_"].rpartition(".")[2].lower(), f"{sampler['steps']}"]
        words += [f"seed_{settings.seed}", *([] if settings.label is None else [f"label_{settings.label}"])]
        words += [] if settings.init is None else [f"from_{Path(settings.init).stem}_{settings.strength:g}"]
        words += ["raw"] if settings.weights == "raw" else []
        folder = run / "generated" / "-".join(words)
    try:
        before = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        if folder.is_dir() and any(folder.glob("*.png")) and settings.out is not None:
            raise ConfigError(f"out={folder} holds pictures already: choose another folder") from None
        return folder
    except (OSError, ValueError):
        raise DataError(f"{folder / 'metadata.json'} cannot be read: choose another out=") from None
    if any(before.get(key) != value for key, value in asked.items()):
        if settings.out is not None:
            raise ConfigError(
                f"out={folder} holds the pictures of another question (its metadata.json says which): choose another folder"
            )
        for k in range(2, 1000):
            other = folder.with_name(f"{folder.name}-{k}")
            if not other.exists():
                return other
    return folder
