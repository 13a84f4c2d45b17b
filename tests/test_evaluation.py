"""diffusion-evaluate: the figures of a checkpoint, how each was made, and one line for what cannot be measured."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiny import compose, train

from diffusion_cli import config
from diffusion_cli.errors import ConfigError, UserError
from diffusion_cli.evaluation.run import evaluate


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    learn = ("trainer.steps=20", "trainer.save_every=10", "trainer.report_every=20", "optimizer.lr=3e-3")
    train(folder, *learn, name="plain")
    train(folder, *learn, "dataset.labels=true", name="labelled")
    train(folder, *learn, "schedule=mix", name="mix")
    return folder


def ask(run: Path, *words: str) -> tuple[dict[str, dict[str, float]], dict[str, object]]:
    given = {w.partition("=")[0]: w for w in (f"ckpt={run}", "n=24", "batch=24", "device=cpu", "levels=4", *words)}
    path = evaluate(config.check_evaluate(compose(*given.values(), primary="evaluate")))
    kept = json.loads(path.read_text())
    return kept["figures"], kept["made_by"]


def test_figures_say_how_they_were_made(runs: Path) -> None:
    figures, made_by = ask(runs / "plain", "metrics=[denoising,bound,bits]", "n=6")
    assert {"x0_mse", "bits_per_dim", "bits_per_dim_bound"} <= set(figures)
    assert made_by["n"] == 6 and made_by["split"] == "test" and made_by["weights"] == "ema" and made_by["step"] == 20
    assert all(figure["error"] > 0 for figure in figures.values())
    assert 3 < figures["bits_per_dim"]["value"] < 12 and 3 < figures["bits_per_dim_bound"]["value"] < 40


def test_any_batch_gives_the_same_figures(runs: Path, tmp_path: Path) -> None:
    whole, _ = ask(runs / "labelled")
    parts, _ = ask(runs / "labelled", "batch=7", f"out={tmp_path / 'parts.json'}")
    assert (tmp_path / "parts.json").exists()
    for name, figure in whole.items():
        assert parts[name]["value"] == pytest.approx(figure["value"], rel=1e-4), name


def test_more_training_and_other_weights_are_seen(runs: Path) -> None:
    newest, _ = ask(runs / "plain")
    older, made_by = ask(runs / "plain" / "checkpoints" / "step_00000010")
    raw, _ = ask(runs / "plain", "weights=raw")
    assert made_by["step"] == 10 and newest["x0_mse"]["value"] < older["x0_mse"]["value"]
    assert raw["x0_mse"]["value"] != newest["x0_mse"]["value"]


def test_training_and_evaluation_agree(runs: Path, tmp_path: Path) -> None:
    """The same pictures and the same noise: the figure that the run logged at its end."""
    run = train(tmp_path, "trainer.steps=4", "trainer.evaluate_every=4", "trainer.evaluate=24")
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    of_run = next(row["evaluate/x0_mse"] for row in reversed(logged) if "evaluate/x0_mse" in row)
    figures, _ = ask(run, "metrics=[denoising]")
    assert figures["x0_mse"]["value"] == pytest.approx(of_run, rel=1e-5)


def test_the_training_split_is_named(runs: Path) -> None:
    _, made_by = ask(runs / "plain", "split=train", "metrics=[denoising]")
    assert made_by["split"] == "train"


@pytest.mark.parametrize(("words", "said"), [
    (("metrics=[fidd]",), "metrics is"),
    (("metrics=[kid]",), "compared in which features"),
    (("metrics=[inception_score]", "features=raw"), "gives no classes"),
    (("metrics=[kid]", "features=classifier"), "a classifier run is needed"),
    (("metrics=[kid]", "features=classifier", "features.ckpt=nowhere"), "features.ckpt=nowhere does not exist"),
    (("metrics=[kid]", "features=raw", "repeats=0"), "repeats is 0"),
    (("metrics=[kid]", "features=raw", "features.dimensions=0"), "features.dimensions is 0"),
    (("metrics=[kid]", "features=raw", "sampler.steps=0"), "sampler.steps is 0"),
    (("metrics=[kid]", "features=raw", "guidance=cfg"), "guidance"),
    (("metrics=[class_accuracy]", "features=inception", "features.path=none.pth"), "curl"),
    (("metrics=[]",), "metrics is empty"),
    (("n=0",), "n is 0"),
    (("tolerance=0",), "tolerance is 0"),
    (("data=somewhere",), "has no path to change"),
    (("ckpt=nothing",), "does not exist"),
])  # fmt: skip
def test_mistakes_are_said_in_one_line(words: tuple[str, ...], said: str, runs: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        ask(runs / "plain", *words)
    assert len(str(caught.value).splitlines()) == 1


def test_bits_of_uniform_noise_are_refused(runs: Path) -> None:
    with pytest.raises(ConfigError, match="white Gaussian noise"):
        ask(runs / "mix", "metrics=[bound]")
    figures, _ = ask(runs / "mix", "metrics=[denoising]")
    assert figures["x0_mse"]["value"] > 0


@pytest.mark.parametrize(("words", "package"), [
    (("metrics=[kid]", "features=raw"), "torch-fidelity"),
    (("metrics=[density]", "features=clip"), "transformers"),
])  # fmt: skip
def test_a_missing_extra_is_one_line(words: tuple[str, ...], package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there, gone = importlib.util.find_spec, ("torch_fidelity", "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else there(name))
    with pytest.raises(ConfigError) as caught:
        config.check_evaluate(compose("ckpt=x", *words, primary="evaluate"))
    assert str(caught.value) == f"{package} is not installed: pip install 'diffusion-cli[eval]'"
