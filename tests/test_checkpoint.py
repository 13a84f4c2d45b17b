"""A checkpoint appears whole or not at all, and nothing that was damaged, in any way, is ever taken for what was written."""

import errno
import hashlib
import itertools
import json
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_storage import KILLED, Fault, contents, count
from tiny import in_child
from torch import Tensor

from diffusion_cli import checkpoint, storage
from diffusion_cli.checkpoint import Checkpoint, Damaged
from diffusion_cli.errors import StorageError

CONFIG = {"config": {"seed": 1}, "facts": {"channels": 1}}
NONE = lambda operation, path: None  # noqa: E731


def tensors(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weights = {
        "net/w": torch.randn(7, 5, generator=generator),
        "net/b": torch.randn(7, generator=generator),
        "n": torch.tensor(step),
    }
    return {
        "weights": weights,
        "average": {k: v + 1 for k, v in weights.items()},
        "optimizer": {},
        "trainer": {"sums": torch.zeros(3)},
    }


def save(parent: Path, step: int) -> Path:
    return checkpoint.save(parent, step, tensors(step), CONFIG, {"step": step, "seconds": 0.1})


def newest(parent: Path) -> Checkpoint | None:
    return next((found for found in checkpoint.good(parent) if isinstance(found, Checkpoint)), None)


def assert_is(found: Checkpoint | None, step: int) -> None:
    """To the bit what was saved at that step."""
    assert found is not None and found.step == step and found.state["step"] == step and found.config == CONFIG
    for name, group in tensors(step).items():
        loaded = found.tensors(name)
        assert loaded.keys() == group.keys() and all(torch.equal(loaded[key], group[key]) for key in group)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert path.name == "step_00000007"
    assert_is(checkpoint.load(path), 7)
    assert checkpoint.load(path).digest == hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
    assert list(contents(tmp_path)) and not [name for name in contents(tmp_path) if "/." in name or name.startswith(".")]


def test_dtypes_and_layouts_survive(tmp_path: Path) -> None:
    group = {
        "half": torch.randn(3).half(), "brain": torch.randn(3).bfloat16(), "double": torch.randn(3).double(),
        "whole": torch.arange(3),
        "byte": torch.arange(3, dtype=torch.uint8), "empty": torch.empty(0, 4), "scalar": torch.tensor(0.1),
        "flag": torch.tensor([True]),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "view": torch.randn(6, 6).t()[1:3],
    }  # fmt: skip
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, {"weights": group}, CONFIG, {})).tensors("weights")
    assert all(torch.equal(loaded[key], group[key]) and loaded[key].dtype == group[key].dtype for key in group)


def test_no_pickle_in_any_file(tmp_path: Path) -> None:
    for name, data in contents(save(tmp_path, 1)).items():
        assert not data.startswith((b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")) and b"torch._utils" not in data, name
        assert name.endswith((".json", ".safetensors"))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, None], ids=["full", "broken", "killed"])
def test_a_fault_at_any_operation_of_a_save_loses_nothing(
    error: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Save and tidying, stopped at each of their operations in turn: the newest good one is the old or the new, whole."""

    def work(parent: Path) -> None:
        save(parent, 20)
        checkpoint.tidy(parent, 2)

    def fresh(name: str) -> Path:
        monkeypatch.setattr(storage, "watch", NONE)
        parent = tmp_path / name
        save(parent, 5)
        save(parent, 10)
        (parent / ".step_00000015.tmp").mkdir()  # left by an earlier attempt
        (parent / ".step_00000015.tmp" / "weights.safetensors").write_bytes(b"half")
        return parent

    parent = fresh("count")
    operations = count(lambda: work(parent), monkeypatch)
    assert operations > 20
    ends = set()
    for k in range(1, operations + 1):
        parent = fresh(f"{k}")
        monkeypatch.setattr(storage, "watch", Fault(k, error))
        if error is None:
            assert in_child(lambda: work(parent)) == KILLED  # noqa: B023
        else:
            with pytest.raises(StorageError):
                work(parent)
        monkeypatch.setattr(storage, "watch", NONE)
        found = list(checkpoint.good(parent))
        assert found and all(isinstance(one, Checkpoint) for one in found), "a half folder was taken for a checkpoint"
        assert_is(found[0], found[0].step)  # type: ignore[union-attr]
        ends.add(found[0].step)  # type: ignore[union-attr]
        work(parent)  # the next attempt at the same step
        assert [path.name for path in checkpoint.folders(parent)] == ["step_00000020", "step_00000010"]
        assert sorted(p.name for p in parent.iterdir()) == ["step_00000010", "step_00000020"], "nothing is left over"
        assert_is(newest(parent), 20)
        shutil.rmtree(parent)
    assert ends == {10, 20}


def corrupt(folder: Path, other: Path, rng: random.Random) -> list[tuple[str, Callable[[Path], None]]]:
    """Every way of damage, for every file."""
    ways: list[tuple[str, Callable[[Path], None]]] = []
    for name in sorted(p.name for p in folder.iterdir()):
        size = (folder / name).stat().st_size

        def edit(path: Path, change: Callable[[bytearray], object], name: str = name) -> None:
            data = bytearray((path / name).read_bytes())
            change(data)
            (path / name).write_bytes(bytes(data))

        def flip(place: int, bit: int) -> Callable[[bytearray], None]:
            return lambda data: data.__setitem__(place, data[place] ^ (1 << bit))

        for place in sorted(rng.sample(range(size), min(size, 25))):
            change = flip(place, rng.randrange(8))
            ways.append((f"flip {name} {place}", lambda p, c=change, e=edit: e(p, c)))
        for keep in {0, 1, size // 2, size - 1}:
            ways.append((f"truncate {name} {keep}", lambda p, k=keep, e=edit: e(p, lambda d: d.__delitem__(slice(k, None)))))
        ways.append((f"extend {name}", lambda p, e=edit: e(p, lambda d: d.extend(b" "))))
        ways.append((f"zero {name}", lambda p, e=edit: e(p, lambda d: d.__setitem__(slice(None), bytes(len(d))))))
        ways.append((f"missing {name}", lambda p, n=name: (p / n).unlink()))
        ways.append((f"swapped with another step's {name}", lambda p, n=name: shutil.copy(other / n, p / n)))
        ways.append((f"folder {name}", lambda p, n=name: ((p / n).unlink(), (p / n).mkdir())))  # type: ignore[arg-type, return-value]

        def link(path: Path, name: str = name) -> None:
            shutil.move(path / name, path.parent.parent / f"outside_{name}")
            (path / name).symlink_to(path.parent.parent / f"outside_{name}")

        ways.append((f"link {name}", link))
    ways.append(("all of another step", lambda p: [shutil.copy(f, p / f.name) for f in other.iterdir()]))  # type: ignore[arg-type, return-value]
    ways.append(
        (
            "files swapped among themselves",
            lambda p: (
                (p / "weights.safetensors").rename(p / "x"),
                (p / "average.safetensors").rename(p / "weights.safetensors"),
                (p / "x").rename(p / "average.safetensors"),
            ),
        )
    )  # type: ignore[arg-type, return-value]
    return ways


def same(a: Checkpoint, b: Checkpoint) -> bool:
    pairs = [(a.tensors(name), b.tensors(name)) for name in ("weights", "average", "optimizer", "trainer")]
    tensors_too = all(x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x) for x, y in pairs)
    return tensors_too and a.step == b.step and a.config == b.config and a.state == b.state


@pytest.mark.parametrize("rounds", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_every_damage_is_detected(rounds: int, tmp_path: Path) -> None:
    """0 silent wrong loads; each is passed over for the newest good one."""
    good = save(tmp_path / "good", 10)
    other = checkpoint.save(tmp_path / "other", 11, tensors(11), {"config": {"seed": 2}, "facts": {}}, {"step": 11})
    older = save(tmp_path / "good", 5)
    original, tried, harmless = checkpoint.load(good), 0, 0
    for way, damage in itertools.chain(*(corrupt(good, other, random.Random(k)) for k in range(rounds))):
        shutil.rmtree(tmp_path / "here", ignore_errors=True)
        for path in tmp_path.glob("outside_*"):
            path.unlink()
        parent = tmp_path / "here" / "checkpoints"
        shutil.copytree(good, parent / good.name)
        shutil.copytree(older, parent / older.name)
        damage(parent / good.name)
        tried += 1
        try:
            loaded = checkpoint.load(parent / good.name)
        except (Damaged, StorageError) as error:
            assert len(str(error).splitlines()) == 1 and "step_00000010" in str(error), way
            if isinstance(error, Damaged):
                assert_is(newest(parent), 5)
            continue
        assert not way.startswith(("link", "missing", "folder", "truncate", "zero")), f"{way}: loaded silently"
        harmless += 1
        assert same(loaded, original), f"{way}: loaded silently"  # a letter of `program`, white space, a file that is the same
    assert tried > 230 * rounds and harmless < tried / 12
    print(f"{tried} damaged checkpoints, {harmless} of them in what says nothing, 0 loaded silently wrong")


def signed(path: Path, data: bytes) -> None:
    """Weights of other bytes, with a manifest that fits: of a stranger, not of an accident."""
    (path / "weights.safetensors").write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewritten(path, lambda m: m["files"].update({"weights.safetensors": entry}))


HUGE = {
    "header of 2^63 bytes": (2**63).to_bytes(8, "little"),
    "header longer than the file": (2**40).to_bytes(8, "little") + b"{}",
    "tensor beyond the file": b'{"w":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}',
    "shape and size disagree": b'{"w":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4]}}xxxx',
    "shape overflows": b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
    "deep": b'{"w":' * 100_000,
}


@pytest.mark.parametrize("data", HUGE.values(), ids=HUGE)
def test_a_header_that_promises_too_much_takes_no_memory(data: bytes, tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    if data[:1] == b"{":
        header, rest = (data[:-4], data[-4:]) if data.endswith(b"x") else (data, b"")
        data = len(header).to_bytes(8, "little") + header + rest
    signed(path, data)
    tracemalloc.start()
    try:
        with pytest.raises(Damaged, match=r"weights\.safetensors: "):
            checkpoint.load(path).tensors("weights")
        assert tracemalloc.get_traced_memory()[1] < 4 * len(data) + 2**20
    finally:
        tracemalloc.stop()


def test_reading_takes_twice_the_file_at_most(tmp_path: Path) -> None:
    """Verifying holds one file at a time, reading its tensors the file and them."""
    weights = {"weights": {f"w{k}": torch.zeros(2**18) for k in range(8)}}  # 8 MB
    path = checkpoint.save(tmp_path, 1, weights, CONFIG, {})
    size = (path / "weights.safetensors").stat().st_size
    tracemalloc.start()
    try:
        found = checkpoint.load(path)
        verified = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        found.tensors("weights")
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size <= verified < 1.1 * size and read < 2.1 * size


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


FOREIGN: dict[str, Callable[[dict[str, Any]], object]] = {
    "no format": lambda m: m.pop("format"),
    "format a word": lambda m: m.update(format="1"),
    "format true": lambda m: m.update(format=0),
    "no files": lambda m: m.pop("files"),
    "files a list": lambda m: m.update(files=["weights.safetensors"]),
    "no step": lambda m: m.pop("step"),
    "step a word": lambda m: m.update(step="10"),
    "another step": lambda m: m.update(step=11),
    "up and away": lambda m: m["files"].update({"../other.json": m["files"]["config.json"]}),
    "absolute": lambda m: m["files"].update({"/etc/passwd": m["files"]["config.json"]}),
    "pickle": lambda m: m["files"].update({"weights.pt": m["files"]["config.json"]}),
    "no config": lambda m: m["files"].pop("config.json"),
    "no hash": lambda m: m["files"]["config.json"].pop("sha256"),
    "hash null": lambda m: m["files"]["config.json"].update(sha256=None),
    "hash of another": lambda m: m["files"]["config.json"].update(sha256=m["files"]["state.json"]["sha256"]),
    "size a word": lambda m: m["files"]["config.json"].update(bytes="many"),
    "entry null": lambda m: m["files"].update({"config.json": None}),
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_manifest_is_no_checkpoint(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    rewritten(path, change)
    with pytest.raises(Damaged):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "3", "[" * 100_000, '{"format": 1e999}', "\x00", "{'format': 1}"], ids=lambda t: t[:8]
)
def test_a_manifest_that_is_none(text: str, tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    (path / "manifest.json").write_text(text)
    with pytest.raises(Damaged):
        checkpoint.load(path)


@given(st.binary(max_size=300))
def test_any_bytes_for_a_manifest(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz" / "step_00000001"
    path.mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").write_bytes(data)
    with pytest.raises((Damaged, StorageError)):
        checkpoint.load(path)


def test_a_newer_format_is_told_from_damage(tmp_path: Path) -> None:
    """Not passed over for an older checkpoint: that would silently lose training."""
    save(tmp_path, 5)
    rewritten(save(tmp_path, 10), lambda m: m.update(format=2, program="diffusion_cli 9.9"))
    with pytest.raises(StorageError, match=r"written by diffusion_cli 9\.9 in format 2.*reads up to 1"):
        list(checkpoint.good(tmp_path))


def test_a_huge_manifest_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 10)
    with (path / "manifest.json").open("r+b") as file:
        file.truncate(2**40)  # a hole: no disk is used
    with pytest.raises(Damaged, match="larger than a manifest can be"):
        checkpoint.load(path)


def test_a_file_larger_than_stated_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    with (path / "weights.safetensors").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(Damaged, match="bytes instead of"):
        checkpoint.load(path)


def test_tensors_are_verified_again_when_they_are_read(tmp_path: Path) -> None:
    found = checkpoint.load(save(tmp_path, 10))
    (tmp_path / "step_00000010" / "weights.safetensors").write_bytes(
        b"x" * (found.folder / "weights.safetensors").stat().st_size
    )
    with pytest.raises(Damaged, match="SHA-256"):
        found.tensors("weights")
    with pytest.raises(Damaged, match="not in the manifest"):
        found.tensors("other")


def test_only_folders_named_as_checkpoints_are_looked_at(tmp_path: Path) -> None:
    save(tmp_path, 100_000_000)
    save(tmp_path, 99_999_999)
    for name in ("step_1", "step_00000001x", ".step_00000012.tmp", ".step_00000013.del", "best", "step_-0000001"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000014").touch()
    assert [path.name for path in checkpoint.folders(tmp_path)] == ["step_100000000", "step_99999999"], (
        "by number, not by letter"
    )
    assert checkpoint.folders(tmp_path / "nothing") == []


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_tidy_keeps_the_newest(keep: int, tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    (tmp_path / "notes.txt").touch()
    checkpoint.tidy(tmp_path, keep)
    assert [int(p.name[5:]) for p in checkpoint.folders(tmp_path)] == [5, 4, 3, 2, 1][:keep]
    assert (tmp_path / "notes.txt").exists(), "only its own are removed"


def test_tidy_removes_nothing_while_the_newest_is_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        path = save(tmp_path, step)
    (path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(StorageError, match="step_00000003"):
        checkpoint.tidy(tmp_path, 1)
    assert len(checkpoint.folders(tmp_path)) == 3
    assert_is(newest(tmp_path), 2)


def test_a_damaged_checkpoint_is_written_anew(tmp_path: Path) -> None:
    (save(tmp_path, 3) / "weights.safetensors").write_bytes(b"")
    assert newest(tmp_path) is None
    save(tmp_path, 3)
    assert_is(newest(tmp_path), 3)


def test_what_json_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        checkpoint.save(tmp_path, 1, tensors(1), CONFIG, {"seconds": float("nan")})
    assert checkpoint.folders(tmp_path) == []
