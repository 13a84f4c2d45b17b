"""Walks made visible: every step where they are few, evenly spread where they are many, and what was asked for by number."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_scale import ask
from tiny import train

from diffusion_cli import drawing
from diffusion_cli.codecs import Pixels
from diffusion_cli.errors import ConfigError
from diffusion_cli.samplers import Sampler, State
from diffusion_cli.sampling.seeing import FRAMES, Film, Seen, sheet, strip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs"), "trainer.steps=20", "trainer.report_every=20", "optimizer.lr=3e-3")


def walk(length: int, scale: float = 1.0) -> list[State]:
    """x falls from scale to 0, x0 rises from -1 to 1, in `length` moves."""
    one = torch.ones(2, 1, 4, 4)
    return [State(k, torch.tensor(1 - k / length), scale * (1 - k / length) * one, (2 * k / length - 1) * one)
            for k in range(length + 1)]  # fmt: skip


def filmed(states: list[State], **words: object) -> Film:
    film = Film(**words)  # type: ignore[arg-type]
    for state in states:
        film.see(state, Pixels())
    return film


@pytest.mark.parametrize("length", [1, 8, 39, 40, 79, 80, 81, 200, 1000, 5003])
def test_frames_are_even_however_long_the_walk(length: int, tmp_path: Path) -> None:
    """Kept without knowing the length: at most 2 FRAMES are held, and those drawn are the ends and even steps between."""
    film = Film("gif")
    for state in walk(length):
        film.see(state, Pixels())
        assert len(film.frames) <= 2 * FRAMES
    film.draw(tmp_path)
    movie = Image.open(tmp_path / "trajectory.gif")
    assert movie.n_frames == min(FRAMES, length + 1)
    steps = [seen.step for seen in film.frames]
    assert steps[0] == 0 and steps == list(range(0, length + 1, film.stride)), "every stride-th, the first included"
    assert film.last is not None and film.last.step == length
    assert length + 1 > 2 * FRAMES or film.stride == 1


def test_what_is_drawn_is_within_the_range_of_a_picture() -> None:
    """An exploding x_t is divided by its spread; one of normal size is left alone."""
    wide = 80 * torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    seen = Seen.of(State(0, torch.tensor(1.0), wide, wide / 80), Pixels())
    assert len(seen.x.unique()) > 30 and len(seen.x0.unique()) == 64
    plain = Seen.of(State(0, torch.tensor(1.0), wide / 160, wide / 80), Pixels())
    assert plain.x.float().sub(127.5).abs().max() == pytest.approx(63.75, abs=0.5)


@pytest.mark.parametrize("form", ["gif", "webp"])
def test_animations_move_rest_and_repeat(form: str) -> None:
    """Each frame as long as stated; WebP keeps every colour, GIF 256 of each frame."""
    colours = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames = [drawing.grid(colours.roll(7 * k, 3)) for k in range(3)]
    movie = Image.open(io.BytesIO(drawing.ANIMATIONS[form](frames, 80, 1500)))
    assert movie.format == form.upper() and movie.n_frames == 3 and movie.info["loop"] == 0
    lengths, exact = [], []
    for k, frame in enumerate(frames):
        movie.seek(k)
        movie.load()
        lengths.append(movie.info["duration"])
        exact.append(np.array_equal(np.asarray(movie.convert("RGB")), np.asarray(frame)))
    assert lengths == [80, 80, 1500] and all(exact) == (form == "webp")


def test_snapshots_show_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    film = filmed(walk(10), steps=(5, 0, 10))
    assert list(film.shots) == [0, 5, 10] and [film.shots[k].t for k in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    film.draw(tmp_path)
    drawn = Image.open(tmp_path / "snapshots.png")
    row = drawing.grid(film.shots[0].x, columns=2).height
    assert drawn.height == 18 + 9 * row, "three rows for each"
    assert not (tmp_path / "trajectory.png").exists()
    pixel = lambda shot, line: drawn.getpixel((drawn.width - 20, 18 + (3 * shot + line) * row + 20))  # noqa: E731
    assert [pixel(shot, 1)[0] for shot in range(3)] == [128, 0, 255], "x0 of steps 5, 0, 10, in the order asked for"
    # the walk ends at x = 0, grey 128, whatever its x0 said: what is to change is the distance from there
    assert [pixel(shot, 2)[0] for shot in range(3)] == [0, 128, 127]


def test_what_is_to_change_is_the_distance_to_the_end() -> None:
    first = Seen(0, 1.0, *(torch.full((1, 1, 8, 8), value, dtype=torch.uint8) for value in (9, 200)))
    last = Seen(1, 0.0, *(torch.full((1, 1, 8, 8), value, dtype=torch.uint8) for value in (50, 50)))
    drawn = sheet([first], last)
    row = drawing.grid(first.x).height
    assert [drawn.getpixel((drawn.width - 20, 18 + k * row + 20))[0] for k in range(3)] == [9, 200, 150]


def test_the_strip_has_a_column_for_each_state() -> None:
    states = [Seen.of(state, Pixels()) for state in walk(3)]
    assert strip(states).width > strip(states[:2]).width


def test_steps_that_do_not_exist_are_refused_before_anything_is_made(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"snapshots=\[0, 7\]: this walk has steps 0 to 5, no 7"):
        ask(run, tmp_path / "out", "sampler.steps=5", "snapshots=[0,7]")
    assert not (tmp_path / "out").exists()
    ask(run, tmp_path / "out", "sampler.steps=5", "snapshots=[0,5]")
    assert (tmp_path / "out" / "snapshots.png").exists()


def test_a_walk_of_unknown_length_is_filmed_too(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ask(run, tmp_path / "known", "trajectory=true", "snapshots=[2]", "sampler.steps=5")
    monkeypatch.setattr(Sampler, "length", lambda self, schedule: None)
    unknown = ask(run, tmp_path / "unknown", "trajectory=true", "snapshots=[2]", "sampler.steps=5")
    for name in ("trajectory.png", "trajectory.gif", "snapshots.png"):
        assert (known / name).read_bytes() == (unknown / name).read_bytes()
    with pytest.raises(ConfigError, match="steps 0 to 5, no 9"):
        ask(run, tmp_path / "never", "snapshots=[9]", "sampler.steps=5")
    assert not list((tmp_path / "never").glob("0*.png"))


def test_views_of_pictures_that_are_there(run: Path, tmp_path: Path) -> None:
    """Asked for later, they are drawn of the same walk; the pictures stay as they are."""
    at_once = ask(run, tmp_path / "once", "trajectory=true", "animation=webp")
    later = ask(run, tmp_path / "later")
    times = {p: p.stat().st_mtime_ns for p in later.glob("0*.png")}
    ask(run, later, "trajectory=true", "animation=webp")
    assert {p: p.stat().st_mtime_ns for p in later.glob("0*.png")} == times
    for name in ("trajectory.png", "trajectory.webp"):
        assert (later / name).read_bytes() == (at_once / name).read_bytes()
