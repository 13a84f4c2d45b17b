"""Pictures from a checkpoint: the same for a seed at any batch and number, all facts beside them, never a wrong answer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import compose, train

from diffusion_cli import checkpoint, config
from diffusion_cli.errors import ConfigError, DataError, StorageError, UserError
from diffusion_cli.sampling import sample


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plain (checkpoints at 10 and 20), labelled, and one of a process that tells pictures from noise at every time."""
    folder = tmp_path_factory.mktemp("runs")
    learn = ("trainer.steps=20", "trainer.save_every=10", "trainer.report_every=20", "optimizer.lr=3e-3")
    train(folder, *learn, name="plain")
    train(folder, *learn, "dataset.labels=true", name="labelled")
    return folder


def ask(run: Path, out: Path | None, *words: str) -> Path:
    given = [f"ckpt={run}", "n=3", "batch=3", "device=cpu", *([f"out={out}"] if out else []), *words]
    merged = {word.partition("=")[0]: word for word in given}
    return sample(config.check_sample(compose(*merged.values(), primary="sample")))


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]).astype(int)


@pytest.mark.parametrize("sampler", ["heun", "ddpm", "dpmpp_2m"])
def test_picture_i_is_the_same_at_any_batch_and_number(sampler: str, runs: Path, tmp_path: Path) -> None:
    chosen = (f"sampler={sampler}", "sampler.steps=4", "seed=5")
    eight = ask(runs / "plain", tmp_path / "8", "n=8", "batch=8", *chosen)
    again = ask(runs / "plain", tmp_path / "8b", "n=8", "batch=8", *chosen)
    for i in range(8):
        assert (eight / f"{i:06d}.png").read_bytes() == (again / f"{i:06d}.png").read_bytes(), "the same batch: the same bytes"
    for batch in (1, 4, 7):
        other = pictures(ask(runs / "plain", tmp_path / f"batch{batch}", "n=8", f"batch={batch}", *chosen))
        assert np.abs(other - pictures(eight)).max() <= 1
    four = pictures(ask(runs / "plain", tmp_path / "4", "n=4", "batch=4", *chosen))
    assert np.abs(four - pictures(eight)[:4]).max() <= 1, "n=4 begins n=8"
    different = pictures(ask(runs / "plain", tmp_path / "seed", "n=8", "batch=8", *chosen, "seed=6"))
    assert np.abs(different - pictures(eight)).max() > 30
    assert min(np.abs(a - b).max() for k, a in enumerate(pictures(eight)) for b in pictures(eight)[:k]) > 5, "all differ"


def test_files_and_their_facts(runs: Path, tmp_path: Path) -> None:
    folder = ask(runs / "labelled", tmp_path / "out", "n=12", "batch=5", "seed=3", "sampler=ddim", "sampler.steps=3")
    assert {p.name for p in folder.iterdir()} == {f"{i:06d}.png" for i in range(12)} | {"grid.png", "metadata.json"}
    metadata = json.loads((folder / "metadata.json").read_text())
    found = checkpoint.load(runs / "labelled" / "checkpoints" / "step_00000020")
    expected = {"checkpoint": found.digest, "step": 20, "seed": 3, "weights": "ema", "label": None, "init": None,
    "strength": None,
                "format": "png", "n": 12, "batch": 5, "ckpt": str(found.folder)}  # fmt: skip
    assert {key: metadata[key] for key in expected} == expected
    assert (
        metadata["sampler"]["_target_"].endswith("Ancestral")
        and metadata["sampler"]["steps"] == 3
        and "cpu" in metadata["device"]
    )
    for i in range(12):
        image = Image.open(folder / f"{i:06d}.png")
        facts = json.loads(image.text["diffusion"])
        assert (facts["index"], facts["label"], facts["seed"], facts["checkpoint"]) == (i, i % 10, 3, found.digest)
        assert image.size == (8, 8) and image.mode == "L"
    assert metadata.pop("state") == "finished" and json.loads(Image.open(folder / "grid.png").text["diffusion"]) == metadata


def test_npz_holds_the_same_pictures(runs: Path, tmp_path: Path) -> None:
    png = ask(runs / "labelled", tmp_path / "png", "n=5", "batch=2")
    npz = ask(runs / "labelled", tmp_path / "npz", "n=5", "batch=2", "format=npz")
    with np.load(npz / "samples_00000000-00000004.npz", allow_pickle=False) as stored:
        assert stored["images"].shape == (5, 8, 8, 1) and stored["images"].dtype == np.uint8
        assert np.array_equal(stored["images"][..., 0], pictures(png)) and stored["labels"].tolist() == [0, 1, 2, 3, 4]
    plain = ask(runs / "plain", tmp_path / "plain", "format=npz")
    with np.load(plain / "samples_00000000-00000002.npz", allow_pickle=False) as stored:
        assert list(stored) == ["images"]
    assert not list(npz.glob("0*.png"))


def test_trajectory_files(runs: Path, tmp_path: Path) -> None:
    folder = ask(runs / "plain", tmp_path / "out", "trajectory=true", "sampler.steps=6", "n=5", "batch=2")
    movie, strip = Image.open(folder / "trajectory.gif"), Image.open(folder / "trajectory.png")
    assert movie.n_frames == 7, "every step, and the start"
    assert strip.width > strip.height
    assert np.array_equal(
        pictures(folder), pictures(ask(runs / "plain", tmp_path / "without", "sampler.steps=6", "n=5", "batch=2"))
    )


def test_raw_and_averaged_weights_differ(runs: Path, tmp_path: Path) -> None:
    ema, raw = (ask(runs / "plain", None, f"weights={word}") for word in ("ema", "raw"))
    assert ema != raw and not np.array_equal(pictures(ema), pictures(raw))
    assert json.loads((raw / "metadata.json").read_text())["weights"] == "raw"


def test_labels_by_name_and_number(runs: Path, tmp_path: Path) -> None:
    by_number, by_name = (ask(runs / "labelled", tmp_path / f"{k}", f"label={word}") for k, word in enumerate(("3", "'3'")))
    assert np.array_equal(pictures(by_number), pictures(by_name))
    assert {json.loads(Image.open(p).text["diffusion"])["label"] for p in by_number.glob("0*.png")} == {3}
    other = ask(runs / "labelled", tmp_path / "other", "label=4")
    assert not np.array_equal(pictures(by_number), pictures(other)), "the network is really told"


@pytest.mark.parametrize(("run", "words", "said"), [
    ("labelled", ("label=horse",), "label=horse: "),
    ("labelled", ("label=10",), "label=10: "),
    ("labelled", ("label=-1",), "label=-1: "),
    ("plain", ("label=3",), "trained without labels"),
    ("plain", ("init=nothing.png",), "init=nothing.png cannot be read"),
    ("plain", ("device=cuda:9",), "choose device=cpu"),
    ("plian", (), "does not exist: did you mean"),
    ("plain/samples", (), "holds no checkpoint"),
    ("plain/checkpoints/step_00000011", (), "damaged or incomplete"),
    ("nothing/at/all", (), "does not exist"),
])  # fmt: skip
def test_mistakes_are_said_in_one_line(run: str, words: tuple[str, ...], said: str, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        ask(runs / run, tmp_path / "out", *words)
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "out").exists()


def test_every_form_of_ckpt(runs: Path, tmp_path: Path) -> None:
    newest = [ask(runs / path, tmp_path / f"{k}") for k, path in
              enumerate(["plain", "plain/checkpoints", "plain/checkpoints/step_00000020"])]  # fmt: skip
    assert np.array_equal(pictures(newest[0]), pictures(newest[1])) and np.array_equal(pictures(newest[0]), pictures(newest[2]))
    older = ask(runs / "plain/checkpoints/step_00000010", tmp_path / "older")
    assert not np.array_equal(pictures(newest[0]), pictures(older))
    shutil.copytree(runs / "plain/checkpoints/step_00000020", tmp_path / "a copy")
    assert np.array_equal(pictures(newest[0]), pictures(ask(tmp_path / "a copy", tmp_path / "moved"))), (
        "wherever it lies, whatever its name"
    )


def test_damage_falls_back_with_a_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "plain", tmp_path / "run")
    weights = tmp_path / "run/checkpoints/step_00000020/average.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(bytes(data))
    folder = ask(tmp_path / "run", tmp_path / "out")
    said = capsys.readouterr().out
    assert "passed over a damaged checkpoint" in said and "average.safetensors" in said
    assert json.loads((folder / "metadata.json").read_text())["step"] == 10
    with pytest.raises(StorageError, match=r"damaged or incomplete.*average"):
        ask(weights.parent, tmp_path / "never")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000010")
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        ask(tmp_path / "run", tmp_path / "never")


def test_steps_alone_change_the_checkpoints_own_sampler(runs: Path, tmp_path: Path) -> None:
    own = compose()["sampler"]
    for words, steps in (((), 2), (("sampler.steps=5",), 5)):
        metadata = json.loads((ask(runs / "plain", None, *words) / "metadata.json").read_text())
        assert metadata["sampler"] == {**own, "steps": steps}
    other = json.loads((ask(runs / "plain", None, "sampler=ddim", "sampler.steps=5") / "metadata.json").read_text())
    assert other["sampler"]["_target_"] != own["_target_"]


def test_out_of_another_question_is_refused(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ask(runs / "plain", out)
    before = {p: p.read_bytes() for p in out.iterdir()}
    for word in ("seed=1", "sampler.steps=3", "weights=raw", "format=npz"):
        with pytest.raises(ConfigError, match="another question"):
            ask(runs / "plain", out, word)
    assert {p: p.read_bytes() for p in out.iterdir()} == before
    more = ask(runs / "plain", out, "n=5", "batch=3")
    assert len(pictures(more)) == 5 and np.array_equal(
        pictures(more)[:3], np.stack([np.asarray(Image.open(p)) for p in sorted(before)[:3]])
    )
    (tmp_path / "mine").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "mine" / "photo.png")
    with pytest.raises(ConfigError, match="holds pictures already"):
        ask(runs / "plain", tmp_path / "mine")
    (out / "metadata.json").write_text("{")
    with pytest.raises(DataError, match=r"metadata\.json cannot be read"):
        ask(runs / "plain", out)


def test_without_out_each_question_has_its_folder(runs: Path) -> None:
    folders = [ask(runs / "plain", None, *words) for words in
               (("seed=40",), ("seed=41",), ("seed=40", "sampler.steps=3"), ("seed=40", "sampler=ddim", "sampler.steps=3"),
                ("seed=40", "sampler=ddim", "sampler.steps=3", "sampler.eta=0.5"), ("seed=40", "format=npz"))]  # fmt: skip
    assert len(set(folders)) == len(folders)
    assert ask(runs / "plain", None, "seed=40") == folders[0], "the same question again: the same folder"
    assert not [f for f in folders if set("=, ") & set(f.name)]


def test_interrupted_sampling_is_completed(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after some pictures, before the metadata: the same words make the same set."""
    from diffusion_cli import storage

    whole = ask(runs / "plain", None, "seed=77", "n=4", "batch=2")
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    shutil.rmtree(whole)

    def full(operation: str, path: Path) -> None:
        if "000002.png" in path.name:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "watch", full)
        with pytest.raises(StorageError, match="No space"):
            ask(runs / "plain", None, "seed=77", "n=4", "batch=2")
    again = ask(runs / "plain", None, "seed=77", "n=4", "batch=2")
    assert again == whole and {p.name: p.read_bytes() for p in again.iterdir()} == before


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A handwritten digit as a file."""
    from diffusion_cli.data.digits import FILE

    with np.load(FILE, allow_pickle=False) as stored:
        Image.fromarray((stored["images"][5] * 15.9).astype(np.uint8)).save(tmp_path / "five.png")
    return tmp_path / "five.png"


def test_strength_0_returns_nearly_the_picture_and_1_ignores_it(runs: Path, picture: Path, tmp_path: Path) -> None:
    original = np.asarray(Image.open(picture)).astype(int)
    ways = {
        s: pictures(ask(runs / "plain", tmp_path / s, f"init={picture}", f"strength={s}", "sampler.steps=8"))
        for s in ("0.02", "0.3", "1")
    }
    distances = {s: float(np.abs(found - original).mean()) for s, found in ways.items()}
    assert distances["0.02"] < 8 and distances["0.02"] < distances["0.3"] < distances["1"], distances
    other = tmp_path / "other.png"
    Image.fromarray(255 - original.astype(np.uint8)).save(other)
    ignored = pictures(ask(runs / "plain", tmp_path / "ignored", f"init={other}", "strength=1", "sampler.steps=8"))
    assert np.abs(ignored - ways["1"]).max() <= 1
    kept = pictures(ask(runs / "plain", tmp_path / "kept", f"init={other}", "strength=0.02", "sampler.steps=8"))
    assert np.abs(kept - ways["0.02"]).mean() > 60


def test_init_is_part_of_the_question(runs: Path, picture: Path) -> None:
    folders = {ask(runs / "plain", None, f"init={picture}", "strength=0.5", "seed=9"), ask(runs / "plain", None, "seed=9"),
               ask(runs / "plain", None, f"init={picture}", "strength=0.6", "seed=9")}  # fmt: skip
    assert len(folders) == 3


@pytest.mark.parametrize("target", ["os.system", "torch.load", "diffusion_cli.storage.remove", "diffusion_cli.cli.sys.exit"])
@pytest.mark.parametrize("place", ["model", "schedule", "prediction", "sampler"])
def test_a_hostile_checkpoint_builds_nothing(
    place: str, target: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hashes are right, its config names what it should not: data, never code."""
    monkeypatch.chdir(tmp_path)
    good = checkpoint.load(runs / "plain" / "checkpoints" / "step_00000020")
    bad = {**good.config["config"], place: {"_target_": target, "command": "touch owned"}}
    tensors = {name: good.tensors(name) for name in ("weights", "average")}
    checkpoint.save(tmp_path / "run" / "checkpoints", 1, tensors, {**good.config, "config": bad}, good.state)
    with pytest.raises(ConfigError, match=place):
        ask(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "owned").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("config_of_it", [{}, {"config": {}}, {"config": {}, "facts": {}}, {"config": [], "facts": 3}], ids=str)
def test_a_checkpoint_of_something_else_is_told(config_of_it: dict[str, object], tmp_path: Path) -> None:
    """Whole by its manifest, but not of this program."""
    checkpoint.save(tmp_path / "run" / "checkpoints", 1, {"weights": {"w": torch.zeros(1)}}, config_of_it, {})
    with pytest.raises(UserError) as caught:
        ask(tmp_path / "run", tmp_path / "out")
    assert len(str(caught.value).splitlines()) <= 2


def test_weights_of_another_network_are_refused(runs: Path, tmp_path: Path) -> None:
    good = checkpoint.load(runs / "plain" / "checkpoints" / "step_00000020")
    tensors = {"average": {"denoiser.network.x": torch.zeros(1)}}
    checkpoint.save(tmp_path / "run" / "checkpoints", 1, tensors, good.config, good.state)
    with pytest.raises(StorageError, match="cannot be used"):
        ask(tmp_path / "run", tmp_path / "out")
    with pytest.raises(StorageError, match="cannot be used"):
        ask(tmp_path / "run", tmp_path / "out", "weights=raw")


def test_only_classes_that_were_taught_are_drawn(tmp_path: Path) -> None:
    run = train(tmp_path, "dataset.labels=true", "dataset.classes=[1,4]", "trainer.steps=2")
    folder = ask(run, tmp_path / "out")
    labels = [json.loads(Image.open(path).text["diffusion"])["label"] for path in sorted(folder.glob("0*.png"))]
    assert labels == [1, 4, 1]
    with pytest.raises(ConfigError, match="label=7: "):
        ask(run, tmp_path / "other", "label=7")
