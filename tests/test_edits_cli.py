"""The words init, strength, vary, between and edit of diffusion-sample: what they mean, refuse and write."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import compose, train

from diffusion_cli import config
from diffusion_cli.errors import ConfigError, DataError, UserError
from diffusion_cli.sampling import sample

STEADY = ("sampler=ddim", "sampler.steps=20")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plain, labelled, and ve: on a schedule with alpha = 1, told of noise by eps; a few steps of training each."""
    folder = tmp_path_factory.mktemp("runs")
    learn = ("trainer.steps=20", "trainer.report_every=20", "optimizer.lr=3e-3")
    train(folder, *learn, name="plain")
    train(folder, *learn, "dataset.labels=true", name="labelled")
    train(folder, *learn, "schedule=edm", "prediction=edm", name="exploding")
    train(folder, *learn, "schedule=mix", name="mixing")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits five.png and nine.png of 8 x 8 pixels, small.png of 4 x 4, and mask.png whose lower half is white."""
    from diffusion_cli.data.digits import FILE

    folder = tmp_path_factory.mktemp("files")
    with np.load(FILE, allow_pickle=False) as stored:
        for name, row in (("five", 5), ("nine", 9)):
            Image.fromarray((stored["images"][row] * 15.9).astype(np.uint8)).save(folder / f"{name}.png")
    Image.open(folder / "five.png").resize((4, 4), Image.Resampling.BOX).save(folder / "small.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[4:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def ask(run: Path, out: Path | None, *words: str) -> Path:
    given = [f"ckpt={run}", "n=3", "batch=3", "device=cpu", "sampler.steps=4", *([f"out={out}"] if out else []), *words]
    merged = {word.partition("=")[0]: word for word in given}
    return sample(config.check_sample(compose(*merged.values(), primary="sample")))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def pictures(folder: Path) -> np.ndarray:
    return np.stack([pixels(path) for path in sorted(folder.glob("0*.png"))])


def facts(folder: Path) -> dict[str, object]:
    return json.loads((folder / "metadata.json").read_text())


# ---------------------------------------------------------------------------- edits


@pytest.mark.parametrize("run", ["plain", "labelled", "exploding", "mixing"])
@pytest.mark.parametrize("method", ["ddnm", "dps", "moments"])
def test_inpainting_keeps_what_is_known_to_the_bit(run: str, method: str, runs: Path, files: Path, tmp_path: Path) -> None:
    words = (f"init={files / 'five.png'}", "edit=inpaint", f"edit/method={method}")
    made = pictures(ask(runs / run, tmp_path / "mask", *words, f"edit.mask={files / 'mask.png'}"))
    assert (made[:, :4] == pixels(files / "five.png")[:4]).all()
    assert len({picture[4:].tobytes() for picture in made}) == 3, "the rest is new in each"
    box = pictures(ask(runs / run, tmp_path / "box", *words, "edit.box=[0,0.5,1,1]"))
    assert (box == made).all(), "the same half, said in shares"
    assert (pictures(ask(runs / run, tmp_path / "pixels", *words, "edit.box=[0,4,8,8]")) == made).all()


def test_going_back_in_time_and_particles(runs: Path, files: Path, tmp_path: Path) -> None:
    words = (f"init={files / 'five.png'}", "edit=inpaint", "edit.box=[0,0.5,1,1]", "sampler=ddpm", "n=4", "sampler.steps=6")
    ways = {
        "one": (),
        "back": ("edit.method.resample=3", "edit.method.jump=2"),
        "many": ("edit/method=particles", "edit.method.count=4"),
    }
    made = {name: pictures(ask(runs / "plain", tmp_path / name, *words, *more)) for name, more in ways.items()}
    for found in made.values():
        assert (found[:, :4] == pixels(files / "five.png")[:4]).all()
    assert len({found.tobytes() for found in made.values()}) == 3
    for name, more in ways.items():
        alone = pictures(ask(runs / "plain", tmp_path / f"{name} alone", *words, *more, "batch=1"))
        assert np.abs(alone - made[name]).max() <= 1, "picture i is the same in any batch"


def test_upscaling_agrees_with_the_small_picture(runs: Path, files: Path, tmp_path: Path) -> None:
    made = pictures(ask(runs / "plain", tmp_path / "out", f"init={files / 'small.png'}", "edit=upscale"))
    means = made.reshape(3, 4, 2, 4, 2).mean((2, 4))
    assert np.abs(means - pixels(files / "small.png")).max() <= 1, "also where the range of a file would have clipped"
    assert made.reshape(3, 4, 2, 4, 2).std((2, 4)).max() > 5, "and blocks are not flat"


def test_outpainting_puts_the_picture_in_the_middle(runs: Path, files: Path, tmp_path: Path) -> None:
    words = (f"init={files / 'five.png'}", "edit=outpaint")
    small = np.asarray(Image.open(files / "five.png").resize((4, 4), Image.Resampling.BICUBIC)).astype(int)
    made = pictures(ask(runs / "plain", tmp_path / "middle", *words))
    assert (made[:, 2:6, 2:6] == small).all() and len({m.tobytes() for m in made}) == 3
    corner = pictures(ask(runs / "plain", tmp_path / "corner", *words, "edit.at=[1,0]"))
    assert (corner[:, :4, 4:] == small).all()


def test_strength_begins_an_edit_from_the_picture(runs: Path, files: Path, tmp_path: Path) -> None:
    """What is to be made anew begins as it was: little is changed with little strength."""
    words = (f"init={files / 'five.png'}", "edit=inpaint", "edit.box=[0,0.5,1,1]", "sampler.steps=20")
    off = {
        s: np.abs(pictures(ask(runs / "plain", tmp_path / s, *words, f"strength={s}")) - pixels(files / "five.png")).mean()
        for s in ("0.02", "0.5", "null")
    }
    assert off["0.02"] < off["0.5"] < off["null"] and off["0.02"] < 6, off


def test_colour_needs_colours_and_keeps_the_grey(files: Path, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this one makes grey pictures"):
        ask(runs / "plain", tmp_path / "out", f"init={files / 'five.png'}", "edit=colour")
    run = train(tmp_path, "dataset.channels=3", name="coloured")
    made = pictures(ask(run, tmp_path / "made", f"init={files / 'five.png'}", "edit=colour", "sampler=ddpm"))
    assert np.abs(made.mean(-1) - pixels(files / "five.png")).max() <= 1
    assert np.abs(made - made.mean(-1, keepdims=True)).max() > 10, "and colours are there"


def save(image: Image.Image, path: Path, **how: object) -> Path:
    image.save(path, **how)
    return path


@pytest.mark.parametrize("mode", ["P", "RGBA", "I;16", "L", "CMYK", "exif", "1"])
def test_pictures_of_any_mode_and_size_go_in(mode: str, runs: Path, files: Path, tmp_path: Path) -> None:
    """20 x 10 pixels: the middle 10 x 10 is what counts. The rest is of another brightness, and reaches two pixels in."""
    grey = np.full((10, 20), 200, np.uint8)
    grey[:, :5] = grey[:, 15:] = 30
    image, path = Image.fromarray(grey), tmp_path / "in.png"
    if mode == "I;16":
        save(Image.fromarray(grey.astype(np.uint16) * 257), path)
    elif mode == "RGBA":
        rgba = image.convert("RGBA")
        rgba.putalpha(Image.fromarray(np.where(grey == 200, 0, 255).astype(np.uint8)))  # transparent is white
        save(rgba, path)
    elif mode == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # lies on its side
        path = save(image, tmp_path / "in.jpg", exif=exif, quality=100)
    else:
        path = (
            save(image.convert(mode), tmp_path / "in.tif" if mode == "CMYK" else path)
            if mode != "CMYK"
            else save(image.convert("CMYK"), tmp_path / "in.jpg", quality=100)
        )
    made = pictures(ask(runs / "plain", tmp_path / "out", f"init={path}", "edit=inpaint", "edit.box=[0,0,1,0.25]"))
    wanted = {"RGBA": 255, "1": None}.get(mode, 200)
    if wanted is not None:
        assert np.abs(made[:, 2:6, 2:6] - wanted).max() <= 3


# ---------------------------------------------------------------------------- between and vary


@pytest.mark.parametrize("run", ["plain", "labelled", "exploding"])
def test_between_numbers_the_ends_are_those_pictures(run: str, runs: Path, tmp_path: Path) -> None:
    free = pictures(ask(runs / run, tmp_path / "free", "n=8", "batch=8", "seed=4"))
    made = pictures(ask(runs / run, tmp_path / "made", "between=[2,7]", "n=5", "batch=2", "seed=4"))
    assert np.abs(made[0] - free[2]).max() <= 1 and np.abs(made[-1] - free[7]).max() <= 1
    steps = [np.abs(b - a).mean() for a, b in pairwise(made)]
    assert min(steps) > 0 and max(steps) < np.abs(made[-1] - made[0]).mean()


def test_a_map_has_the_four_pictures_at_its_corners(runs: Path, tmp_path: Path) -> None:
    free = pictures(ask(runs / "labelled", tmp_path / "free", "n=4", "batch=4"))
    made = pictures(ask(runs / "labelled", tmp_path / "made", "between=[0,1,2,3]", "n=9", "batch=4"))
    assert np.abs(made[[0, 2, 6, 8]] - free).max() <= 1
    one = pictures(ask(runs / "labelled", tmp_path / "one", "between=[0,1,2,3]", "n=9", "batch=4", "label=5"))
    assert np.abs(made - one).max() > 1, "labels are mixed where none is given"


@pytest.mark.parametrize(("run", "words"), [
    ("plain", ()), ("plain", ("sampler=heun",)), ("exploding", ()), ("labelled", ()), ("labelled", ("label=[5,9]",)),
])  # fmt: skip
def test_between_files_the_ends_are_the_files(
    run: str, words: tuple[str, ...], runs: Path, files: Path, tmp_path: Path
) -> None:
    ends = f"between=[{files / 'five.png'},{files / 'nine.png'}]"
    made = pictures(ask(runs / run, tmp_path / "out", *STEADY, "sampler.steps=40", ends, "n=4", *words))
    assert np.abs(made[0] - pixels(files / "five.png")).mean() < 2 and np.abs(made[-1] - pixels(files / "nine.png")).mean() < 2
    assert np.abs(made[1] - made[0]).mean() > 2


@pytest.mark.parametrize("run", ["plain", "exploding", "labelled"])
def test_variations_begin_at_the_picture(run: str, runs: Path, files: Path, tmp_path: Path) -> None:
    words = (f"init={files / 'five.png'}", *STEADY, "sampler.steps=40")
    ways = {v: pictures(ask(runs / run, tmp_path / v, *words, f"vary={v}")) for v in ("0", "0.2", "1")}
    off = {v: float(np.abs(made - pixels(files / "five.png")).mean()) for v, made in ways.items()}
    assert off["0"] < 2 and off["0"] < off["0.2"] < off["1"], off
    assert len({picture.tobytes() for picture in ways["0.2"]}) == 3
    if run != "labelled":  # which is told no label here, and all of them in turn there
        free = pictures(ask(runs / run, tmp_path / "free", *STEADY, "sampler.steps=40"))
        assert np.abs(ways["1"] - free).max() <= 1


# ---------------------------------------------------------------------------- the question


def test_all_words_are_part_of_the_question(runs: Path, files: Path, tmp_path: Path) -> None:
    five, nine = (f"{files / name}.png" for name in ("five", "nine"))
    questions = [
        (f"init={five}",), (f"init={nine}",), (f"init={five}", "strength=0.4"), (f"init={five}", "vary=0.4", *STEADY),
        ("between=[1,2]",), ("between=[1,3]",), ("between=[1,2]", "n=4"), (f"between=[{five},{nine}]", *STEADY),
        (f"init={five}", "edit=upscale"), (f"init={five}", "edit=outpaint"),
        (f"init={five}", "edit=inpaint", "edit.box=[0,0,4,8]"),
        (f"init={five}", "edit=inpaint", f"edit.mask={files / 'mask.png'}"),
    ]  # fmt: skip
    folders = [ask(runs / "plain", None, *words, "seed=50") for words in questions]
    assert len(set(folders)) == len(folders)
    assert ask(runs / "plain", None, *questions[-1], "seed=50") == folders[-1], "the same question again: the same folder"
    moved = tmp_path / "five.png"
    moved.write_bytes(Path(five).read_bytes())
    assert ask(runs / "plain", None, f"init={moved}", "seed=50") == folders[0], "the file counts, not where it lies"
    moved.write_bytes(Path(nine).read_bytes())
    assert ask(runs / "plain", None, f"init={moved}", "seed=50") not in (folders[0],)
    said = facts(folders[-1])
    assert str(files) not in json.dumps(said) and len(said["init"]) == 16 and len(said["edit"]["mask"]) == 16
    assert facts(folders[4])["between"] == {"ends": [1, 2], "n": 3} and facts(folders[2])["strength"] == 0.4
    assert facts(folders[0])["strength"] == 0.5 and facts(folders[3])["vary"] == 0.4


@pytest.mark.parametrize(("words", "said"), [
    (("strength=0.3",), "strength is about a picture"),
    (("vary=0.3",), "vary is about a picture"),
    (("edit=upscale",), "edit is about a picture"),
    (("init=a.png", "vary=0.3", "strength=0.2"), "vary goes without strength"),
    (("init=a.png", "vary=0.3", "edit=upscale"), "vary goes without edit"),
    (("between=[1,2]", "init=a.png"), "between goes without init"),
    (("between=[1,2]", "vary=0.1", "strength=0.5"), "between goes without strength and vary"),
    (("between=[1,2,3]",), "two ends or four corners"),
    (("between=[1,a.png]",), "two ends or four corners"),
    (("between=[1,2]", "n=1"), "n=2"),
    (("between=[1,2,3,4]", "n=8"), "n=4 or n=9"),
    (("between=[1,2,3,4]", "n=1"), "n=4"),
    (("between=[-1,2]",), "between is"),
    (("init=a.png", "edit=inpaint", "edit.box=[1,2]"), "edit.box is"),
    (("init=a.png", "edit=outpaint", "edit.scale=2"), "edit.scale is 2"),
    (("init=a.png", "edit=upscale", "edit.factor=0"), "edit.factor is 0"),
    (("init=a.png", "vary=1.5"), "vary is 1.5"),
])  # fmt: skip
def test_contradictions_are_said_before_torch(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.check_sample(compose("ckpt=x", *words, primary="sample"))
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("run", "words", "said"), [
    ("plain", ("init=none.png", "edit=upscale"), "init=none.png cannot be read as a picture: No such file"),
    ("plain", ("init=FIVE", "edit=inpaint", "edit.mask=none.png"), "edit.mask=none.png cannot be read as a picture"),
    ("plain", ("init=FIVE", "edit=inpaint"), "say what is made anew"),
    ("plain", ("init=FIVE", "edit=inpaint", "edit.mask=MASK", "edit.box=[0,0,1,1]"), "say what is made anew"),
    ("plain", ("init=FIVE", "edit=inpaint", "edit.box=[0.5,0,0.5,1]"), "must rise"),
    ("plain", ("init=FIVE", "edit=inpaint", "edit.box=[0,0,0.01,1]"), "must rise"),
    ("plain", ("init=FIVE", "edit=upscale", "edit.factor=3"), "can be enlarged by 2, 4, 8"),
    ("plain", ("init=FIVE", "edit=outpaint", "edit.scale=1"), "must some, but not all"),
    ("plain", ("init=FIVE", "edit=upscale", "edit/method=particles", "sampler=ddim"), "sampler=ddpm"),
    ("plain", ("between=[1,2]", "sampler=ddpm"), "needs a sampler that adds no noise"),
    ("plain", ("init=FIVE", "vary=0.2", "sampler=ddim", "sampler.eta=0.5"), "needs a sampler that adds no noise"),
    ("mixing", ("between=[1,2]",), "the noise of schedule=mix is not Gaussian"),
    ("plain", ("between=[none.png,FIVE]",), "between=none.png cannot be read as a picture"),
    ("labelled", ("between=[FIVE,FIVE]", "label=[1,2,3]"), "one for each, one for all, or none"),
    ("labelled", ("init=FIVE", "vary=0.1", "label=[1,2]"), "one label="),
])  # fmt: skip
def test_mistakes_are_said_in_one_line(
    run: str, words: tuple[str, ...], said: str, runs: Path, files: Path, tmp_path: Path
) -> None:
    words = tuple(w.replace("FIVE", str(files / "five.png")).replace("MASK", str(files / "mask.png")) for w in words)
    with pytest.raises(UserError) as caught:
        ask(runs / run, tmp_path / "out", *words)
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1, str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_picture(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(DataError, match="not a picture"):
        ask(runs / "plain", tmp_path / "out", f"init={tmp_path / 'text.png'}", "edit=upscale")
