"""Writing is all or nothing, at every operation: faults are injected through storage.watch, or the process killed there."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import in_child

from diffusion_cli import storage
from diffusion_cli.errors import StorageError

KILLED = 9


class Fault:
    """Raises or kills at operation number `at`, or from there on where it is lasting; counts them all."""

    def __init__(self, at: int, error: int | None = None, lasting: bool = False):
        self.at, self.error, self.lasting, self.seen = at, error, lasting, 0

    def __call__(self, operation: str, path: Path) -> None:
        self.seen += 1
        if self.seen != self.at and not (self.lasting and self.seen > self.at > 0):
            return
        if self.error is None:
            if operation == "sync" and path.is_file():  # what was not synced may be torn
                os.truncate(path, path.stat().st_size // 2)
            os._exit(KILLED)
        raise OSError(self.error, os.strerror(self.error))


def count(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    fault = Fault(0)
    monkeypatch.setattr(storage, "watch", fault)
    work()
    return fault.seen


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, None], ids=["full", "broken", "killed"])
def test_a_file_is_old_or_new(error: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    write = lambda: storage.write(path, b"new" * 1000)  # noqa: E731
    operations = count(write, monkeypatch)
    assert operations >= 4, "write, sync, rename, sync of the folder"
    seen = set()
    for k in range(1, operations + 1):
        path.write_bytes(b"old")
        monkeypatch.setattr(storage, "watch", Fault(k, error))
        if error is None:
            assert in_child(write) == KILLED
        else:
            with pytest.raises(StorageError):
                write()
        seen.add(path.read_bytes())
    assert seen == {b"old", b"new" * 1000}, "before the rename the old one, after it the new one, never a mixture"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, None], ids=["full", "broken", "killed"])
def test_a_folder_is_whole_or_not_there(error: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a": b"1" * 100, "b": b"2" * 5000, "c": b""}
    operations = count(lambda: storage.commit(tmp_path / "clean", files), monkeypatch)
    assert operations >= 2 * len(files) + 3
    for k in range(1, operations + 1):
        parent = tmp_path / f"{k}"
        parent.mkdir()
        commit = lambda: storage.commit(parent / "step", files)  # noqa: B023, E731
        monkeypatch.setattr(storage, "watch", Fault(k, error))
        if error is None:
            assert in_child(commit) == KILLED
        else:
            with pytest.raises(StorageError):
                commit()
        monkeypatch.setattr(storage, "watch", lambda operation, path: None)
        if (parent / "step").exists():
            assert contents(parent / "step") == files
        else:
            storage.commit(parent / "step", files)  # what an attempt left does not stand in the way
            assert contents(parent) == {f"step/{name}": data for name, data in files.items()}


@pytest.mark.parametrize("error", [errno.EIO, None], ids=["broken", "killed"])
def test_a_removed_folder_is_never_half_there(error: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a": b"1", "b": b"2"}
    storage.commit(tmp_path / "clean", files)
    operations = count(lambda: storage.remove(tmp_path / "clean"), monkeypatch)
    for k in range(1, operations + 1):
        monkeypatch.setattr(storage, "watch", lambda operation, path: None)
        folder = tmp_path / f"step_{k}"
        storage.commit(folder, files)
        monkeypatch.setattr(storage, "watch", Fault(k, error))
        remove = lambda: storage.remove(folder)  # noqa: B023, E731
        if error is None:
            assert in_child(remove) == KILLED
        else:
            with pytest.raises(StorageError):
                remove()
        assert not folder.exists() or contents(folder) == files
        monkeypatch.setattr(storage, "watch", lambda operation, path: None)
        storage.commit(tmp_path / f"step_{k}", files) if not folder.exists() else None
        storage.remove(folder)
        assert not folder.exists()


def test_a_removal_that_is_cut_short_happens_out_of_sight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with some of its files gone never has the name of a whole one."""
    storage.commit(tmp_path / "step", {"a": b"1", "b": b"2"})

    def cut_short(path: Path) -> None:
        (path / "a").unlink()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(storage.shutil, "rmtree", cut_short)
        with pytest.raises(StorageError):
            storage.remove(tmp_path / "step")
    assert contents(tmp_path) == {".step.del/b": b"2"}


def test_remove_clears_an_earlier_half_removal(tmp_path: Path) -> None:
    (tmp_path / ".x.del").mkdir()
    (tmp_path / ".x.del" / "left").touch()
    storage.commit(tmp_path / "x", {"a": b"1"})
    storage.remove(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux which file a descriptor is")
def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file, then its folder, then the rename, then the folder around it: a power cut between them loses nothing."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace
    named = lambda path: Path(path).relative_to(tmp_path).as_posix()  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(("sync", named(os.readlink(f"/proc/self/fd/{fd}")))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("rename", named(b))), replace(a, b)))
    storage.commit(tmp_path / "step", {"a": b"1", "b": b"2"})
    assert done == [("sync", ".step.tmp/a"), ("sync", ".step.tmp/b"), ("sync", ".step.tmp"), ("rename", "step"), ("sync", ".")]
    done.clear()
    storage.write(tmp_path / "x", b"1")
    assert done == [("sync", ".x.tmp"), ("rename", "x"), ("sync", ".")]
    done.clear()
    storage.write_all({tmp_path / name: b"1" for name in ("y", "step/c", "z")})
    assert done == [("sync", ".y.tmp"), ("sync", "step/.c.tmp"), ("sync", ".z.tmp"), ("rename", "y"), ("rename", "step/c"),
                    ("rename", "z"), ("sync", "."), ("sync", "step")]  # fmt: skip


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_with_numbers(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "watch", Fault(1, number))
    with pytest.raises(StorageError, match=r"cannot write .*x\.tmp.* \(3\.0 MB needed, [\d.]+ MB free\)") as caught:
        storage.write(tmp_path / "x", b"1" * 3_000_000)
    assert caught.value.code == 74 and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("work", [lambda p: storage.append(p, "x"), lambda p: storage.write(p, b""),
    lambda p: storage.make_folder(p),
                                  lambda p: storage.rename(p, p.with_name("y")), lambda p: storage.remove(p),
                                  lambda p: storage.commit(p, {"a": b""})])  # fmt: skip
def test_real_errors_of_the_system_are_named(work: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot .*file"):
        work(tmp_path / "file" / "inside")


def test_every_operation_of_the_package_passes_here() -> None:
    """No open(.., "w"), write_text, mkdir, rename or save(path) elsewhere: a fault there could not be injected."""
    import re

    writes = re.compile(
        r"\.write_(?:text|bytes)\(|\bopen\([^)]*['\"][wax]|\.mkdir\(|os\.(?:rename|replace|remove)\(|\.unlink\(|rmtree\("
    )
    allowed = {"storage.py", "status.py"}  # status.py: the lock
    package = Path(storage.__file__).parent
    found = {p.name for p in package.rglob("*.py") if writes.search(p.read_text()) and "data" not in p.parts}
    assert found <= allowed, found - allowed
