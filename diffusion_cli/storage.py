"""Every write of a run passes here: bytes to temporary files, fsync, rename; an error names the path and the space left.

Each operation is announced to `watch` first, which does nothing: it is where tests kill the process or fill the disk.
"""

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from diffusion_cli.errors import StorageError

watch: Callable[[str, Path], None] = lambda operation, path: None  # noqa: E731 (replaced by tests)


@contextmanager
def named(operation: str, path: Path, size: int = 0) -> Iterator[None]:
    """What the block does to the path, in bytes; an OSError of it becomes a StorageError that says so."""
    try:
        watch(operation, path)
        yield
    except OSError as error:
        room = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
            room = f" ({size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free)"
        raise StorageError(f"cannot {operation} {path}: {error.strerror or error}{room}") from error


def no_link(path: str, flags: int) -> int:
    """For open(): a link in the place of a file is refused; in a folder of somebody else's it could lead anywhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def make_folder(path: Path) -> None:
    """With those around it, each on the disk before anything is in it."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    _make_folder(path)
    for folder in reversed(missing):
        _sync_folder(folder.parent)


def _make_folder(path: Path) -> None:
    with named("make the folder", path):
        path.mkdir(parents=True, exist_ok=True)


def write(path: Path, data: bytes) -> None:
    """The whole file or nothing: an existing file stays as it was until the new one is on the disk."""
    write_all({path: data})


def write_all(files: Mapping[Path, bytes]) -> None:
    """Each as `write` does, in twice the speed where they are many: a folder is synced once, after its last file."""
    temporaries = {path: path.with_name(f".{path.name}.tmp") for path in files}
    try:
        for path, temporary in temporaries.items():
            _write_synced(temporary, files[path])
        for path, temporary in temporaries.items():
            _rename(temporary, path)
    except StorageError:
        for temporary in temporaries.values():
            with suppress(OSError):  # it takes room that may be wanted to say so
                temporary.unlink()
        raise
    for folder in dict.fromkeys(path.parent for path in files):
        _sync_folder(folder)


def append(path: Path, line: str) -> None:
    with named("write", path, len(line)), open(path, "a", encoding="utf-8", opener=no_link) as file:
        file.write(line)


def log(path: Path) -> BinaryIO:
    """A file that another process will write at the end of."""
    with named("write", path):
        return path.open("ab")


@contextmanager
def mapped(path: Path, shape: tuple[int, ...], dtype: str) -> Iterator[Any]:
    """An array file that the block fills row by row; it gets its name, synced, when the block ends without an error."""
    import numpy as np

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with named("write", path, size):
        rows = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and not a dead process at a write to memory
            with temporary.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
    try:
        yield rows
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with named("write", path, size), temporary.open("rb+") as file:
        rows.flush()
        watch("sync", temporary)
        os.fsync(file.fileno())
    rename(temporary, path)


def rename(source: Path, target: Path) -> None:
    _rename(source, target)
    _sync_folder(target.parent)


def _rename(source: Path, target: Path) -> None:
    with named("rename to", target):
        os.replace(source, target)


def remove_file(path: Path) -> None:
    with named("remove", path):
        path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """A folder and what is in it: out of sight first, so that a half-removed one is never taken for a whole one."""
    hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.del")
    if hidden != path:
        if hidden.exists():
            remove(hidden)
        rename(path, hidden)
    with named("remove", hidden):
        shutil.rmtree(hidden)


def commit(folder: Path, files: Mapping[str, bytes]) -> None:
    """A folder with these files, in their order, all of them or none: written under another name, synced, then renamed.

    A name may have folders in it: "unet/config.json".
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    if temporary.exists():
        remove(temporary)
    try:
        _fill(temporary, files)
        _rename(temporary, folder)
    except StorageError:
        shutil.rmtree(temporary, ignore_errors=True)  # it takes room that may be wanted to say so
        raise
    _sync_folder(folder.parent)


def _fill(folder: Path, files: Mapping[str, bytes]) -> None:
    """A new folder with these files, all of it synced."""
    _make_folder(folder)
    folders, left = [folder], sum(map(len, files.values()))
    for name, data in files.items():
        path = folder / name
        for inside in reversed([parent for parent in path.parents if folder in parent.parents]):
            if inside not in folders:
                _make_folder(inside)
                folders.append(inside)
        _write_synced(path, data, left)
        left -= len(data)
    for inside in reversed(folders):
        _sync_folder(inside)


def _write_synced(path: Path, data: bytes, needed: int | None = None) -> None:
    with named("write", path, len(data) if needed is None else needed), open(path, "wb", opener=no_link) as file:
        file.write(data)
        file.flush()
        watch("sync", path)
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "nt":
        return  # a folder cannot be opened there
    with named("sync", path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
