"""diffusion-export: what is written is what was trained, other programs read it and answer the same, and the card is true.

Agreement with diffusers is in test_export_diffusers.py, the hub in test_export_hub.py.
"""

import errno
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from test_storage import Fault, contents, count
from tiny import compose, in_child, train

from diffusion_cli import checkpoint, config, storage
from diffusion_cli.checkpoint import Checkpoint
from diffusion_cli.commands import export as command
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.errors import ConfigError, StorageError, UserError
from diffusion_cli.exporting import export
from diffusion_cli.exporting.folder import portable
from diffusion_cli.exporting.moves import walk_of
from diffusion_cli.exporting.parcel import Model
from diffusion_cli.finding import find, load_denoiser
from diffusion_cli.models import Network
from diffusion_cli.predictions import X0, Eps, NextStep, Preconditioned, Prediction, V, Velocity
from diffusion_cli.samplers import Ancestral, Uniform
from diffusion_cli.samplers.sampler import last
from diffusion_cli.sampling import sample
from diffusion_cli.schedules import EDM, VE, VP, Betas, Flow, Mix, Schedule

BIN = Path(sys.executable).parent
LEARN = ("trainer.steps=6", "trainer.save_every=3", "trainer.preview_every=6", "trainer.evaluate_every=6", "optimizer.lr=3e-3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(folder, *LEARN, "dataset.labels=true", name="labelled")
    train(folder, *LEARN, "schedule=mix", "prediction=x0", "model=unet_basic", "model.widths=[4,4]", *PLAIN, name="mix")
    return folder


PLAIN = ("model.width=DEFAULT", "model.groups=DEFAULT", "model.multipliers=DEFAULT")  # tiny.py's, which are a U-Net's


def asked(run: Path, *words: str) -> Path:
    return export(config.check_export(compose(f"ckpt={run}", *words, primary="export")))


def blocks(folder: Path, language: str) -> list[str]:
    """The card's code in that language."""
    return re.findall(rf"```{language}\n(.*?)```", (folder / "README.md").read_text(), re.S)


# -- the folder --------------------------------------------------------------------------------------------------------


def pictures(run: Path, out: Path, *words: str) -> list[bytes]:
    given = (f"ckpt={run}", f"out={out}", "n=4", "sampler.steps=2", "device=cpu", *words)
    folder = sample(config.check_sample(compose(*given, primary="sample")))
    return [Image.open(path).tobytes() for path in sorted(folder.glob("0*.png"))]


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_folder_draws_what_the_run_draws(weights: str, runs: Path, tmp_path: Path) -> None:
    """To the bit, and without what only training needs."""
    folder = asked(runs / "labelled", f"out={tmp_path / 'it'}", f"weights={weights}")
    of_run = pictures(runs / "labelled", tmp_path / "a", f"weights={weights}")
    assert len(of_run) == 4 and pictures(folder, tmp_path / "b", f"weights={weights}") == of_run
    held = {path.name for path in folder.iterdir()}
    own = {"ema": "average.safetensors", "raw": "weights.safetensors"}[weights]
    assert held == {own, "config.json", "state.json", "manifest.json", "README.md", "samples.png", "export.json"}
    other = {"ema": "raw", "raw": "ema"}[weights]
    with pytest.raises(StorageError, match=f"weights={other}, which it was exported without: write weights={weights}"):
        load_denoiser(find(folder), other)


def test_a_damaged_folder_is_not_sampled(runs: Path, tmp_path: Path) -> None:
    folder = asked(runs / "labelled", f"out={tmp_path / 'it'}")
    data = bytearray((folder / "average.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "average.safetensors").write_bytes(data)
    with pytest.raises(StorageError, match="SHA-256 is not the manifest's"):
        find(folder)
    with pytest.raises(StorageError, match=r"average.safetensors is missing or is not what was exported: remove"):
        asked(runs / "labelled", f"out={folder}")


def test_no_folder_of_this_machine_leaves_it(runs: Path, tmp_path: Path) -> None:
    node = {"a": "/home/me/pictures", "b": {"c": ["~/x/y", "plain", r"C:\me\cars"]}, "d": 1, "e": "diffusion_cli.data.Digits"}
    node |= {"f": None}
    left = {"a": "pictures", "b": {"c": ["y", "plain", "cars"]}, "d": 1, "e": "diffusion_cli.data.Digits", "f": None}
    assert portable(node) == left
    folder = asked(runs / "labelled", f"out={tmp_path / 'it'}")
    stored = json.loads((folder / "config.json").read_text())
    assert json.loads((runs / "labelled/checkpoints/step_00000006/config.json").read_text())["config"]["outputs"] == str(runs)
    assert stored["config"]["outputs"] == runs.name
    for path in folder.iterdir():
        assert str(runs).encode() not in path.read_bytes(), path.name


def test_the_same_command_finds_its_export_and_no_other(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = runs / "labelled", tmp_path / "it"
    folder = asked(run, f"out={out}")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "generated").mkdir()  # what diffusion-sample writes there
    capsys.readouterr()
    assert asked(run, f"out={out}") == folder
    assert capsys.readouterr().out == f"{folder} holds this export already\n"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(ConfigError, match=r"holds another export \(weights ema and not raw\): choose another folder"):
        asked(run, f"out={out}", "weights=raw")
    with pytest.raises(ConfigError, match="holds another export"):
        asked(run / "checkpoints/step_00000003", f"out={out}")
    (tmp_path / "mine").mkdir()
    asked(run, f"out={tmp_path / 'mine'}")  # empty: nothing is lost
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is there and is no export: choose another folder"):
        asked(run, f"out={tmp_path / 'other'}")
    with pytest.raises(ConfigError, match=r"out=\.: name a folder"):
        asked(run, "out=.")
    assert (tmp_path / "other" / "letter.txt").read_text() == "dear"


def test_without_out_it_lies_in_the_run(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "labelled", tmp_path / "run")
    assert asked(run) == run / "exported" / "step_00000006-folder"
    assert asked(run, "to=safetensors", "weights=raw") == run / "exported" / "step_00000006-safetensors-raw"
    again = asked(run / "exported" / "step_00000006-folder", f"out={tmp_path / 'again'}")  # an export of an export
    assert (again / "average.safetensors").read_bytes() == (
        run / "exported/step_00000006-folder/average.safetensors"
    ).read_bytes()
    assert (again / "samples.png").exists()


@pytest.mark.parametrize("error", [errno.ENOSPC, None], ids=["full", "killed"])
def test_it_appears_whole_or_not_at_all(error: int | None, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = lambda out: asked(runs / "labelled", f"out={out}")  # noqa: E731
    operations = count(lambda: work(tmp_path / "count"), monkeypatch)
    whole = contents(tmp_path / "count")
    assert operations > 15
    ends = set()
    for k in range(1, operations + 1, 2 if error else 5):
        out = tmp_path / f"{k}"
        monkeypatch.setattr(storage, "watch", Fault(k, error))
        if error is None:
            assert in_child(lambda: work(out)) != 0  # noqa: B023
        else:
            with pytest.raises(StorageError):
                work(out)
        monkeypatch.setattr(storage, "watch", lambda operation, path: None)
        ends.add(out.exists())
        assert not out.exists() or contents(out) == whole
        assert contents(work(out)) == whole, "and the same command makes it good"
    assert False in ends


# -- one file ----------------------------------------------------------------------------------------------------------


def test_safetensors_carry_their_config(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = asked(runs / "labelled", "to=safetensors", f"out={tmp_path / 'it'}")
    monkeypatch.chdir(folder)
    made = run_python(folder)
    ours = load_denoiser(find(runs / "labelled"), "ema")
    x, t, labels = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([1, 2, 10])
    with torch.no_grad():
        assert (made["denoiser"](x, t, labels) - ours(x, t, labels)).abs().max() < 1e-6  # the memory of weights lies otherwise
    for name, value in ours.network.state_dict().items():
        assert torch.equal(made["denoiser"].network.state_dict()[name], value)


def run_python(folder: Path) -> dict[str, Any]:
    """The card's Python, run as it stands in the folder that is the current one; its variables."""
    (code,) = blocks(folder, "python")
    names: dict[str, Any] = {}
    exec(compile(code, str(folder / "README.md"), "exec"), names)
    return names


def test_the_commands_of_the_card_run(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = asked(runs / "labelled", f"out={tmp_path / 'it'}")
    (text,) = blocks(folder, "bash")
    lines = [line for line in text.splitlines() if line]
    assert len(lines) == 2 and all(line.startswith("diffusion-sample ckpt=. ") for line in lines)
    command = BIN / "diffusion-sample"
    done = subprocess.run([command, *lines[0].split()[1:], "device=cpu"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "pictures").glob("0*.png"))) == 16
    for line in lines[1:]:
        words = line.split()[1:]
        assert config.check_sample(compose(*(w.replace("guidance=2", "guidance=cfg") for w in words), primary="sample"))
    monkeypatch.chdir(folder)
    denoiser = run_python(folder)["denoiser"]
    assert isinstance(denoiser, Denoiser) and not denoiser.training


# -- graphs ------------------------------------------------------------------------------------------------------------


def answers_of_graph(folder: Path, form: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    if form == "torch_export":
        return torch.export.load(folder / "network.pt2").module()(*inputs.values())
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(folder / "network.onnx")
    names = [given.name for given in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: inputs[name].numpy() for name in names})[0])


NETWORKS = {
    "dit": ("model=dit", "model.width=16", "model.depth=2", "model.heads=2", "dataset.labels=true"),
    "unet_gated": ("model=unet_gated", "model.width=8", "model.levels=2"),
    "unet_basic": ("model=unet_basic", "model.widths=[4,4]", "dataset.labels=true"),
    "hint": ("objective.self_conditioning=0.5",),
}
SLOW = [pytest.param(name, form, marks=pytest.mark.slow) for name in NETWORKS for form in ("torch_export", "onnx")]


@pytest.mark.parametrize(("name", "form"), [("labelled", "torch_export"), ("labelled", "onnx"), *SLOW])
def test_a_graph_answers_as_the_network(
    name: str, form: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any batch, 1 included, to 1e-5; and the card's Python makes a picture with it."""
    if form == "onnx":
        pytest.importorskip("onnx")
    run = runs / name
    if not run.exists():
        train(runs, *NETWORKS[name], *(PLAIN if "model" in NETWORKS[name][0][:5] else ()), "trainer.steps=2", name=name)
    folder = asked(run, f"to={form}", f"out={tmp_path / 'it'}", "steps=3", "weights=raw")
    network = load_denoiser(find(run), "raw").network
    with torch.no_grad():
        for parameter in network.parameters():  # fresh networks answer nearly 0: the trained one must not
            assert parameter.isfinite().all()
        for batch in (1, 2, 5):
            given = {"x": torch.randn(batch, network.channels + network.hint_channels, 8, 8), "time": 900 * torch.rand(batch)}
            if network.num_classes:
                given["labels"] = torch.arange(batch) % (network.num_classes + 1)
            expected = network(*given.values())
            assert expected.abs().max() > 1e-4
            assert (answers_of_graph(folder, form, given) - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    monkeypatch.chdir(folder)
    made = run_python(folder)
    assert Image.open("picture.png").size == (8, 8) and made["pictures"].shape == (16, 1, 8, 8)
    expected = walked(run, folder, made)
    assert np.abs(np.asarray(made["x"]) - expected).max() < 1e-4 * max(1, np.abs(expected).max())


def walked(run: Path, folder: Path, made: dict[str, Any]) -> np.ndarray:
    """Our own Euler walk of three moves from the noise of the card's Python."""
    denoiser = load_denoiser(find(run), "raw")
    schedule = denoiser.schedule
    shape = (16, 1, 8, 8)
    is_torch = isinstance(made["x"], torch.Tensor)
    noise = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if is_torch
        else torch.from_numpy(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    )
    labels = torch.as_tensor(np.asarray(made["labels"])) if "labels" in made else None
    hint = [torch.zeros(shape)]

    def ask(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        hint.append(denoiser(x, t, labels, hint[-1]))
        return hint[-1]

    with torch.no_grad():
        walk = Ancestral(3, Uniform(), False).walk(ask, schedule, float(schedule.sigma(torch.tensor(1.0))) * noise, lambda i: 0)
        return last(walk).x.numpy()


def test_what_cannot_be_traced_is_said_in_a_line(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_cli.models.unet import UNet

    def forward(self: UNet, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        return x * float(x.sum().item() > 0 and len(x) > int(time[0].item()))

    monkeypatch.setattr(UNet, "forward", forward)
    with pytest.raises(ConfigError, match=r"^torch.export cannot trace UNet: .+") as caught:
        asked(runs / "labelled", "to=torch_export", f"out={tmp_path / 'it'}")
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "it").exists()


class Linear(Network):
    """A network whose answer is easily seen through: F = (1 + time / 1000) x / 2."""

    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        return (1 + time / 1000)[:, None, None, None] * x / 2


def model_of(prediction: Prediction, clip: bool, steps: int = 5) -> Model:
    """As if it were trained, with a uniform walk of so many steps as its own sampler."""
    sampler = {"_target_": "diffusion_cli.samplers.Ancestral", "steps": steps, "clip": clip}
    node = {"sampler": {**sampler, "grid": {"_target_": "diffusion_cli.samplers.Uniform"}}}
    facts = {"channels": 1, "image_size": 8, "classes": [], "taught": [], "fingerprint": ""}
    settings = config.check_export(compose("ckpt=x", primary="export"))
    found = Checkpoint(Path("x"), 1, "", {"config": node, "facts": facts}, {})
    return Model(found, Denoiser(Linear(1, 8, 0), prediction), settings)


SCHEDULES: list[Schedule] = [Betas(), Betas("cosine", 16), VP(), VE(), EDM(), Flow(), Mix()]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", [Eps, X0, V, Velocity, Preconditioned, NextStep])
def test_the_numbers_of_a_walk_are_our_sampler(kind: type[Prediction], schedule: Schedule, clip: bool) -> None:
    """Every prediction on every schedule: F, then x0, then x by walk.json alone, beside our own walk, in float64."""
    if kind is Eps and schedule.reaches_zero:
        pytest.skip("impossible")
    model = model_of(kind(schedule), clip)
    walk = walk_of(model)
    assert json.loads(json.dumps(walk, allow_nan=False)) == walk and walk["clip"] == clip
    noise = torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = walk["start"] * noise
    for move in walk["moves"]:
        F = model.denoiser.network(move["c_in"] * x, torch.full((3,), move["time"], dtype=torch.float64))
        x0 = move["x0_of_x"] * x + move["x0_of_F"] * F
        x0 = x0.clip(-1, 1) if clip else x0
        x = move["x_of_x"] * x + move["x_of_x0"] * x0
    prediction = model.denoiser.prediction

    def ask(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # Denoiser without its cast of F to float32
        z = prediction.c_in(t) * x
        return prediction.decode(model.denoiser.network(z, prediction.c_noise(t).expand(len(x))), x, t)[0]

    sampler = Ancestral(5, Uniform(), clip)
    expected = last(sampler.walk(ask, schedule, sampler.start(schedule, noise), lambda i: noise)).x
    assert (x - expected).abs().max() < 1e-9 * max(1, expected.abs().max())
    assert walk["noise"] == ("normal" if schedule.gaussian else "uniform from -1 to 1")


def test_uniform_noise_is_drawn_uniformly(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = asked(runs / "mix", "to=torch_export", f"out={tmp_path / 'it'}", "steps=1")
    assert "2 * torch.rand(16, 1, 8, 8" in blocks(folder, "python")[0]
    monkeypatch.chdir(folder)
    run_python(folder)


# -- the card ----------------------------------------------------------------------------------------------------------


def evaluated(run: Path, name: str, figures: dict[str, Any], **made_by: Any) -> None:
    (run / "evaluated").mkdir(exist_ok=True)
    (run / "evaluated" / f"{name}.json").write_text(json.dumps({"figures": figures, "made_by": made_by}))


def test_the_card_says_what_the_run_knows(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "labelled", tmp_path / "run")
    digest = find(run).digest
    own = {"checkpoint": digest, "weights": "ema", "n": 24, "split": "test", "seed": 0}
    evaluated(
        run, "a", {"fid": {"value": 12.5, "error": 0.25, "of": "24 samples"}, "kid": {"value": 0.5, "error": None}}, **own
    )
    evaluated(run, "b", {"recall": {"value": 0.7}}, **{**own, "checkpoint": "another"})
    evaluated(run, "c", {"precision": {"value": 0.7}}, **{**own, "weights": "raw"})
    evaluated(run, "d", {"nothing": {"value": float("nan")}}, **own)
    (run / "evaluated" / "e.json").write_text("no JSON")
    folder = asked(run, f"out={tmp_path / 'it'}", "licence=cc-by-4.0")
    card = ModelCard.load(folder / "README.md")
    head = card.data.to_dict()
    assert head["license"] == "cc-by-4.0" and head["library_name"] == "diffusion-cli"
    assert head["pipeline_tag"] == "unconditional-image-generation" and {"diffusion", "safetensors"} <= set(head["tags"])
    measured = {result.metric_type: result for result in card.data.eval_results}
    in_training = json.loads((run / "status.json").read_text())["figures"]["evaluate/x0_mse"]
    assert {name: result.metric_value for name, result in measured.items()} == {"fid": 12.5, "kid": 0.5, "x0_mse": in_training}
    assert measured["fid"].dataset_split == "test" and measured["fid"].dataset_name == "Digits"
    assert "| fid | 12.5 | 0.25 | 24 samples | n 24, split test, seed 0 |" in card.text
    pictures = find(run).config["pictures"]
    assert pictures["train"] == 40 and f"| pictures | 40 train, {pictures['test']} test |" in card.text
    weights = sum(p.numel() for p in load_denoiser(find(run), "ema").network.parameters())
    for line in (
        "| size | 8 x 8, grey, values in [-1, 1] |",
        "| schedule | Flow |",
        "| prediction | Velocity |",
        f"| parameters | {weights:,} |",
        "| steps | 6 |",
        "| pictures seen | 48 |",
        "| batch | 8 |",
        f"| fingerprint | `{find(run).config['facts']['fingerprint']}` |",
    ):
        assert line in card.text, line
    assert "![samples](samples.png)" in card.text
    assert (folder / "samples.png").read_bytes() == (run / "samples" / "samples_00000006.png").read_bytes()
    again = ModelCard(card.content)  # huggingface_hub's own parser, there and back
    assert again.data.to_dict() == head


def test_a_card_claims_nothing_that_is_not_its_own(runs: Path, tmp_path: Path) -> None:
    folder = asked(runs / "labelled" / "checkpoints" / "step_00000003", f"out={tmp_path / 'early'}")
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results is None and "None was measured" in card.text and "samples.png" not in card.text
    assert card.data.license == "unknown" and "No licence was stated" in card.text
    raw = ModelCard.load(asked(runs / "labelled", f"out={tmp_path / 'raw'}", "weights=raw") / "README.md")
    assert raw.data.eval_results is None, "the run measured its average"


def test_new_figures_renew_the_card_and_nothing_else(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = shutil.copytree(runs / "labelled", tmp_path / "run"), tmp_path / "it"
    folder = asked(run, f"out={out}")
    before = contents(folder)
    own = {"checkpoint": find(run).digest, "weights": "ema"}
    evaluated(run, "a", {"fid": {"value": 12.5}}, **own)
    asked(run, f"out={out}")
    now = contents(folder)
    assert {name for name in now if now[name] != before[name]} == {"README.md", "export.json"}
    assert "| fid | 12.5 |" in now["README.md"].decode()
    (folder / "README.md").write_text("my own words")
    evaluated(run, "b", {"kid": {"value": 0.1}}, **own)
    asked(run, f"out={out}")
    assert (folder / "README.md").read_text() == "my own words" and "was edited by hand" in capsys.readouterr().out


def test_export_json_lists_every_file(runs: Path, tmp_path: Path) -> None:
    folder = asked(runs / "labelled", f"out={tmp_path / 'it'}")
    record = json.loads((folder / "export.json").read_text())
    files = {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items() if name != "export.json"}
    assert record["files"] == files and record["asked"]["to"] == "folder"


# -- what is wrong -----------------------------------------------------------------------------------------------------

MALFORMED = [
    (("ckpt=x", "to=keras"), "to is keras: it must be one of folder, diffusers, safetensors, onnx, torch_export, hub"),
    (("ckpt=x", "to=hub"), "to=hub needs a place there: repo=OWNER/NAME"),
    (("ckpt=x", "to=hub", "repo=mine"), "repo is mine: a place on the hub is OWNER/NAME"),
    (("ckpt=x", "repo=me/it"), "repo=me/it is about the hub: write to=hub repo=me/it form=folder"),
    (("ckpt=x", "licence='Apache 2'"), "licence is Apache 2: the hub's short names are meant"),
    (("ckpt=x", "label=3"), "label=3 is told for good to a network of diffusers alone"),
    (("ckpt=x", "to=diffusers", "steps=3"), "steps=3 is about the walk beside a network"),
    (("ckpt=x", "weights=best"), "weights is best: it must be one of ema, raw"),
    (("ckpt=x", "private=maybe"), "private is maybe: it must be true or false"),
    (("to=onnx",), "say which checkpoint: ckpt=outputs/<name>"),
]


@pytest.mark.parametrize(("words", "said"), MALFORMED, ids=[" ".join(words) for words, _ in MALFORMED])
def test_a_wrong_line_is_refused_in_one(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.check_export(compose(*words, primary="export"))
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("to", "lacking", "extra"), [("diffusers", "diffusers", "diffusers"), ("onnx", "onnxscript", "onnx")])
def test_a_missing_extra_is_named(to: str, lacking: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None if name == lacking else object())
    for words in ((f"to={to}",), ("to=hub", "repo=me/it", f"form={to}")):
        with pytest.raises(ConfigError, match=rf"^to={to} needs more packages: pip install 'diffusion-cli\[{extra}\]'$"):
            config.check_export(compose("ckpt=x", *words, primary="export"))
    config.check_export(compose("ckpt=x", "to=folder", primary="export"))


def test_commands_of_the_pages_are_right(repo: Path) -> None:
    pages = [page.read_text() for page in (repo / "README.md", *(repo / "docs").glob("*.md"))]
    found = [line.strip() for text in pages for line in text.splitlines() if line.strip().startswith("diffusion-export ")]
    found += [example for example, _ in command.EXAMPLES]
    assert len(found) > 8
    for line in found:
        _, *words = shlex.split(re.split(r"\s{2,}|\s#", line)[0])
        assert config.check_export(compose(*(word.replace("OWNER/NAME", "me/it") for word in words), primary="export")), line


def test_help_says_every_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["diffusion-export", "--help"])
    command.main()
    page = capsys.readouterr().out
    for key in compose("ckpt=x", primary="export"):
        assert re.search(rf"^  {key}=\S* +\S", page, re.M), key
    assert max(map(len, page.splitlines())) <= 128


def test_a_mistake_is_answered_before_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['diffusion-export', 'ckpt=x', 'to=kreas']\n"
        "from diffusion_cli.commands.export import main\n"
        "try: main()\n"
        "except SystemExit as error: assert error.code == 64\n"
        "assert not {'torch', 'diffusers', 'huggingface_hub', 'onnx'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("diffusion-export: to is kreas") and not list(tmp_path.iterdir())


def test_a_classifier_a_damaged_run_and_a_missing_one_are_refused(runs: Path, tmp_path: Path) -> None:
    small = ("model.width=8", "model.groups=4", "model.multipliers=[1,2]", "model.head_width=8", "model.attention_levels=[1]")
    run = train(tmp_path, "experiment=classifier_digits", *small, "dataset.labels=true", "trainer.steps=1", name="classifier")
    with pytest.raises(ConfigError, match="is no denoiser but a classifier"):
        asked(run, f"out={tmp_path / 'it'}")
    broken = shutil.copytree(runs / "labelled" / "checkpoints" / "step_00000006", tmp_path / "step_00000006")
    (broken / "average.safetensors").write_bytes(b"half")
    with pytest.raises(StorageError, match="is damaged or incomplete"):
        asked(broken, f"out={tmp_path / 'it'}")
    with pytest.raises(UserError, match="does not exist"):
        asked(tmp_path / "nowhere", f"out={tmp_path / 'it'}")
    assert not (tmp_path / "it").exists()


def test_a_checkpoint_of_training_is_read_as_before(runs: Path) -> None:
    found = find(runs / "labelled")
    assert sorted(found.groups()) == ["average", "optimizer", "trainer", "weights"]
    assert checkpoint.load(found.folder).digest == found.digest and found.run == runs / "labelled"
