"""Every experiment and sweep composes to what its file says, word for word."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from tiny import compose, train
from torch import Tensor

from diffusion_cli import config
from diffusion_cli.assembly import Facts, Stages, autoencoder_of, rehearse
from diffusion_cli.conditioning import Conditioner
from diffusion_cli.conditioning.tokenizer import Tokens
from diffusion_cli.config import CONFIGS
from diffusion_cli.objectives import Objective
from diffusion_cli.settings import flat
from diffusion_cli.sweeps import space

EXPERIMENTS = sorted((CONFIGS / "experiment").glob("*.yaml"))
SWEEPS = sorted((CONFIGS / "sweep").glob("*.yaml"))
names = lambda path: path.stem  # noqa: E731


def run_of(file: Path) -> dict[str, Any]:
    """The experiment as its user gives it: with the path of the data, or the run that it learns from, where it needs one."""
    node = compose(f"experiment={file.stem}")
    path = ["dataset.path=DIR"] if node["dataset"].get("path") == "???" else []
    learns = "teacher" in (node["objective"].get("method") or {})
    return compose(f"experiment={file.stem}", *path, *(["init=RUN"] if learns else []))


def composed(*words: str) -> Any:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("train", list(words), return_hydra_config=True)


def stated(file: Path, node: dict[str, Any]) -> dict[str, Any]:
    """{key: value} of what a file says, references resolved in the composed config."""
    said = OmegaConf.load(file)
    defaults = said.pop("defaults", [])
    assert all(isinstance(entry, str) or len(entry) == 1 for entry in defaults)
    whole = OmegaConf.create(node)
    found = flat(OmegaConf.to_container(said, resolve=False))
    for key, value in found.items():
        reference = re.fullmatch(r"\$\{([\w.]+)\}(.*)", str(value))
        referred = reference and OmegaConf.select(whole, reference[1])
        found[key] = (f"{referred}{reference[2]}" if reference[2] else referred) if reference else value
    return found


@pytest.mark.parametrize("file", EXPERIMENTS, ids=names)
def test_every_value_that_it_states_is_the_value_composed(file: Path) -> None:
    node = compose(f"experiment={file.stem}")
    actual = flat(node)
    for key, value in stated(file, node).items():
        assert actual[key] == value and type(actual[key]) is type(value), key


@pytest.mark.parametrize("file", EXPERIMENTS, ids=names)
def test_every_choice_that_it_states_is_made(file: Path) -> None:
    choices = composed(f"experiment={file.stem}").hydra.runtime.choices
    wanted = {next(iter(entry)): entry[next(iter(entry))] for entry in OmegaConf.load(file).get("defaults", [])}
    assert wanted
    for slot, option in wanted.items():
        assert choices[slot.removeprefix("override /")] == option, slot


@pytest.mark.parametrize("file", EXPERIMENTS, ids=names)
def test_it_can_be_run(file: Path) -> None:
    """Checked clean, and every constructor takes its values (without memory); the frozen parts are those that it asks for."""
    node = config.check_train(run_of(file)).node
    assert isinstance(rehearse(node, stages=stages_for(node)), Objective)


def stages_for(node: dict[str, Any]) -> Stages:
    stages = Stages()
    if node.get("codec") is not None:
        own = compose(f"experiment={Path(node['codec']['ckpt']).name}", "dataset.path=DIR")
        sizes = Facts(channels=3, image_size=own["dataset"]["size"], classes=[], taught=[], fingerprint="")
        stages = replace(stages, codec=autoencoder_of(own, sizes))
        stages.codec.digest = "of a run"
    return stages if node.get("texts") is None else replace(stages, texts=Words())


class Words(Conditioner):
    width, length, digest = 128, 77, "of a run"

    def tokenised(self, texts: Sequence[str]) -> Tokens:
        raise NotImplementedError

    def read(self, tokens: Tokens) -> Tensor:
        raise NotImplementedError

    def words_as_json(self) -> bytes:
        raise NotImplementedError


PUBLISHED = [
    "ddpm",
    "improved_ddpm",
    "score_sde_vp",
    "score_sde_ve",
    "edm",
    "edm_uncond",
    "edm_ncsnpp",
    "flow_matching",
    "ot_cfm",
]


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_published_recipe_makes_two_steps(recipe: str, tmp_path: Path) -> None:
    """As it is, but for the bundled digits and a network of their size."""
    labels = compose(f"experiment=cifar10_{recipe}")["dataset"]["labels"]
    run = train(
        tmp_path, f"experiment=cifar10_{recipe}", "dataset=digits", f"dataset.labels={str(labels).lower()}", "model.blocks=1",
        "model.attention_levels=[0]", *(["model.head_width=8"] if recipe in ("improved_ddpm", "ot_cfm") else []),
        "trainer.images=null", "trainer.steps=2", "trainer.batch=8", "sampler.steps=2",
    )  # fmt: skip
    assert (run / "checkpoints" / "step_00000002").is_dir()


@pytest.mark.parametrize("file", EXPERIMENTS, ids=names)
def test_its_header_says_what_it_is(file: Path) -> None:
    lines = file.read_text().splitlines()
    header = lines[1 : next(i for i, line in enumerate(lines) if line.startswith("defaults:"))]
    assert lines[0] == "# @package _global_"
    assert len(header) >= 4 and all(line.startswith("#") for line in header), "what for, on what hardware, by which command"
    assert len(header[0]) > 20 and re.search("# (After|For): ", "\n".join(header))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=names)
def test_commands_in_its_header_compose(file: Path) -> None:
    """What stands there to be copied is right."""
    for command in re.findall(r"^# +(diffusion-(?:train|sample) .*?)(?:  +.*)?$", file.read_text(), re.M):
        program, *words = shlex.split(command)
        words = [word for word in words if not word.startswith("-")]
        if program == "diffusion-sample":
            config.check_sample(compose(*words, primary="sample"))
            assert next(word for word in words if word.startswith("ckpt=")).endswith(file.stem)
            continue
        swept = next((word for word in words if "," in word), None)
        for value in swept.partition("=")[2].split(",") if swept else [None]:
            here = [f"{swept.partition('=')[0]}={value}" if word == swept and swept else word for word in words]
            node = config.check_train(compose(*here)).node
            rehearse(node, stages=stages_for(node))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=names)
def test_the_command_line_wins_over_it(file: Path) -> None:
    node = compose(f"experiment={file.stem}", "trainer.batch=6", "optimizer.lr=0.5", "loss/weight=min_snr", "sampler.steps=3")
    assert (node["trainer"]["batch"], node["optimizer"]["lr"], node["sampler"]["steps"]) == (6, 0.5, 3)
    assert node["loss"]["weight"]["_target_"].endswith("MinSNR")


def test_digits_is_the_default() -> None:
    default, digits = compose(), compose("experiment=digits")
    for node in (default, digits):
        node.pop("experiment", None)
    assert digits == default


@pytest.mark.parametrize("file", SWEEPS, ids=names)
def test_every_run_of_a_sweep_is_possible(file: Path) -> None:
    found = composed(f"sweep={file.stem}")
    assert str(found.hydra.mode).endswith("MULTIRUN")
    said = config.plain(found.hydra.sweeper)
    cases = space.read_cases(said["cases"])
    _, varied = space.parse(said["params"], [])
    assert len(varied) >= 1 and all(len(choices.values) > 1 for choices in varied.values())
    given = [tuple(f"{key}={value}" for key, value in values.items()) for values in space.corners(varied)]
    for words in [*given, *cases.values()]:
        rehearse(config.check_train(compose(f"sweep={file.stem}", *words)).node)


@pytest.mark.parametrize("file", SWEEPS, ids=names)
def test_a_sweep_chooses_its_sweeper(file: Path) -> None:
    """Also where the file overrides it: the defaults of train.yaml do not win."""
    said = [entry for entry in OmegaConf.load(file).get("defaults", []) if "override /hydra/sweeper" in entry]
    wanted = said[0]["override /hydra/sweeper"] if said else "grid"
    choices = composed(f"sweep={file.stem}").hydra.runtime.choices
    assert (choices["hydra/sweeper"], choices["hydra/launcher"]) == (wanted, "processes")
    assert composed(f"sweep={file.stem}", "hydra/sweeper=random").hydra.runtime.choices["hydra/sweeper"] == "random"
