"""Many pictures: the same files whatever interrupts them, however many processes make them, in bounded memory."""

import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_storage import KILLED, Fault, contents
from tiny import compose, in_child, train

from diffusion_cli import config, storage
from diffusion_cli.data.hub import Hub
from diffusion_cli.distributed import Process, process
from diffusion_cli.errors import ConfigError, Stopped, StorageError
from diffusion_cli.sampling import formats, sample, together
from diffusion_cli.sampling.formats import FORMATS, Npz
from diffusion_cli.sampling.maker import Maker
from diffusion_cli.sampling.writing import Album, batches_for, fill
from diffusion_cli.signals import StopRequest

FORMS = list(FORMATS)
SAMPLE = Path(sys.executable).with_name("diffusion-sample")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled run."""
    learn = ("trainer.steps=20", "trainer.report_every=20", "dataset.labels=true", "optimizer.lr=3e-3")
    return train(tmp_path_factory.mktemp("runs"), *learn)


def command(run: Path, out: Path, *words: str) -> list[str]:
    given = [f"ckpt={run}", f"out={out}", "n=13", "batch=4", "shard=5", "device=cpu", *words]
    return list({word.partition("=")[0]: word for word in given}.values())


def ask(run: Path, out: Path, *words: str) -> Path:
    return sample(config.check_sample(compose(*command(run, out, *words), primary="sample")))


def pngs(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.rglob("0*.png"), key=lambda p: p.name)])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The numbers of the pictures of each batch that is made."""
    batches: list[list[int]] = []
    states = Maker.states

    def noted(self: Maker, ids: torch.Tensor) -> Iterator[object]:
        batches.append(ids.tolist())
        return states(self, ids)

    monkeypatch.setattr(Maker, "states", noted)
    return batches


# -- what lies on the disk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS[1:])
def test_every_form_holds_the_same_pictures(form: str, run: Path, tmp_path: Path) -> None:
    """13 pictures in files of 5, made in batches of 4: no border of one is a border of the other."""
    plain = pngs(ask(run, tmp_path / "png"))
    folder = ask(run, tmp_path / form, f"format={form}")
    names = [f"samples_{first:08d}-{last:08d}.{form}" for first, last in ((0, 4), (5, 9), (10, 12))]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, "grid.png", "metadata.json"])
    made_by = FORMATS[form](5, (), {})
    stored = torch.cat([made_by.decode((folder / name).read_bytes(), 99) for name in names])
    assert stored.dtype == torch.uint8 and np.array_equal(stored[:, 0].numpy(), plain)
    assert np.array_equal(made_by.decode((folder / names[0]).read_bytes(), 2)[:, 0].numpy(), plain[:2])
    assert (folder / "grid.png").stat().st_size > 0
    assert np.array_equal(np.asarray(Image.open(folder / "grid.png")), np.asarray(Image.open(tmp_path / "png/grid.png")))


def test_parquet_is_a_data_set(run: Path, tmp_path: Path) -> None:
    """`datasets` reads it, and so does dataset=parquet: pictures, labels, names of classes, in order."""
    import datasets

    folder = ask(run, tmp_path / "out", "format=parquet")
    plain = pngs(ask(run, tmp_path / "png"))
    files = sorted(map(str, folder.glob("*.parquet")))
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(table.features["image"], datasets.Image) and table["index"] == list(range(13))
    assert table.features["label"].names == [str(k) for k in range(10)] and table["label"] == [i % 10 for i in range(13)]
    assert np.array_equal(np.stack([np.asarray(image) for image in table["image"]]), plain)
    pictures = Hub(path=str(folder), size=8, channels=1, labels=True).load()
    assert pictures is not None and np.array_equal(pictures.images[:, 0].numpy(), plain)
    assert pictures.labels.tolist() == [i % 10 for i in range(13)] and pictures.classes == tuple(str(k) for k in range(10))


def test_shards_hold_labels_and_facts(run: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with np.load(ask(run, tmp_path / "npz", "format=npz") / "samples_00000010-00000012.npz", allow_pickle=False) as stored:
        assert stored["images"].shape == (3, 8, 8, 1) and stored["labels"].tolist() == [0, 1, 2]
    file = ask(run, tmp_path / "st", "format=safetensors", "seed=4") / "samples_00000005-00000009.safetensors"
    with safe_open(file, "pt") as stored:
        facts = json.loads(stored.metadata()["diffusion"])
        assert stored.get_tensor("images").shape == (5, 8, 8, 1) and stored.get_tensor("labels").tolist() == [5, 6, 7, 8, 9]
    assert facts["seed"] == 4 and facts["index"] == 5 and facts["shard"] == 5


def test_many_files_lie_in_folders_of_a_thousand(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png = formats.Png(1, (), {})
    names = {9_999: "009999.png", 10_000: "010/010000.png", 49_999: "049/049999.png", 1_234_567: "1234/1234567.png"}
    assert {i: png.name(i, i + 1) for i in names} == names
    monkeypatch.setattr(formats, "FLAT", 6)
    folder = ask(run, tmp_path / "out")
    assert len(list(folder.glob("0*.png"))) == 6 and len(list((folder / "000").glob("*.png"))) == 7
    monkeypatch.undo()
    assert np.array_equal(pngs(folder), pngs(ask(run, tmp_path / "flat")))


@pytest.mark.parametrize(
    "word", ["n=0", "n=-3", "n=1.5", "shard=0", "format=jpg", "snapshots=[-1]", "nearest=-1", "animation=mp4"]
)
def test_impossible_words_are_told_in_a_line(word: str) -> None:
    with pytest.raises(ConfigError, match=f"^{word.partition('=')[0]}") as caught:
        config.check_sample(compose("ckpt=x", word, primary="sample"))
    assert len(str(caught.value).splitlines()) == 1


# -- interrupted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["png", "parquet"])
def test_killed_at_any_operation_the_same_files_come_out(
    form: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at every operation in turn, and the next attempt once more at that number: then to the end."""
    words = (f"format={form}", "n=5", "batch=4", "shard=4", "snapshots=[1]")
    fault = Fault(0)
    monkeypatch.setattr(storage, "watch", fault)
    whole = contents(ask(run, tmp_path / "whole", *words))
    operations = fault.seen
    assert operations >= 25
    for k in range(1, operations + 1):
        out = tmp_path / f"{k}"
        monkeypatch.setattr(storage, "watch", Fault(k))
        codes = [in_child(lambda: ask(run, out, *words)) for _ in range(2)]  # noqa: B023
        assert codes[0] == KILLED and codes[1] in (0, KILLED)
        monkeypatch.setattr(storage, "watch", lambda operation, path: None)
        assert contents(ask(run, out, *words)) == whole, k


def test_only_what_is_missing_is_made_and_in_its_own_batch(run: Path, tmp_path: Path, made: list[list[int]]) -> None:
    folder = ask(run, tmp_path / "out")
    whole, times = contents(folder), {p: p.stat().st_mtime_ns for p in folder.glob("0*.png")}
    assert made == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]]
    for i in (5, 12):
        (folder / f"{i:06d}.png").unlink()
    made.clear()
    ask(run, folder)
    assert made == [[4, 5, 6, 7], [12]] and contents(folder) == whole
    written = {p.name for p, before in times.items() if p.stat().st_mtime_ns != before}
    assert written == {"000005.png", "000012.png"}
    made.clear()
    ask(run, folder)
    assert made == [] and contents(folder) == whole


def test_a_missing_shard_is_made_whole_of_the_batches_that_it_needs(run: Path, tmp_path: Path, made: list[list[int]]) -> None:
    folder = ask(run, tmp_path / "out", "format=npz")
    whole = contents(folder)
    (folder / "samples_00000005-00000009.npz").unlink()
    made.clear()
    ask(run, folder, "format=npz")
    assert made == [[4, 5, 6, 7], [8, 9, 10, 11]] and contents(folder) == whole


def test_what_is_found_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ask(run, tmp_path / "out")
    assert "there already" not in capsys.readouterr().out
    (folder / "000003.png").unlink()
    ask(run, folder)
    said = capsys.readouterr().out
    assert "12 of 13 pictures are there already" in said and "1 pictures in" in said
    ask(run, folder)
    assert "nothing was left to make" in capsys.readouterr().out


def killed_after(out: Path, run: Path, file: str, *words: str) -> None:
    """An attempt that dies when it is about to write that file."""

    def watch(operation: str, path: Path) -> None:
        if file in path.name:
            os.kill(os.getpid(), signal.SIGKILL)

    def attempt() -> None:
        storage.watch = watch
        ask(run, out, *words)

    assert in_child(attempt) == -signal.SIGKILL


def test_an_unfinished_folder_is_of_its_question_alone(run: Path, tmp_path: Path, made: list[list[int]]) -> None:
    out = tmp_path / "out"
    killed_after(out, run, "000000.png")
    before = contents(out)
    assert json.loads(before["metadata.json"])["state"] == "unfinished" and list(before) == ["metadata.json"]
    for word in ("seed=1", "sampler.steps=3", "format=npz", "weights=raw"):
        with pytest.raises(ConfigError, match="another question"):
            ask(run, out, word)
    with pytest.raises(ConfigError, match=r"begun for n=13 and is not finished"):
        ask(run, out, "n=5")
    assert made == [] and contents(out) == before, "refused before anything was made"
    assert contents(ask(run, out)) == contents(ask(run, tmp_path / "whole"))


@pytest.mark.parametrize("form", FORMS)
def test_more_pictures_are_added_and_fewer_are_found(form: str, run: Path, tmp_path: Path, made: list[list[int]]) -> None:
    """12 is a border of batches: from there on more are the same as all at once."""
    out = ask(run, tmp_path / "out", f"format={form}", "n=12")
    made.clear()
    ask(run, out, f"format={form}", "n=19")
    first = {"png": 12}.get(form, 8)  # a last shard of 10 and 11 is replaced by one of 10 to 14, which needs batch 8 to 11
    assert made[0][0] == first
    whole = contents(ask(run, tmp_path / "whole", f"format={form}", "n=19"))
    assert contents(out) == whole
    made.clear()
    assert contents(ask(run, out, f"format={form}", "n=3")) == whole and made == [], "a folder never shrinks"


def test_a_change_of_batch_is_told_and_noted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    killed_after(out, run, "000008.png")
    assert "earlier" not in json.loads((out / "metadata.json").read_text())
    ask(run, out, "batch=3")
    assert "made with batch=4, cpu (1 threads)" in capsys.readouterr().out
    facts = json.loads((out / "metadata.json").read_text())
    assert facts["batch"] == 3 and [way["batch"] for way in facts["earlier"]] == [4] and facts["state"] == "finished"
    assert np.abs(pngs(out).astype(int) - pngs(ask(run, tmp_path / "whole")).astype(int)).max() <= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("form", ["png", "safetensors"])
def test_a_signal_stops_and_the_same_command_goes_on(
    form: str, number: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, asked = Maker.states, []

    def raising(self: Maker, ids: torch.Tensor) -> Iterator[object]:
        asked.append(ids)
        for state in states(self, ids):
            if len(asked) == 3:
                signal.raise_signal(number)
            yield state

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="the same command goes on") as caught:
        patch.setattr(Maker, "states", raising)
        ask(run, tmp_path / "out", f"format={form}")
    assert caught.value.code == 128 + number and len(str(caught.value).splitlines()) == 1
    assert len(asked) == 3, "the batch that was being made is given up"
    there = [p for p in (tmp_path / "out").iterdir() if p.name != "metadata.json"]
    assert len(there) == {"png": 8, "safetensors": 1}[form]
    assert signal.getsignal(number) == before
    assert contents(ask(run, tmp_path / "out", f"format={form}")) == contents(ask(run, tmp_path / "whole", f"format={form}"))


def test_two_commands_do_not_fill_one_folder(run: Path, tmp_path: Path) -> None:
    folder = ask(run, tmp_path / "out")
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StorageError, match="is being filled by another process"):
        ask(run, folder)
    os.close(descriptor)
    ask(run, folder)


# -- several processes -------------------------------------------------------------------------------------------------


def test_two_processes_of_torchrun_make_the_same_files(run: Path, tmp_path: Path) -> None:
    words = command(run, tmp_path / "two", "format=parquet", "snapshots=[0,2]")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run([*torchrun, SAMPLE, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("13 pictures") == 2 and "2 processes" in done.stdout, "one speaks, at the start and at the end"
    assert contents(tmp_path / "two") == contents(ask(run, tmp_path / "one", "format=parquet", "snapshots=[0,2]"))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@given(batch=st.integers(1, 9), size=st.integers(1, 9), n=st.integers(1, 60))
def test_the_work_is_shared_without_gap_or_double(world: int, batch: int, size: int, n: int) -> None:
    album = Album(Path("/nowhere"), Npz(size, (), {}), n, lambda i: None)
    shares = [together.share(album, batch, Process(rank, world)) for rank in range(world)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(album)))
    if size == 1:
        batches = [set(batches_for(album, files.tolist(), batch)) for files in shares]
        assert sum(map(len, batches)) == len(set().union(*batches)), "no batch is made twice"


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world: int = 2) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def test_who_dies_leaves_nobody_waiting(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first gives up after PATIENCE with a line; the second waits for the question; then both, one after the other."""
    out = tmp_path / "out"
    monkeypatch.setattr("diffusion_cli.sampling.run.PATIENCE", 0.3)
    as_process(monkeypatch, 1)
    with pytest.raises(StorageError, match="first process has not begun"):
        ask(run, out)
    assert not out.exists()
    as_process(monkeypatch, 0)
    monkeypatch.setattr("diffusion_cli.sampling.run.PATIENCE", 0.0)
    monkeypatch.setattr(together.time, "sleep", lambda seconds: None)
    with pytest.raises(StorageError, match="another process has ended or hangs; the same command goes on"):
        ask(run, out)
    assert {p.name for p in out.glob("0*.png")} == {f"{i:06d}.png" for i in (0, 1, 2, 3, 8, 9, 10, 11)}
    as_process(monkeypatch, 1)
    ask(run, out)
    assert not (out / "grid.png").exists(), "that is the first one's to draw"
    as_process(monkeypatch, 0)
    ask(run, out)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert contents(out) == contents(ask(run, tmp_path / "one"))


def test_a_signal_ends_the_waiting(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_process(monkeypatch, 0)
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped, match="while it waited"):
        ask(run, tmp_path / "out")


def test_progress_of_others_keeps_the_first_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience is for standing still, not for the whole."""
    monkeypatch.setattr(together.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(together.time, "monotonic", itertools.count().__next__)  # a second a look
    together.wait(iter([5, 5, 4, 4, 3, 3, 2, 2, 1, 0]).__next__, StopRequest(), 2.0, "files")
    with pytest.raises(StorageError, match="files for 2 s"):
        together.wait(iter([5, 4, 4, 4, 4, 0]).__next__, StopRequest(), 2.0, "files")


@pytest.mark.parametrize(("words", "expected"), [
    ({}, Process(0, 1, 0)),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Process(3, 4, 1)),
    ({"RANK": "1", "WORLD_SIZE": "2"}, Process(1, 2, 1)),
])  # fmt: skip
def test_the_environment_says_which_process(words: dict[str, str], expected: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    for key, value in words.items():
        monkeypatch.setenv(key, value)
    assert process() == expected


@pytest.mark.parametrize(
    "words", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "1"}]
)
def test_an_environment_that_contradicts_itself_is_told(words: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in words.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="RANK must be a number below WORLD_SIZE"):
        process()


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    two = Process(5, 8, 1)
    assert [two.device(word) for word in ("auto", "cuda", "cpu", "cuda:0")] == ["cuda:1", "cuda:1", "cpu", "cuda:0"]
    assert Process().device("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert two.device("auto") == "auto"


# -- in bounded memory -------------------------------------------------------------------------------------------------


def counted(album: Album, numbers: Sequence[int], batch: int, side: int = 1) -> Iterator[tuple[int, torch.Tensor]]:
    """Batches of pictures whose pixels are their number (modulo 256)."""
    for number in numbers:
        ids = torch.arange(number * batch, min((number + 1) * batch, album.n))
        yield number * batch, ids.to(torch.uint8)[:, None, None, None].expand(-1, 1, side, side).contiguous()


@given(n=st.integers(1, 60), size=st.integers(1, 25), batch=st.integers(1, 25), holes=st.sets(st.integers(0, 59)))
def test_every_file_gets_its_own_pictures(n: int, size: int, batch: int, holes: set[int]) -> None:
    album = Album(Path("/nowhere"), Npz(size, (), {}), n, lambda i: None)
    files = [file for file in range(len(album)) if file not in holes]
    numbers = batches_for(album, files, batch)
    assert numbers == sorted(set(numbers))

    def values(made: Iterator[tuple[int, torch.Tensor]]) -> list[tuple[int, list[int]]]:
        return [(file, found.flatten().tolist()) for group in fill(album, files, made) for file, found in group.items()]

    expected = [(file, [i % 256 for i in range(*album.span(file))]) for file in files]
    assert values(counted(album, numbers, batch)) == expected
    if numbers[:1] != [0]:
        assert values(counted(album, [0, *numbers], batch)) == expected, "a first batch that no file needs does no harm"


@given(n=st.integers(1, 60), size=st.integers(1, 25), batch=st.integers(1, 25))
def test_files_are_handed_over_after_the_batch_that_completes_them(n: int, size: int, batch: int) -> None:
    album, made = Album(Path("/nowhere"), Npz(size, (), {}), n, lambda i: None), []

    def noted() -> Iterator[tuple[int, torch.Tensor]]:
        for begin, images in counted(album, range(-(-n // batch)), batch):
            made.append(begin + len(images))
            yield begin, images

    for group in fill(album, range(len(album)), noted()):
        assert all(made[-1] - batch < album.span(file)[1] <= made[-1] for file in group)


GROWTH = """
from pathlib import Path
from test_scale import streamed
status = Path("/proc/self/status")  # not getrusage: its peak outlives exec, and is that of the process that started this one
peak = lambda: int(status.read_text().partition("VmHWM:")[2].split()[0]) // 1024
before = peak()
for _ in streamed():
    pass
between = peak()
everything = list(streamed())
print(between - before, peak() - before)
"""


def streamed() -> Iterator[dict[int, torch.Tensor]]:
    """200 MB of pictures in files of 10 MB, made 2 MB at a time."""
    album = Album(Path("/nowhere"), Npz(1000, (), {}), 20_000, lambda i: None)
    return fill(album, range(len(album)), counted(album, range(100), 200, side=100))


def test_memory_holds_one_file_and_one_batch() -> None:
    """Far less than all; and holding all would be seen. In a fresh process: an old one has freed memory to use again."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    in_turn, all_at_once = map(int, done.stdout.split())
    assert in_turn < 100 and all_at_once > 150
