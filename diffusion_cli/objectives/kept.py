"""What never changes from epoch to epoch, made once: the latents of pictures, the tokens of captions.

They lie in the user's cache, in a file that is named by all that they depend on (pictures, encoder), so what another encoder
made is never read; mapped into memory, so a set may be larger than that; and on the device where they fit.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_cli import storage
from diffusion_cli.errors import StorageError
from diffusion_cli.runs import cache_home, say

FORMAT = 1
CHUNK = 64  # rows that are made at a time

Rows = Callable[[Tensor], Tensor]  # numbers int64 [B] -> rows [B, ...] float32 on their device


def kept(kind: str, key: tuple[str, ...], shape: tuple[int, ...], make: Rows, device: torch.device) -> Rows:
    """Rows of shape [N, ...], from the cache or made now. key: all that they depend on. Raises StorageError."""
    name = hashlib.sha256(repr((FORMAT, kind, *key, shape)).encode()).hexdigest()[:16]
    path = cache_home() / kind / f"{name}.npy"
    rows = _read(path, shape)
    if rows is None:
        try:
            storage.make_folder(path.parent)
            with _alone(path.parent):
                rows = _read(path, shape)  # of a process that came before
                rows = _made(path, shape, make, device) if rows is None else rows
        except StorageError as error:
            raise StorageError(f"{error}; objective.cache=false keeps no {kind}") from None
    if device.type == "cuda" and rows.nbytes <= torch.cuda.mem_get_info(device)[0] / 4:
        there = torch.from_numpy(np.array(rows)).to(device)
        return lambda ids: there[ids]
    return lambda ids: torch.from_numpy(rows[ids.cpu().numpy()]).to(ids.device)


def _made(path: Path, shape: tuple[int, ...], make: Rows, device: torch.device) -> np.ndarray:
    with storage.mapped(path, shape, "<f4") as fresh:
        for ids in tqdm(torch.arange(shape[0], device=device).split(CHUNK), unit="chunk", disable=None, leave=False):
            fresh[ids.cpu().numpy()] = make(ids).cpu().numpy()
    rows = _read(path, shape)
    assert rows is not None
    say(f"{path.parent.name} of {shape[0]:,} kept: {path} ({rows.nbytes / 1e6:,.0f} MB)")
    return rows


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the others wait for what it makes. The lock goes with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders: then each makes the same rows
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The mapped rows; None where there is no such file, or not of these rows."""
    try:
        rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return rows if rows.shape == shape and rows.dtype == np.float32 else None
