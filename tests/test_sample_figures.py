"""diffusion-evaluate on samples: what it makes, with what it compares, on one process or two, stopped and continued."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import compose, train
from torch import Tensor

from diffusion_cli import config, storage
from diffusion_cli.data import Digits, Pictures
from diffusion_cli.errors import Stopped, StorageError, UserError
from diffusion_cli.evaluation import parts, reference, rows
from diffusion_cli.evaluation.distances import MEASURES, Cloud
from diffusion_cli.evaluation.run import evaluate
from diffusion_cli.evaluation.samples import Samples, shares_of
from diffusion_cli.runs import cache_home
from diffusion_cli.sampling import sample
from diffusion_cli.sampling.formats import FORMATS

EVALUATE = str(Path(sys.executable).with_name("diffusion-evaluate"))
ALL = "metrics=[fid,kid,precision,recall,density,coverage,sliced_wasserstein]"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """The user's cache, empty; commands that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield (cache_home() / "references")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    learn = ("trainer.steps=20", "trainer.save_every=10", "trainer.report_every=20", "optimizer.lr=3e-3")
    train(folder, *learn, name="plain")
    train(folder, *learn, "dataset.labels=true", name="labelled")
    judge = ("objective=classifying", "model=classifier", "model.head_width=8", "model.attention_levels=[]")
    train(folder, *judge, "dataset.labels=true", "trainer.steps=8", name="judge")
    return folder


def command(run: Path, *words: str) -> list[str]:
    given = (f"ckpt={run}", "n=24", "batch=8", "device=cpu", "metrics=[kid]", "features=raw", *words)
    return list({word.partition("=")[0]: word for word in given}.values())


def ask(run: Path, *words: str) -> tuple[dict[str, Any], dict[str, Any], Path]:
    path = evaluate(config.check_evaluate(compose(*command(run, *words), primary="evaluate")))
    kept = json.loads(path.read_text())
    return kept["figures"], kept["made_by"], path


# -- what is measured --------------------------------------------------------------------------------------------------


def test_figures_are_those_of_diffusion_samples_pictures(runs: Path, tmp_path: Path) -> None:
    """Without labels they are the very pictures that diffusion-sample makes, beside the training pictures."""
    figures, _, _ = ask(runs / "plain", ALL)
    words = ("n=24", "batch=8", f"out={tmp_path}", "format=npz", "device=cpu", f"ckpt={runs / 'plain'}")
    folder = sample(config.check_sample(compose(*words, primary="sample")))
    made = FORMATS["npz"](24, [], {}).decode(next(folder.glob("*.npz")).read_bytes(), 24)
    dataset = Digits(size=8, channels=1, limit=40, test_share=0.1667)
    real = dataset.load("train")
    assert real is not None and isinstance(real.images, Tensor)
    clouds = [Cloud(images.flatten(1) / 127.5 - 1) for images in (made, real.images)]
    for metric in ("kid", "precision", "recall", "density", "coverage"):
        assert figures[f"raw_{metric}_24"]["value"] == pytest.approx(MEASURES[metric](*clouds), rel=1e-9), metric
    assert figures["raw_fd_24"]["value"] == pytest.approx(MEASURES["fid"](*clouds), rel=1e-6)
    assert figures["pixels_sliced_wasserstein_24"]["value"] > 0


def test_made_by_says_how(runs: Path) -> None:
    words = ("sampler=heun", "sampler.steps=3", "guidance=cfg", "guidance.scale=2", "repeats=2", "seed=5")
    figures, made_by, path = ask(runs / "labelled", *words)
    assert made_by["n"] == 24 and made_by["repeats"] == 2 and made_by["seed"] == 5 and made_by["weights"] == "ema"
    assert made_by["features"]["name"] == "raw" and len(made_by["features"]["digest"]) == 16
    assert made_by["reference"] == {"split": "train", "count": 40, "fingerprint": made_by["reference"]["fingerprint"]}
    assert made_by["sampler"]["steps"] == made_by["steps"] == 3 and made_by["guidance"]["scale"] == 2
    assert made_by["nfe"] == 2 * (2 * 3 - 1)  # heun's last step asks once; each question with the label and without
    assert {"step", "checkpoint", "device", "torch", "date", "seconds", "torch_fidelity", "batch"} <= made_by.keys()
    figure = figures["raw_kid_24"]
    assert figure["of"] == "standard deviation over 2 draws" and len(figure["values"]) == 2
    assert figure["value"] == pytest.approx(sum(figure["values"]) / 2) and figure["error"] > 0
    assert path.parent == runs / "labelled" / "evaluated" and not list(path.parent.glob(".*"))
    board = EventAccumulator(str(runs / "labelled" / "tensorboard"))
    board.Reload()
    assert board.Scalars("evaluate/raw_kid_24")[-1].value == pytest.approx(figure["value"])
    assert board.Scalars("evaluate/raw_kid_24")[-1].step == 20


def test_draws_have_no_picture_in_common(runs: Path) -> None:
    """Draw k of n is pictures k n .. (k + 1) n - 1 of the seed: the first half of a draw of 2 n is the draw of n."""
    one = ask(runs / "plain", "n=16")[0]["raw_kid_16"]["value"]
    three = ask(runs / "plain", "n=16", "repeats=3")[0]["raw_kid_16"]["values"]
    assert three[0] == one and len(set(three)) == 3
    assert ask(runs / "plain", "n=16", "seed=1")[0]["raw_kid_16"]["value"] not in three


def test_labels_follow_the_training_pictures() -> None:
    labels = torch.tensor([0] * 10 + [2] * 30 + [3] * 60)
    shares = shares_of(Pictures(torch.zeros(100, 1, 1, 1, dtype=torch.uint8), labels))
    samples = Samples(None, None, None, None, None, shares, (), 0, None)  # type: ignore[arg-type]
    ids = torch.arange(20000)
    drawn = samples.labels(ids)
    assert drawn is not None
    found = torch.bincount(drawn, minlength=4) / len(ids)
    assert torch.allclose(found, torch.tensor([0.1, 0.0, 0.3, 0.6]), atol=0.015) and found[1] == 0
    some = samples.labels(ids[500:600])
    assert some is not None and torch.equal(some, drawn[500:600]), "by number, whatever the batch"


def test_classifier_features_judge_classes(runs: Path, tmp_path: Path) -> None:
    words = ("features=classifier", f"features.ckpt={runs / 'judge'}")
    figures, made_by, _ = ask(runs / "labelled", "metrics=[class_accuracy,inception_score,fid]", *words)
    assert 0 <= figures["classifier_class_accuracy_24"]["value"] <= 1 and made_by["labels"]
    assert figures["classifier_inception_score_24"]["value"] >= 1 and "classifier_fd_24" in figures
    with pytest.raises(UserError, match="trained without labels"):
        ask(runs / "plain", "metrics=[class_accuracy]", *words)


def test_both_kinds_at_once(runs: Path) -> None:
    figures, made_by, _ = ask(runs / "plain", "metrics=[kid,denoising]")
    assert {"raw_kid_24", "x0_mse", "x0_mse_by_log_snr/+6"} <= figures.keys()
    assert made_by["reference"]["split"] == made_by["split"] == "train" and made_by["n"] == 24


def test_other_splits_and_weights_are_seen(runs: Path) -> None:
    one, made_by, path = ask(runs / "plain")
    other, other_by, other_path = ask(runs / "plain", "split=test")
    raw, _, raw_path = ask(runs / "plain", "weights=raw")
    assert other_by["reference"]["split"] == "test" and other_by["reference"] != made_by["reference"]
    assert len({figures["raw_kid_24"]["value"] for figures in (one, other, raw)}) == 3
    assert len({path, other_path, raw_path}) == 3


# -- the kept reference ------------------------------------------------------------------------------------------------


def folder_of(features: str) -> Path:
    (folder,) = (cache_home() / "references").glob(f"{features}-*")
    return folder


def test_a_reference_is_made_once(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ask(runs / "plain", "features=random", "features.width=2")[0]
    made = []
    monkeypatch.setattr(reference, "_keep", lambda *given: made.append(given))
    again, _, _ = ask(runs / "plain", "features=random", "features.width=2", f"out={tmp_path / 'again.json'}")
    assert not made and again == first
    ask(runs / "plain", "features=random", "features.width=4")
    assert len(made) == 1, "other features have a reference of their own"


@pytest.mark.parametrize("harm", ["cut", "flipped", "stale", "no json", "gone"])
def test_a_damaged_or_stale_reference_is_made_anew(
    harm: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = ask(runs / "plain")[0]
    folder = folder_of("raw")
    tensors, facts = folder / "features.safetensors", folder / "made_by.json"
    data = tensors.read_bytes()
    if harm == "cut":
        tensors.write_bytes(data[:-5])
    if harm == "flipped":
        tensors.write_bytes(data[:-5] + b"\x00\x01\x02\x03\x04")
    if harm == "stale":
        facts.write_text(facts.read_text().replace('"count": 40', '"count": 41'))
    if harm == "no json":
        facts.write_text("{")
    if harm == "gone":
        tensors.unlink()
    capsys.readouterr()
    assert ask(runs / "plain")[0] == first
    assert capsys.readouterr().out.count(": made anew") == 1
    assert tensors.read_bytes() == data
    assert ask(runs / "plain")[0] == first and "made anew" not in capsys.readouterr().out


def test_other_pictures_have_a_reference_of_their_own(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ask(runs / "plain")
    ask(runs / "plain", "split=test")
    assert len(list((cache_home() / "references").iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_no_failure(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert ask(runs / "plain")[0]["raw_kid_24"]
    assert "the reference is not kept" in capsys.readouterr().out


# -- processes and stops -----------------------------------------------------------------------------------------------


def test_two_processes_find_the_same_as_one(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, where both write several files; each process makes about half of them."""
    monkeypatch.setattr(rows, "TOGETHER", 8)
    words = [ALL.replace("]", ",denoising]"), "repeats=2"]
    one = ask(runs / "labelled", *words)[0]
    work = "import sys; from diffusion_cli.evaluation import rows; rows.TOGETHER = 8; "
    work += "from diffusion_cli.commands.evaluate import main; sys.argv[0] = 'diffusion-evaluate'; main()"
    two = [*command(runs / "labelled", *words), f"out={tmp_path / 'two.json'}"]
    (tmp_path / "work.py").write_text(work.replace("; ", "\n"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(tmp_path / "work.py"), *two], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "two.json").read_text())
    assert kept["figures"] == one and kept["made_by"]["processes"] == 2
    assert done.stdout.count("x0_mse_by_log_snr/+6") == 1, "one of them speaks"
    assert not list(tmp_path.glob(".rows*"))


def test_a_stopped_evaluation_goes_on(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "TOGETHER", 8)
    whole, _, _ = ask(runs / "plain", f"out={tmp_path / 'whole.json'}")
    made: list[int] = []
    original = parts.rows_of_samples

    def watched(samples: Samples, look: Any, ids: Tensor) -> Any:
        made.append(int(ids[0]))
        if made == [0, 8]:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(samples, look, ids)

    monkeypatch.setattr(parts, "rows_of_samples", watched)
    with pytest.raises(Stopped, match="the same command goes on") as caught:
        ask(runs / "plain", f"out={tmp_path / 'parts.json'}")
    assert caught.value.code == 128 + signal.SIGTERM and not (tmp_path / "parts.json").exists()
    found, made_by, _ = ask(runs / "plain", f"out={tmp_path / 'parts.json'}")
    assert made == [0, 8, 16] and found == whole and made_by["nfe"] == 3
    assert not list(tmp_path.glob(".rows*"))


def test_rows_of_a_process_that_never_comes_are_not_waited_for_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_cli.signals import StopRequest

    monkeypatch.setattr(rows, "PATIENCE", 0.2)
    with pytest.raises(StorageError, match="figures of other processes have not come"):
        rows.Ledger(tmp_path, "samples", 10, 5).read(StopRequest())


def test_a_full_disk_is_one_line(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(operation: str, path: Path) -> None:
        if ".safetensors" in path.name and operation == "write":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "watch", full)
    with pytest.raises(StorageError, match=r"cannot write .*No space left"):
        ask(runs / "plain", "seed=77")
