"""Latents and texts: frozen parts that the run carries, and all that works on pixels and labels working on them."""

import contextlib
import errno
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned import written
from PIL import Image
from tiny import compose, hashes, stopped, train, words

from diffusion_cli import config, storage
from diffusion_cli.conditioning import padding
from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.evaluation.run import evaluate
from diffusion_cli.exporting.run import export
from diffusion_cli.finding import find, load_denoiser
from diffusion_cli.guidance import CFG
from diffusion_cli.objectives.denoising import Denoising
from diffusion_cli.objectives.kept import kept
from diffusion_cli.pace import Pace
from diffusion_cli.randomness import Source
from diffusion_cli.runs import cache_home
from diffusion_cli.sampling import sample
from diffusion_cli.stages import stages_of

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

SAMPLERS = sorted(path.stem for path in (config.CONFIGS / "sampler").glob("*.yaml"))
PROMPTS = "prompt=[a red square,a blue square]"


@dataclass(frozen=True)
class Place:
    """outputs: where the runs are; common: the words of the set."""

    outputs: Path
    common: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        parts = [f"codec.ckpt={self.outputs / 'codec'}", f"texts.ckpt={self.outputs / 'clip'}"]
        return (*self.common, "codec=latents", "texts=clip", *parts, "model=unet_text", "model.width=8", "model.groups=4",
                "model.multipliers=[1,2]", "model.attention_levels=[1]", "model.head_width=4", "dataset.flip=true")  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    """An autoencoder, a CLIP, and a denoiser `run` of latents and texts, each of a few steps."""
    outputs = tmp_path_factory.mktemp("text")
    folder = written(outputs / "pictures", each=2)
    common = ("dataset=folder", f"dataset.path={folder}", "dataset.size=16", "dataset.limit=DEFAULT", "model.width=DEFAULT",
              "model.groups=DEFAULT", "model.multipliers=DEFAULT")  # fmt: skip
    here = Place(outputs, common)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(outputs / "cache"))
        codec = ("objective=autoencoding", "model=autoencoder_kl", "model.widths=[8,16]", "model.groups=4", "trainer.preview=4")
        train(outputs, *common, *codec, "model.latent_channels=2", "trainer.steps=10", name="codec")
        clip = ("objective=contrasting", "model=clip", "model.width=16", "model.heads=2", "model.depth=1",
                "objective.vocabulary=300", "model.text_width=16", "model.text_heads=2", "model.text_depth=1",
                "model.length=20")  # fmt: skip
        train(outputs, *common, *clip, name="clip")
        train(outputs, *here.words, "trainer.evaluate_every=2", "trainer.preview_every=4", name="run")
        yield here


def asked(run: Path, out: Path, *words: str) -> Path:
    """diffusion-sample, here and now."""
    return sample(
        config.check_sample(compose(f"ckpt={run}", f"out={out}", "device=cpu", "n=4", "batch=4", *words, primary="sample"))
    )


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_run_works_in_latents_and_reads_tokens(place: Place) -> None:
    facts = find(place.outputs / "run").config["facts"]
    assert facts["codec"]["shape"] == [2, 8, 8] and (facts["channels"], facts["image_size"]) == (3, 16)
    assert facts["texts"]["width"] == 16 and facts["texts"]["length"] == 20
    denoiser = load_denoiser(find(place.outputs / "run"), "ema")
    assert (denoiser.network.channels, denoiser.network.image_size, denoiser.network.text_width) == (2, 8, 16)
    texts = stages_of(find(place.outputs / "run")).texts
    assert texts is not None and torch.equal(denoiser.null, texts.null())
    assert denoiser.null[:2].abs().sum() > 0 and padding(denoiser.null[None])[0, 2:].all()
    rows = [json.loads(line) for line in (place.outputs / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("evaluate_on_train/x0_mse" in row for row in rows)


def test_what_is_kept_is_what_would_be_made(place: Place) -> None:
    """Latents of pictures and of their mirrors, tokens of each caption; the loss of a batch is the same."""
    from diffusion_cli.assembly import objective_of
    from diffusion_cli.build import build
    from diffusion_cli.data import Batches, Dataset

    losses = []
    for cache in (True, False):
        found = find(place.outputs / "run")
        node = {**found.config["config"]}
        node["objective"] = {**node["objective"], "cache": cache}
        pictures = build(node["dataset"], Dataset, "dataset").load("train")
        assert pictures is not None
        objective = objective_of(node, found.config["facts"], stages=stages_of(found))
        assert isinstance(objective, Denoising)
        with torch.no_grad():
            for p in objective.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        objective.eval().meet(pictures, torch.device("cpu"), True)
        batch = next(Batches(pictures, Pace(16), 0, flip=True).starting_at(3))
        assert batch.mirrored is not None and 0 < batch.mirrored.sum() < 16
        losses.append(objective.loss(batch, Source(0, torch.arange(16), 3))[0])
    assert (losses[0] - losses[1]).abs().max() < 1e-4 * losses[0].abs().max()


def test_another_encoder_reads_nothing_that_was_kept(place: Place) -> None:
    before = set((cache_home() / "latents").iterdir())
    words = [word for word in place.words if not word.startswith("codec.")]
    train(place.outputs, *words, f"codec.ckpt={place.outputs / 'codec' / 'checkpoints' / 'step_00000010'}", name="same")
    assert set((cache_home() / "latents").iterdir()) == before, "the same weights: the same file"
    train(place.outputs, *words, f"codec.ckpt={place.outputs / 'codec' / 'checkpoints' / 'step_00000008'}", name="other")
    (new,) = set((cache_home() / "latents").iterdir()) - before
    kept = np.load(new)
    assert kept.shape == (64, 2, 8, 8) and np.isfinite(kept).all()


def test_what_was_cut_short_leaves_nothing(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a file that would be read nor one that takes room; then a full disk is one line with the way out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def broken(ids: torch.Tensor) -> torch.Tensor:
        if ids[0] > 0:
            raise KeyboardInterrupt
        return torch.ones(len(ids), 3)

    with pytest.raises(KeyboardInterrupt):
        kept("latents", ("a",), (200, 3), broken, torch.device("cpu"))
    assert list((tmp_path / "diffusion-cli" / "latents").iterdir()) == []
    rows = kept("latents", ("a",), (200, 3), lambda ids: ids[:, None].float().expand(-1, 3), torch.device("cpu"))
    assert rows(torch.tensor([199, 0])).tolist() == [[199.0] * 3, [0.0] * 3]
    again = kept("latents", ("a",), (200, 3), broken, torch.device("cpu"))
    assert again(torch.tensor([7])).tolist() == [[7.0] * 3], "read, not made"
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(storage, "watch", lambda operation, path: (_ for _ in ()).throw(full) if operation == "write" else None)
    with pytest.raises(StorageError, match=r"No space left.*MB needed.*objective\.cache=false") as caught:
        kept("latents", ("b",), (200, 3), broken, torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_a_resumed_run_is_the_uninterrupted_one(place: Place) -> None:
    stopped(place.outputs, 3, *place.words, name="stopped")
    train(place.outputs, *place.words, name="stopped")
    assert hashes(place.outputs / "stopped") == hashes(place.outputs / "run")


@pytest.mark.parametrize("model", ["dit", "mmdit"])
def test_other_networks_read_texts_in_latents(place: Place, tmp_path: Path, model: str) -> None:
    own = (f"model={model}", "model.patch_size=2", "model.width=16", "model.heads=2", "model.depth=2")
    run = train(
        place.outputs, *(word for word in place.words if not word.startswith("model")), *place.common[4:], *own, name=model
    )
    found = pixels(asked(run, tmp_path / "out", PROMPTS, "guidance=cfg"))
    assert found.shape == (4, 16, 16, 3) and found.std() > 0


# -- the frozen parts --------------------------------------------------------------------------------------------------


def test_a_run_needs_nothing_but_its_folder(place: Place, tmp_path: Path) -> None:
    wanted = pixels(asked(place.outputs / "run", tmp_path / "before", PROMPTS))
    shutil.copytree(place.outputs / "run", tmp_path / "moved" / "run")
    stopped(place.outputs, 3, *place.words, name="left")
    for name in ("codec", "clip"):
        (place.outputs / name).rename(place.outputs / f"gone_{name}")
    try:
        assert (pixels(asked(tmp_path / "moved" / "run", tmp_path / "after", PROMPTS)) == wanted).all()
        train(place.outputs, *place.words, name="left")  # training goes on as well
    finally:
        for name in ("codec", "clip"):
            (place.outputs / f"gone_{name}").rename(place.outputs / name)


def test_an_export_carries_its_parts(place: Place, tmp_path: Path) -> None:
    settings = config.check_export(compose(f"ckpt={place.outputs / 'run'}", f"out={tmp_path / 'e'}", primary="export"))
    folder = export(settings)
    assert sorted(path.name for path in (folder / "parts").iterdir()) == ["codec", "texts"]
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and "| diffused | latents, 2 x 8 x 8" in card and "prompt=" in card
    shutil.move(folder, tmp_path / "elsewhere")
    wanted = pixels(asked(place.outputs / "run", tmp_path / "a", PROMPTS))
    assert (pixels(asked(tmp_path / "elsewhere", tmp_path / "b", PROMPTS)) == wanted).all()


def test_training_begins_from_a_run_with_its_parts(place: Place, tmp_path: Path) -> None:
    """init= brings them from the run's own copies."""
    plain = [word for word in place.common if not word.startswith("model.")]
    node = compose(*words(place.outputs, *plain, f"init={place.outputs / 'run'}", "dataset.labels=false", name="begun"))
    from diffusion_cli.training import train

    (place.outputs / "codec").rename(place.outputs / "gone")
    try:
        train(config.planned(node, [f"init={place.outputs / 'run'}"]))
    finally:
        (place.outputs / "gone").rename(place.outputs / "codec")
    assert find(place.outputs / "begun").config["facts"] == find(place.outputs / "run").config["facts"]


def test_samples_are_scored_by_their_captions(place: Place) -> None:
    words = [f"ckpt={place.outputs / 'run'}", "metrics=[clip_score,clip_score_shuffled,denoising]", "n=8", "batch=8",
             "device=cpu", "features=clip_run", f"features.ckpt={place.outputs / 'clip'}", "guidance=cfg"]  # fmt: skip
    evaluate(config.check_evaluate(compose(*words, primary="evaluate")))
    (written,) = (place.outputs / "run" / "evaluated").glob("*.json")
    said = json.loads(written.read_text())
    scores = [said["figures"][f"cliprun_{name}_8"]["value"] for name in ("clip_score", "clip_score_shuffled")]
    assert all(-1 <= score <= 1 for score in scores) and scores[0] != scores[1]
    assert said["figures"]["x0_mse"]["value"] > 0
    with pytest.raises(ConfigError, match="works in latents"):
        evaluate(config.check_evaluate(compose(words[0], "metrics=[bits]", "device=cpu", primary="evaluate")))


def test_bare_weights_answer_as_the_run_by_the_lines_of_their_card(place: Place, tmp_path: Path) -> None:
    words = (f"ckpt={place.outputs / 'run'}", "to=safetensors", f"out={tmp_path / 'e'}")
    folder = export(config.check_export(compose(*words, primary="export")))
    card = (folder / "README.md").read_text()
    assert "Without the autoencoder of its latents" in card and "Without what makes tokens of texts" in card
    code, found = card.partition("```python\n")[2].partition("```")[0], {}
    with contextlib.chdir(folder):
        exec(code, found)
    wanted, x, t = load_denoiser(find(place.outputs / "run"), "ema"), torch.randn(2, 2, 8, 8), torch.tensor(0.5)
    told = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert torch.equal(found["denoiser"](x, t), wanted(x, t)) and torch.equal(
            found["denoiser"](x, t, told), wanted(x, t, told)
        )


@pytest.mark.parametrize("part", ["codec", "texts"])
def test_another_part_is_refused(place: Place, tmp_path: Path, part: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(place.outputs / "run", run)
    other = {
        "codec": place.outputs / "codec" / "checkpoints" / "step_00000008",
        "texts": place.outputs / "clip" / "checkpoints" / "step_00000002",
    }
    shutil.rmtree(run / "parts" / part)
    shutil.copytree(other[part], run / "parts" / part)
    with pytest.raises(StorageError, match=f"another {part}"):
        asked(run, tmp_path / "out", PROMPTS)
    tensors = next((run / "parts" / part).glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match="damaged"):
        asked(run, tmp_path / "out", PROMPTS)


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "guidance"), [*((name, "cfg") for name in SAMPLERS), ("heun", "none"), ("heun", "apg"),
                         ("dpmpp_2m", "cfg_zero")])  # fmt: skip
def test_every_sampler_and_guidance(place: Place, tmp_path: Path, sampler: str, guidance: str) -> None:
    steps = [] if sampler in ("dpm_adaptive", "rk45") else ["sampler.steps=3"]  # those find their own
    words = [PROMPTS, f"guidance={guidance}", f"sampler={sampler}", *steps]
    found = pixels(asked(place.outputs / "run", tmp_path / guidance, *words))
    assert found.shape == (4, 16, 16, 3) and found.std() > 0
    assert (found[0] != found[2]).any()


@pytest.mark.parametrize("edit", ["inpaint", "outpaint"])
def test_edits_keep_known_pixels_to_the_bit(place: Place, tmp_path: Path, edit: str) -> None:
    picture = place.outputs / "pictures" / "000.png"
    words = [f"edit={edit}", f"init={picture}", "prompt=a green square", *(["edit.box=[0,0,1,0.5]"] * (edit == "inpaint"))]
    found = pixels(asked(place.outputs / "run", tmp_path / "out", *words))
    original = np.asarray(Image.open(picture))
    if edit == "inpaint":
        assert (found[:, 8:] == original[8:]).all() and (found[:, :8] != original[:8]).any()
    with pytest.raises(ConfigError, match="works in latents"):
        asked(place.outputs / "run", tmp_path / "up", "edit=upscale", f"init={picture}", "prompt=a square")


def test_a_picture_as_a_start_is_encoded(place: Place, tmp_path: Path) -> None:
    """Not noised at all, what comes back is what the autoencoder makes of it."""
    picture = place.outputs / "pictures" / "005.png"
    found = pixels(asked(place.outputs / "run", tmp_path / "out", f"init={picture}", "strength=0.001", "sampler=euler"))
    codec = stages_of(find(place.outputs / "run")).codec
    x = torch.tensor(np.asarray(Image.open(picture))).permute(2, 0, 1)[None] / 127.5 - 1
    there_and_back = ((codec.decode(codec.encode(x)).clamp(-1, 1) + 1) * 127.5)[0].permute(1, 2, 0).numpy()
    assert np.abs(found[0] - there_and_back).mean() < 3


def test_pictures_take_prompts_in_turn(place: Place, tmp_path: Path) -> None:
    """Each is what its own prompt alone gives; those of a file are the same."""
    both = pixels(asked(place.outputs / "run", tmp_path / "both", PROMPTS))
    red = pixels(asked(place.outputs / "run", tmp_path / "red", "prompt=a red square"))
    blue = pixels(asked(place.outputs / "run", tmp_path / "blue", "prompt=a blue square"))
    assert np.abs(both[::2].astype(int) - red[::2]).max() <= 1 and np.abs(both[1::2].astype(int) - blue[1::2]).max() <= 1
    (tmp_path / "prompts.txt").write_text("a red square\n\na blue square\n")
    assert (pixels(asked(place.outputs / "run", tmp_path / "file", f"prompts={tmp_path / 'prompts.txt'}")) == both).all()
    facts = json.loads((tmp_path / "both" / "metadata.json").read_text())
    assert facts["prompt"] == ["a red square", "a blue square"]


def test_between_prompts_the_ends_are_theirs(place: Place, tmp_path: Path) -> None:
    found = pixels(asked(place.outputs / "run", tmp_path / "between", PROMPTS, "between=[0,0]", "sampler=heun"))
    red = pixels(asked(place.outputs / "run", tmp_path / "red", "prompt=a red square", "sampler=heun"))
    blue = pixels(asked(place.outputs / "run", tmp_path / "blue", "prompt=a blue square", "sampler=heun"))
    assert np.abs(found[0].astype(int) - red[0]).max() <= 1 and np.abs(found[3].astype(int) - blue[0]).max() <= 1


def test_guidance_leads_away_from_the_negative_prompt(place: Place) -> None:
    denoiser = load_denoiser(find(place.outputs / "run"), "raw")
    texts = stages_of(find(place.outputs / "run")).texts
    assert texts is not None
    told, away = texts.encode(["a red square"] * 2), texts.encode(["blue"])[0]
    x, t = torch.randn(2, 2, 8, 8), torch.tensor(0.7)
    got = CFG(3.0).guide(denoiser, denoiser.condition(told, away))(x, t, None)
    one, other = denoiser(x, t, told), denoiser(x, t, away.expand(2, -1, -1))
    assert (got - (other + 3 * (one - other))).abs().max() < 1e-5 and (one - other).abs().max() > 1e-6
    none = CFG(3.0).guide(denoiser, denoiser.condition(told))(x, t, None)
    empty = denoiser(x, t)
    assert (none - (empty + 3 * (one - empty))).abs().max() < 1e-5


MISTAKES = {
    ("label=1",): "reads texts: say what is wanted with prompt=",
    ("negative=blue", "prompt=red"): "add guidance=cfg",
    ("guidance=cfg",): "say which with prompt=",
    ("prompts=/none.txt",): "cannot be read",
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_mistakes_are_one_line(place: Place, tmp_path: Path, words: tuple[str, ...]) -> None:
    from diffusion_cli.errors import UserError

    with pytest.raises(UserError, match=MISTAKES[words]) as caught:
        asked(place.outputs / "run", tmp_path / "out", *words)
    assert "\n" not in str(caught.value)


def test_a_long_prompt_is_cut_and_told(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked(place.outputs / "run", tmp_path / "out", "prompt=a red square at the top left and then zebras and walruses and more")
    lines = [line for line in capsys.readouterr().out.splitlines() if "is cut" in line]
    assert len(lines) == 1 and "longer than 20 tokens" in lines[0] and lines[0].rstrip("'").endswith("more")


def test_pixels_alone_read_nothing(tmp_path: Path) -> None:
    run = train(tmp_path)
    with pytest.raises(ConfigError, match="trained without texts"):
        asked(run, tmp_path / "out", "prompt=three")
