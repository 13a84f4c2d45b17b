"""The command line: what is wrong is said in one line, with its key, value and the nearest right word, before torch."""

import json
import os
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffusion_cli import cli
from diffusion_cli.commands import evaluate, sample, train
from diffusion_cli.config import CONFIGS
from diffusion_cli.evaluation.words import OF_PICTURES, OF_SAMPLES

BIN = Path(sys.executable).parent
T, S = "train", "sample"
MALFORMED: list[tuple[str, str, str]] = [  # command, its words separated by spaces, what must be in the one line
    # typos of keys, groups and options
    (T, "trainer.stpes=5", "trainer.stpes is not a setting: did you mean trainer.steps?"),
    (T, "trainer.step=5", "did you mean trainer.steps?"),
    (T, "steps=5", "did you mean trainer.steps?"),
    (T, "lr=0.1", "did you mean optimizer.lr?"),
    (T, "model.widht=8", "did you mean model.width?"),
    (T, "modle=unet", "did you mean model?"),
    (T, "loss/wieght=one", "did you mean loss/weight?"),
    (T, "model=unett", "model=unett: there is no such option; did you mean unet?"),
    (T, "schedule=cosin", "did you mean cosine?"),
    (T, "loss/weight=onee", "loss/weight=onee: there is no such option; did you mean one?"),
    (T, "experiment=digit", "did you mean digits?"),
    (T, "sampler=zzz", "sampler=zzz: there is no such option; there is ddim"),
    (T, "sweep=foo", "sweep=foo: there is no such option"),
    (T, "a.b.c=3", "a.b.c is not a setting"),
    (T, "trainer.steps.x=3", "trainer.steps.x is not a setting"),
    (T, "schedule.beta_min=1", "schedule.beta_min is not a setting"),
    (T, "hydra.nothing=1", "hydra.nothing is not a setting"),
    # wrong types
    (T, "trainer.steps=abc", "trainer.steps is abc: it must be a whole number >= 1, or null"),
    (T, "trainer.steps=1.5", "trainer.steps is 1.5"),
    (T, "trainer.steps=true", "trainer.steps is true"),
    (T, "trainer.steps=[1]", "trainer.steps is [1]"),
    (T, "trainer.steps={a:1}", "trainer.steps is {'a': 1}"),
    (T, "trainer.batch=null", "trainer.batch is null"),
    (T, "optimizer.lr=fast", "optimizer.lr is fast: it must be a number > 0"),
    (T, "optimizer.lr=[1,2]", "optimizer.lr is [1, 2]"),
    (T, "optimizer.betas=[0.9]", "optimizer.betas is [0.9]: it must be a list of 2"),
    (T, "optimizer.betas=0.9", "optimizer.betas is 0.9"),
    (T, "dataset.labels=1", "dataset.labels is 1: it must be true or false"),
    (T, "outputs=null", "outputs is null"),
    (T, "trust=foo", "trust is foo: it must be a list"),
    (T, "trainer=5", "trainer is 5"),
    (T, "trainer=null", "trainer is null"),
    (T, "model=null", "model=null"),
    (T, "schedule=1", "schedule=1"),
    (T, "sampler.grid=karras", "sampler.grid is karras"),
    # ranges and words
    (T, "trainer.steps=-3", "trainer.steps is -3"),
    (T, "trainer.steps=0", "trainer.steps is 0"),
    (T, "seed=-1", "seed is -1: it must be a whole number >= 0"),
    (T, "objective.label_dropout=1.5", "it must be a number from 0 to 1"),
    (T, "trainer.minutes=0", "trainer.minutes is 0"),
    (T, "model.dropout=1", "model.dropout is 1: it must be a number from 0 to below 1"),
    (T, "ema.images=-1", "ema.images is -1"),
    (T, "precision=fp8", "precision is fp8: it must be one of auto, fp32, bf16, fp16"),
    (T, "resume=yes", "resume is yes"),
    (T, "compile=maybe", "compile is maybe: it must be true or false, or one of auto"),
    (T, "device=gpu", "device is gpu: it must be auto, cpu, cuda"),
    (T, "dataset.resize=stretch", "dataset.resize is stretch: it must be one of squeeze, crop, pad"),
    (T, "dataset.channels=2", "dataset.channels is 2: it must be one of 1, 3"),
    (T, "name=../x", "name is ../x"),
    (T, "name=/etc", "name is /etc"),
    # numbers that are none
    (T, "optimizer.lr=nan", "optimizer.lr is nan"),
    (T, "optimizer.lr=inf", "optimizer.lr is inf"),
    (T, "trainer.steps=nan", "trainer.steps is nan"),
    (T, "seed=1e400", "seed is inf"),
    # contradictions
    (T, "trainer.steps=null", "the run has no end"),
    (T, "trainer.batch_doublings=[9,9]", "trainer.batch_doublings is [9, 9]: 9 comes too soon, 128 pictures have been seen"),
    (T, "trainer.batch=10 trainer.accumulate=3", "trainer.batch is 10 and trainer.accumulate 3"),
    (T, "prediction=eps", "prediction=eps is impossible"),
    (T, "prediction=score schedule=zero_snr", "prediction=score is impossible"),
    (T, "sampler/grid=trailing sampler.steps=2000", "sampler.steps is 2000"),
    # what is missing
    (T, "dataset=folder", "dataset.path is missing: write dataset.path=..."),
    (T, "dataset=hub", "dataset.repo is missing"),
    (S, "", "say which checkpoint: ckpt=outputs/<name>"),
    # flags, + and ~
    (T, "--steps 5", "--steps: settings are written key=value, without dashes"),
    (T, "--trainer.steps=5", "--trainer.steps=5: settings are written key=value"),
    (T, "-steps=5", "without dashes"),
    (T, "+trainer.steps=5", "+trainer.steps=5: keys can be changed but not added or removed"),
    (T, "++foo=1", "++foo=1: keys can be changed but not added"),
    (T, "~trainer.steps", "~trainer.steps: keys can be changed but not added or removed"),
    (T, "~model", "~model: keys"),
    (T, "steps", "steps: settings are written key=value"),
    (T, "=5", "=5: settings are written key=value"),
    (T, "trainer.=5", "trainer.=5: the value cannot be read"),
    # sweeps without -m, quotes and brackets
    (T, "trainer.steps=1,2", "trainer.steps=1,2: several values make a sweep: add -m"),
    (T, "model=unet,dit", "model=unet,dit: several values make a sweep"),
    (T, "dataset.classes=[1,2", "dataset.classes=[1,2: the value cannot be read"),
    (T, 'name="a', 'name="a: the value cannot be read'),
    (T, "name='a", "name='a: the value cannot be read"),
    (T, "seed=${nothing}", "nothing"),
    (T, "name=${name}", "Recursive interpolation"),
    (T, "trainer.steps=${trainer.batch", "the value cannot be read"),
    # what may not be built
    (T, "model._target_=os.system", "model._target_ is os.system: only classes of diffusion_cli are built"),
    (T, "schedule._target_=diffusion_cli.models.UNet", "schedule._target_ is diffusion_cli.models.UNet: not a Schedule"),
    (T, "loss.norm._target_=torch.load", "loss.norm._target_ is torch.load"),
    # Hydra's own doors
    (T, "-cn other", "other"),
    (T, "--config-dir=/nonexistent seed=1", "/nonexistent"),
    (T, "hydra/launcher=none", "hydra/launcher=none: there is no such option"),
    # sweeps: every job is checked before the first begins
    (T, "-m schedule=cosine,vp prediction=eps,vv", "prediction=vv: there is no such option; did you mean v?"),
    (T, "-m optimizer.lrr=1,2", "optimizer.lrr is not a setting: did you mean optimizer.lr?"),
    (T, "-m optimizer.lr=1e-3,-1", "lr_-1: optimizer.lr is -1: it must be a number > 0"),
    (T, "-m trainer.steps=5,six", "steps_six: trainer.steps is six"),
    (T, "-m schedule=vp,flow prediction=eps", "schedule_flow: prediction=eps is impossible"),
    (T, "-m optimizer.lr=interval(1e-4,1e-2)", "optimizer.lr is a range, and a grid needs values"),
    (T, "-m optimizer.lr=interval(2,1) hydra/sweeper=random", "goes from 2 to 1"),
    (T, "-m seed=1,2 optimizer.lrr=interval(1,2) hydra/sweeper=optuna", "did you mean optimizer.lr?"),
    (T, "-m optimizer.lr=interval(-1,1) hydra/sweeper=optuna", "lr_-1.0: optimizer.lr is -1.0"),
    (T, "-m name=a,b", "name cannot be swept"),
    (T, "-m seed=1 device=cuda:1", "a sweep deals out the GPUs: device=auto and hydra.launcher.gpus=[1]"),
    (T, "-m seed=1,2 hydra.launcher.jbos=3", "hydra.launcher.jbos is not a setting: did you mean hydra.launcher.jobs?"),
    (T, "-m seed=1,2 hydra.launcher.jobs=0", "hydra.launcher.jobs is 0: it must be a whole number >= 1, or one of auto"),
    (T, "-m seed=1,2 hydra.launcher.gpus=2", "hydra.launcher.gpus is 2: it must be a list"),
    (T, "-m seed=1,2 hydra.sweeper.direction=up", "hydra.sweeper.direction is up: it must be one of minimize, maximize"),
    (T, "-m seed=1,2 hydra/sweeper=optuna hydra.sweeper.sampler=tpee", "hydra.sweeper.sampler is tpee: it must be one of tpe"),
    (T, "-m seed=1,2 hydra/sweeper=optuna hydra.sweeper.trials=null", "sampler=tpe has no end of its own"),
    (T, "-m seed=1,2 hydra/sweeper=optunaa", "hydra/sweeper=optunaa: there is no such option; did you mean optuna?"),
    (T, "sweep=search hydra.sweeper.params.seed=3", "without that prefix: seed=..."),
    (T, "-m seed=1,2 hydra/launcher=ray_nowhere", "hydra/launcher=ray_nowhere"),
    (T, "sweep=learning_rat", "did you mean learning_rate?"),
    # diffusion-sample
    (S, "ckpt=x n=0", "n is 0: it must be a whole number >= 1"),
    (S, "ckpt=x batch=many", "batch is many"),
    (S, "ckpt=x strength=2", "strength is 2: it must be a number from 0 to 1"),
    (S, "ckpt=x weights=average", "weights is average: it must be one of ema, raw"),
    (S, "ckpt=x format=jpg", "format is jpg: it must be one of png, npz"),
    (S, "ckpt=x sampler=huen", "did you mean heun?"),
    (S, "ckpt=x sampler.steps=0", "sampler.steps is 0"),
    (S, "ckpt=x label=[1.5]", "label is [1.5]"),
    (S, "ckpt=x wieghts=raw", "did you mean weights?"),
    (S, "ckpt=x schedule=cosine", "schedule is not a setting"),
    (S, "ckpt=x sampler._target_=os.system sampler.grid=1", "sampler"),
]
LOOP = """
import contextlib, io, json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "datasets", "safetensors", "matplotlib", "tensorboard"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
from diffusion_cli.commands import evaluate, sample, train
for command, line in json.load(sys.stdin):
    sys.argv = [f"diffusion-{command}", *line.split()]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            {"train": train, "sample": sample}[command].main()
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            code = repr(error)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Any, str, str]]:
    """All of them, in one process that cannot import torch."""
    asked = [(command, line) for command, line, _ in MALFORMED]
    folder = tmp_path_factory.mktemp("here")
    done = subprocess.run([sys.executable, "-c", LOOP], input=json.dumps(asked), capture_output=True, text=True, cwd=folder)
    assert not done.returncode, done.stderr
    assert not list(folder.iterdir()), "nothing is written for a line that is wrong"
    return {key: tuple(json.loads(line)) for key, line in zip(asked, done.stdout.splitlines(), strict=True)}


@pytest.mark.parametrize(("command", "line", "said"), MALFORMED, ids=[f"{c} {line}" for c, line, _ in MALFORMED])
def test_a_wrong_line_is_refused_in_one(
    command: str, line: str, said: str, answers: dict[tuple[str, str], tuple[Any, str, str]]
) -> None:
    code, out, err = answers[command, line]
    assert (code, out) == (64, ""), (code, out, err)
    assert said in err and err.startswith(f"diffusion-{command}: ")
    assert len(err.splitlines()) <= 4 and "Traceback" not in err and "HYDRA_FULL_ERROR" not in err and "+" + line not in err


def test_most_are_refused_in_one_line(answers: dict[tuple[str, str], tuple[Any, str, str]]) -> None:
    long = [key for key, (_, _, err) in answers.items() if len(err.splitlines()) > 1]
    assert len(answers) >= 80 and len(long) <= 2, long


# -- close matches -----------------------------------------------------------------------------------------------------


@cache
def known() -> list[str]:
    return cli._keys("train", [], "")


def edited(word: str, times: int, rng: random.Random) -> str:
    for _ in range(times):
        at = rng.randrange(len(word))
        letter = rng.choice("abcdefghijklmnopqrstuvwxyz_")
        word = rng.choice([
            word[:at] + word[at + 1 :], word[:at] + letter + word[at:], word[:at] + letter + word[at + 1 :],
            word[: max(at - 1, 0)] + word[max(at - 1, 0) : at + 1][::-1] + word[at + 1 :],
        ])  # fmt: skip
    return word


@pytest.mark.parametrize("edits", [1, 2])
def test_typos_of_every_key_find_it(edits: int) -> None:
    """The last word of each key misspelt, five times each; two mistakes only in words of five letters and more."""
    rng, wrong, tried = random.Random(0), [], 0
    for name in known():
        head, dot, leaf = name.rpartition("." if "." in name else "/")
        if leaf == "_target_" or len(leaf) < (3 if edits == 1 else 5):
            continue
        for _ in range(5):
            typo = head + dot + edited(leaf, edits, rng)
            if typo in known() or typo.endswith((".", "/")):
                continue
            tried += 1
            answer = cli._closest(typo, known())
            if answer != f"did you mean {name}?":
                wrong.append((typo, answer))
    print(f"of {tried} keys with {edits} typos {100 * (1 - len(wrong) / tried):.1f} % find theirs")
    assert tried > 300 and len(wrong) <= 0.05 * tried, (len(wrong), tried, wrong)


def test_typos_of_options_find_them() -> None:
    from diffusion_cli.signatures import did_you_mean

    rng, wrong, tried = random.Random(0), [], 0
    for folder in [path for path in CONFIGS.rglob("*") if path.is_dir()]:
        options = [path.stem for path in folder.glob("*.yaml")]
        for option in [option for option in options if len(option) > 3]:
            for _ in range(5):
                typo = edited(option, 1, rng)
                if typo not in options:
                    tried += 1
                    wrong += [(typo, option)] * (did_you_mean(typo, options) != f"did you mean {option}?")
    print(f"of {tried} options with a typo {100 * (1 - len(wrong) / tried):.1f} % find theirs")
    assert tried > 100 and len(wrong) <= 0.05 * tried, wrong


# -- the installed commands --------------------------------------------------------------------------------------------


def command(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / words[0], *words[1:]], capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}
    )


def help_of(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", [f"diffusion-{name}", *(words or ("--help",))])
    {"train": train, "sample": sample, "evaluate": evaluate}[name].main()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "settled"),
    [
        ("-m guidance=apg,cfg guidance.scale=4", "-m guidance=apg,cfg guidance.scale=choice(4)"),
        ("-m guidance=apg,cfg guidance.interval=[0.3,3]", "-m guidance=apg,cfg guidance.interval=choice([0.3,3])"),
        ("-m guidance=apg,cfg guidance.scale=2,4 n=5", "-m guidance=apg,cfg guidance.scale=2,4 n=5"),
        ("-m sampler/grid=own,beta sampler.grid.a=1 n=4", "-m sampler/grid=own,beta sampler.grid.a=choice(1) n=4"),
        ("-m trainer.steps=1,2 trainer.batch=8", "-m trainer.steps=1,2 trainer.batch=8"),
    ],
)  # fmt: skip
def test_keys_of_a_swept_group_wait_for_it(line: str, settled: str) -> None:
    assert cli._settled(line.split()) == settled.split()


def test_help_comes_before_torch(tmp_path: Path) -> None:
    for name in ("train", "sample", "evaluate"):
        code = (
            f"import sys; sys.argv = ['diffusion-{name}', '--help']; from diffusion_cli.commands.{name} import main; main(); "
            "assert not {'torch', 'hydra', 'datasets'} & sys.modules.keys(), 'imported'"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert command(f"diffusion-{name}", "-h", cwd=tmp_path).stdout == done.stdout
    assert not list(tmp_path.iterdir())


def test_help_names_every_option_and_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    page = help_of("train", capsys, monkeypatch)
    for group in train.GROUPS:
        section = page[page.index(f"\n{group}=") :]
        for path in (CONFIGS / group).rglob("*.yaml"):
            part = "" if path.parent.name == Path(group).name else f"{path.parent.name}: "
            comment = next(line for line in path.read_text().splitlines() if line.startswith("# ") and "@package" not in line)
            assert re.search(rf"^  {part}{path.stem} +{re.escape(comment[2:].split()[0])}", section, re.M), path
    folders = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    assert folders == {Path(group).parts[0] for group in (*train.GROUPS, *sample.GROUPS)}, "a group that --help does not know"
    for key in cli.settings.flat(
        {k: v for k, v in yaml.safe_load((CONFIGS / "train.yaml").read_text()).items() if k not in ("defaults", "hydra")}
    ):
        assert re.search(rf"^  {re.escape(key)}=\S* +\S", page, re.M) or key == "trainer", key
    for line, meaning in train.EXAMPLES:
        assert f"{line} " in page and meaning in page
    assert max(map(len, page.splitlines())) <= 128


def test_sample_help_names_every_sampler_and_setting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = help_of("sample", capsys, monkeypatch)
    for path in (CONFIGS / "sampler").rglob("*.yaml"):
        assert path.stem in page
    for key in ("ckpt", "n", "seed", "strength", "trajectory", "sampler.steps"):
        assert re.search(rf"^  {re.escape(key)}=", page, re.M)


def test_evaluate_help_names_every_metric_and_feature(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = help_of("evaluate", capsys, monkeypatch)
    for word in (*OF_PICTURES, *OF_SAMPLES, *(path.stem for path in (CONFIGS / "features").glob("*.yaml"))):
        assert re.search(rf"\b{word}\b", page), word
    for key in ("ckpt", "n", "repeats", "split", "sampler.steps"):
        assert re.search(rf"^  {re.escape(key)}=", page, re.M)
    assert max(map(len, page.splitlines())) <= 128


@pytest.mark.parametrize("words", [["--help", "model=unet"], ["model=unett", "--help"], ["-h"]])
def test_help_wins_over_everything(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "COMMANDS TO COPY" in help_of("train", capsys, monkeypatch, *words)


def test_cfg_job_shows_what_would_run(tmp_path: Path) -> None:
    done = command("diffusion-train", "--cfg", "job", "schedule=cosine", "prediction=v", "trainer.steps=7", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    shown = yaml.safe_load(done.stdout)
    assert (
        shown["schedule"]["curve"] == "cosine"
        and shown["trainer"]["steps"] == 7
        and shown["prediction"]["_target_"].endswith(".V")
    )
    assert not list(tmp_path.iterdir()), "and runs nothing"


def test_an_error_of_the_installed_command(tmp_path: Path) -> None:
    done = command("diffusion-train", "trainer.stpes=5", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr == "diffusion-train: trainer.stpes is not a setting: did you mean trainer.steps?\n"
    done = command("diffusion-sample", "ckpt=nothing", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr == "diffusion-sample: ckpt=nothing does not exist: train it first\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("line", "expected"), [("diffusion-train schedule=", {"schedule=cosine", "schedule=flow"}),
                                                ("diffusion-train loss/ti", {"loss/times="}),
                                                ("diffusion-train trainer.st", {"trainer.steps="})])  # fmt: skip
def test_tab_completes(line: str, expected: set[str], tmp_path: Path) -> None:
    done = command("diffusion-train", "-sc", "query=bash", cwd=tmp_path, COMP_LINE=line, COMP_POINT=str(len(line)))
    assert done.returncode == 0 and expected <= set(done.stdout.split()), (done.stdout, done.stderr)


def test_completion_installs(tmp_path: Path) -> None:
    done = command("diffusion-train", "-sc", "install=bash", cwd=tmp_path)
    assert done.returncode == 0 and "complete" in done.stdout and "diffusion-train" in done.stdout


def test_train_then_sample_as_a_user_would(tmp_path: Path) -> None:
    """The first two commands of the README, small, with the default name and folder."""
    small = [
        "dataset.limit=40",
        "trainer.steps=2",
        "trainer.batch=8",
        "sampler.steps=2",
        "trainer.preview=4",
        "model.width=8",
        "model.groups=4",
    ]
    done = command("diffusion-train", *small, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "and try   diffusion-sample ckpt=outputs/digits n=64 seed=1" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"] and [p.name for p in (tmp_path / "outputs").iterdir()] == [
        "digits"
    ]
    done = command("diffusion-sample", "ckpt=outputs/digits", "n=2", "seed=1", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    shown = re.search(r"look at (\S+grid\.png)", done.stdout)
    assert shown and (tmp_path / shown[1]).exists()


# -- parts -------------------------------------------------------------------------------------------------------------


def test_overrides_are_told_from_flags() -> None:
    assert cli.overrides(["-m", "a=1", "--cfg", "job", "-cd", "folder", "b=2", "--config-dir=x", "--resolve"]) == ["a=1", "b=2"]
    assert cli.is_multirun(["a=1", "-m"]) and cli.is_multirun(["--multirun"]) and not cli.is_multirun(["m=1"])


def test_flags_may_stand_anywhere() -> None:
    asked = ["seed=1,2", "-m", "name=x", "--config-dir", "folder", "trainer.steps=5"]
    flags_first = ["-m", "--config-dir", "folder", "seed=1,2", "name=x", "trainer.steps=5"]
    assert cli._checked(asked, "diffusion-train", "train") == flags_first


@given(st.lists(st.tuples(st.sampled_from(["seed", "a.b", "loss/times"]), st.text(max_size=80)), max_size=5))
def test_folder_names_are_safe(pairs: list[tuple[str, str]]) -> None:
    name = cli.folder_name([f"{key}={value}" for key, value in pairs])
    assert re.fullmatch(r"[\w.+-]*", name) and len(name) <= 120


def test_a_path_is_said_as_it_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.path_in_words(tmp_path / "outputs" / "x") == "outputs/x"
    assert cli.path_in_words(Path("/elsewhere")) == "/elsewhere"


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(f"{BIN}/diffusion-train --help | head -1", shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == "" and done.stdout.startswith("diffusion-train")


@pytest.mark.parametrize(
    "text", ['a "b", {c}=d\\e', "plain", "it's", "end\\", 'x\\"y', "ünï, (c) [d]:", "a=b", "  spaced ", "5"]
)
def test_a_prompt_may_hold_any_sign(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from diffusion_cli.commands.sample import with_texts

    for word in ("prompt", "negative"):
        (quoted,) = with_texts([f"{word}={text}"])
        assert OverridesParser.create().parse_override(quoted).value() == text
    lists = ["prompt=[a,b]", 'prompt="a"', "prompt='a'", "prompt=null", "n=5"]
    assert with_texts(lists) == lists and with_texts(["-m", "prompt=a,b"]) == ["-m", "prompt=a,b"]
