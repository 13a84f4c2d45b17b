"""A disk that is really full: the system's own errors, not injected ones."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import hashes, in_child, train, words

from diffusion_cli import checkpoint
from diffusion_cli.checkpoint import Checkpoint
from diffusion_cli.errors import StorageError
from diffusion_cli.runs import status_of

TRAIN = Path(sys.executable).with_name("diffusion-train")
WORDS = ("trainer.steps=40", "trainer.save_every=1", "trainer.keep=9", "trainer.report_every=10")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, which holds about five checkpoints."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_says_so_in_a_line_and_what_was_saved_is_whole(small: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        train(small, *WORDS)
    message = str(caught.value)
    assert caught.value.code == 74 and len(message.splitlines()) == 1 and str(small) in message
    assert "No space left on device" in message and " MB needed, " in message and " MB free)" in message
    found = list(checkpoint.good(small / "run" / "checkpoints"))
    assert len(found) >= 3 and all(isinstance(one, Checkpoint) for one in found)
    steps = [one.step for one in found]  # type: ignore[union-attr]
    assert steps == list(range(steps[0], 0, -1)), "each of them, up to the one that had no room"
    with pytest.raises(StorageError, match="No space left on device"):
        train(small, *WORDS)
    shutil.rmtree(found[-1].folder)  # type: ignore[union-attr] (the user makes room)
    more = (*WORDS, "trainer.keep=2", f"trainer.steps={steps[0] + 1}", "trainer.preview=1")
    train(small, *more)
    assert hashes(small / "run") == hashes(train(tmp_path, *more))


def test_a_full_disk_under_tensorboard_does_not_stop_training(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    board = tmp_path / "run" / "tensorboard"
    board.mkdir(parents=True)
    subprocess.run(["mount", "--bind", small, board], check=True)  # not a link, which would be refused
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", board], check=True))
    (small / "filled").write_bytes(bytes(2**20 - 2 * 4096))
    few = ("trainer.steps=20", "trainer.report_every=1", "trainer.preview_every=5")
    run = train(tmp_path, *few)
    assert status_of(run)["state"] == "finished"
    assert capsys.readouterr().out.count("TensorBoard's files cannot be written (No space left on device)") == 1
    assert hashes(run) == hashes(train(tmp_path, *few, name="clean"))


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """As a quota: the system cuts a write off in the middle of it."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        try:
            train(tmp_path)
        except StorageError as error:
            (tmp_path / "said").write_text(str(error))
            os._exit(error.code)

    assert in_child(work) == 74
    assert "File too large" in (tmp_path / "said").read_text()
    assert not checkpoint.folders(tmp_path / "run" / "checkpoints"), "what was cut off has no name"
    assert hashes(train(tmp_path)) == hashes(train(tmp_path, name="clean"))


@pytest.mark.slow
def test_the_command_ends_with_74_and_without_a_traceback(small: Path) -> None:
    done = subprocess.run([TRAIN, *words(small, *WORDS)], capture_output=True, text=True)
    assert done.returncode == 74 and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
