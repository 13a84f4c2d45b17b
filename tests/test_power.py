"""After a power cut at any moment, the newest checkpoint whose save came back is there, whole, and nothing is a mixture."""

import json
import os
import random
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
from disk import Disk
from test_checkpoint import assert_is, newest, save

from diffusion_cli import checkpoint, storage

STEPS = (5, 10, 15, 20, 25)


def watched(root: Path) -> Disk:
    """Five checkpoints with tidying, the best named twice, and status.json, written while the disk is watched."""
    disk = Disk(root)
    run = disk.root / "outputs" / "run"

    def work() -> None:
        for step in STEPS:
            save(run / "checkpoints", step)
            disk.mark(step)
            if step in (10, 20):
                checkpoint.point(run / "checkpoints", {"step": step})
            checkpoint.tidy(run / "checkpoints", 2, best=10 if step < 20 else 20)
            storage.write(run / "status.json", json.dumps({"step": step, "more": "x" * 5000}).encode())

    disk.record(work)
    return disk


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return watched(tmp_path_factory.mktemp("disk"))


def look(disk: Disk, count: int, seed: int, here: Path) -> None:
    for k, (files, saved) in enumerate(disk.states(count, random.Random(seed))):
        shutil.rmtree(here, ignore_errors=True)
        for name, data in files.items():
            path = here / name
            path.mkdir(parents=True, exist_ok=True) if data is None else path.write_bytes(data)
        folder = here / "outputs" / "run" / "checkpoints"
        found = newest(folder)
        if saved or found:
            assert found is not None and found.step >= max(saved, default=0), (k, saved)  # type: ignore[type-var]
            assert_is(found, found.step)
        for name in ("status.json", "checkpoints/best.json"):
            if (folder.parent / name).exists():
                assert json.loads((folder.parent / name).read_text())["step"] in STEPS
        if k % 20 == 0:  # what is left does not stand in the way of what follows
            checkpoint.sweep(folder)
            save(folder, 30)
            checkpoint.tidy(folder, 1)
            assert [p.name for p in checkpoint.folders(folder)] == ["step_00000030"]


def test_some_power_cuts(disk: Disk, tmp_path: Path) -> None:
    look(disk, 250, 0, tmp_path / "here")


@pytest.mark.slow
def test_many_power_cuts(disk: Disk, tmp_path: Path) -> None:
    look(disk, 5000, 1, tmp_path / "here")
    print(f"5,000 states of {len(disk.events)} events")


@pytest.mark.parametrize("lost", ["files", "folders"])
def test_without_a_sync_the_model_loses_something(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    is_lost = stat.S_ISDIR if lost == "folders" else stat.S_ISREG
    some = lambda fd: None if is_lost(os.fstat(fd).st_mode) else os.fsync(fd)  # noqa: E731
    careless = SimpleNamespace(**{**vars(os), "fsync": some, "replace": lambda a, b: os.replace(a, b)})
    monkeypatch.setattr(storage, "os", careless)
    (tmp_path / "disk").mkdir()
    with pytest.raises(AssertionError):
        look(watched(tmp_path / "disk"), 250, 0, tmp_path / "here")
