"""What was asked, word for word, and the folder that belongs to it: never over the pictures of another question.

metadata.json is the first file and the last one: `state` is unfinished before any picture is made and finished when all that
was asked for is there. n is not part of the question: more pictures are added to those that are there. Nor are batch, device
and version of torch: they change the last bits of a picture at most, so a change is told and noted (`earlier`), not refused.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffusion_cli import storage
from diffusion_cli.errors import ConfigError, DataError, StorageError
from diffusion_cli.options import option_of
from diffusion_cli.pretrained.trained import Trained, suffix
from diffusion_cli.runs import say
from diffusion_cli.sampling.formats import FORMATS
from diffusion_cli.settings import Request, Sample

_FILE = "metadata.json"
_BITS = ("batch", "device", "torch")  # what the last bits of a picture depend on


def place(request: Request, found: Trained, asked: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder of this question, and what its metadata said before; nothing of a new one. Raises UserError."""
    settings = request.root
    for folder in _candidates(request, found, asked):
        before = stored(folder)
        if before is None and not _occupied(folder):
            return folder, {}
        if before is None and settings.out is not None:
            raise ConfigError(f"out={folder} holds pictures already: choose another folder")
        if before is not None and same(before, asked):
            if before.get("state") == "unfinished" and before.get("n", 0) > settings.n:
                raise ConfigError(
                    f"{folder} was begun for n={before['n']} and is not finished: finish it with that n, or choose another out="
                )
            return folder, before
        if settings.out is not None:
            raise ConfigError(
                f"out={folder} holds the pictures of another question (its {_FILE} says which): choose another folder"
            )
    raise ConfigError("a thousand folders hold the pictures of similar questions: choose one with out=")


def _candidates(request: Request, found: Trained, asked: Mapping[str, Any]) -> Iterator[Path]:
    settings = request.root
    if settings.out is not None:
        yield Path(settings.out)
        return
    sampler = asked["sampler"]
    words = [found.mark, option_of("sampler", sampler), f"{sampler['steps']}"]
    words += _guidance(request.guidance)
    words += [f"seed_{settings.seed}", *([] if settings.label is None else [f"label_{_joined(settings.label)}"])]
    words += [] if asked["prompt"] is None else [_joined(tuple(asked["prompt"]))[:60]]
    words += [] if settings.negative is None else [f"not_{settings.negative[:30]}"]
    words += [*_beginning(settings, asked), *([] if request.edit is None else [option_of("edit", request.edit)])]
    words += suffix(settings.weights)
    name = re.sub(r"[^\w.+-]+", "_", "-".join(words))
    yield found.run / "generated" / name
    yield from (found.run / "generated" / f"{name}-{k}" for k in range(2, 1000))


def _guidance(node: Mapping[str, Any]) -> list[str]:
    option, strength = option_of("guidance", node), [f"{node['scale']:g}"] if "scale" in node else []
    return [] if option == "none" else ["_".join([option, *strength])]


def _joined(label: str | int | tuple[str | int, ...]) -> str:
    return "_".join(map(str, label)) if isinstance(label, tuple) else str(label)


def _beginning(settings: Sample, asked: Mapping[str, Any]) -> list[str]:
    """Of what the walks begin with, and what binds them."""
    if settings.between is not None:
        return [f"between_{'_'.join(Path(str(end)).stem for end in settings.between)}"]
    if settings.init is None:
        return []
    words = [f"from_{Path(settings.init).stem}"]
    words += [] if asked["strength"] is None else [f"{asked['strength']:g}"]
    words += [] if settings.vary is None else [f"vary_{settings.vary:g}"]
    return ["_".join(words)]


def stored(folder: Path) -> dict[str, Any] | None:
    """What metadata.json says; None where there is none. Raises DataError."""
    try:
        found = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{folder / _FILE} cannot be read: choose another out=")
    return found


def same(before: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    plain = json.loads(json.dumps(dict(asked)))  # tuples are lists
    return all(before.get(key) == value for key, value in plain.items())


def begun(folder: Path, asked: Mapping[str, Any], n: int) -> bool:
    """Whether the folder is that of this question and this n by now."""
    before = stored(folder)
    return before is not None and same(before, asked) and before.get("n") == n


def _occupied(folder: Path) -> bool:
    return folder.exists() and (
        not folder.is_dir() or any(any(folder.glob(f"[!.]*{form.suffix}")) for form in FORMATS.values())
    )


def metadata(asked: Mapping[str, Any], facts: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The question with the facts of its answer. Says so where earlier pictures were made in another way."""
    now = {key: facts[key] for key in _BITS}
    then = [*before.get("earlier", []), *([{key: before.get(key) for key in _BITS}] if before else [])]
    earlier = [other for k, other in enumerate(then) if other != now and other not in then[:k]]
    if earlier:
        ways = "; ".join(f"batch={way['batch']}, {way['device']}, torch {way['torch']}" for way in earlier)
        say(f"pictures that are there were made with {ways}: those made now may differ from them in the last bit of a pixel")
    return {**asked, **facts, **({"earlier": earlier} if earlier else {})}


def write(folder: Path, facts: Mapping[str, Any], state: str) -> None:
    """state: unfinished or finished."""
    storage.write(folder / _FILE, (json.dumps({**facts, "state": state}, indent=1) + "\n").encode())


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps another command out of the folder. The lock goes with the process, however it ends, and leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders: then both commands write the same bytes
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StorageError(
                    f"{folder} is being filled by another process: wait for it, or choose another out="
                ) from None
        yield
    finally:
        os.close(descriptor)
