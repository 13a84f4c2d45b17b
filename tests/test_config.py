"""Every option of every group composes, is checked clean, has exactly its constructor's keys, builds, and trains two steps."""

import copy
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import SMALL, SMALL_NETWORK, changed, compose

from diffusion_cli import config, pairs
from diffusion_cli.assembly import PARTS, Facts, Stages, adapt, objective_of, reads_texts, rehearse
from diffusion_cli.build import build
from diffusion_cli.conditioning import learned
from diffusion_cli.config import CONFIGS, SAMPLE_GROUPS, TRAIN_GROUPS
from diffusion_cli.data import Batches, Dataset, Pictures
from diffusion_cli.devices import Compute
from diffusion_cli.ema import EMA
from diffusion_cli.errors import ConfigError
from diffusion_cli.optimizers import Optimizer
from diffusion_cli.randomness import Source
from diffusion_cli.settings import Plan, frozen_changes
from diffusion_cli.signatures import signature
from diffusion_cli.stages import opened
from diffusion_cli.trainer import Trainer

FILES = sorted(CONFIGS.rglob("*.yaml"))
OPTIONS = [  # (group, option): ("loss/times", "uniform")
    (file.parent.relative_to(CONFIGS).as_posix(), file.stem)
    for file in FILES
    if file.parent != CONFIGS and file.relative_to(CONFIGS).parts[0] not in ("experiment", "sweep", "hydra")
]
ASKED_ONLY = set(SAMPLE_GROUPS) - set(TRAIN_GROUPS)  # groups of diffusion-sample alone
_TINY_TRANSFORMER = ("model.width=16", "model.depth=1", "model.heads=2")
_TINY_DDPMPP = ("model.width=8", "model.groups=4", "model.blocks=1", "model.multipliers=[1,2]")
_TINY_EDM2 = ("model.width=8", "model.blocks=1", "model.multipliers=[1,2]", "model.head_width=8")
TINY_MODELS = {
    **dict.fromkeys(("ddpmpp", "ncsnpp"), _TINY_DDPMPP),
    **dict.fromkeys(("edm2", "edm2_small"), _TINY_EDM2),
    **dict.fromkeys(("dit", "uvit", "transformer", "transformer_small"), _TINY_TRANSFORMER),
    "unet_basic": ("model.widths=[8,8]", "model.kernel_size=3"),
    "unet_gated": ("model.width=8", "model.levels=2", "model.time_width=8", "model.bottom_width=8", "model.bottom_channels=4"),
}
TINY_CLASSIFIER = (
    "model.width=8",
    "model.groups=4",
    "model.multipliers=[1]",
    "model.attention_levels=[]",
    "model.head_width=8",
)
TINY_AUTOENCODER = ("model.widths=[8,8]", "model.groups=4")
TINY_CLIP = (
    "model.width=8", "model.depth=1", "model.heads=1", "model.text_width=8", "model.text_depth=1", "model.text_heads=1",
    "model.embedding=4", "model.patch=4", "objective.vocabulary=260",
)  # fmt: skip
READERS = {  # tests/test_text_networks.py, test_export_texts.py
    "mmdit": "model: MMDiT reads texts, and none were chosen: .* choose model=dit",
    "unet2d_condition": "model: UNet2DCondition reads texts, and no labels: give an option of the group texts",
}
TAUGHT = ("progressive", "reflow")
SECOND = {"auto", "classifier"}  # guidance that asks a second model, which training has not
TINY_UNET = ("model.width=8", "model.groups=4", "model.blocks=1", "model.multipliers=[1,1,1,1]", "model.head_width=8")
MISSING = {"folder": ("dataset.path=somewhere",), "parquet": ("dataset.path=somewhere",), "hub": ("dataset.repo=some/where",)}


def asked_only(group: str) -> bool:
    return group.partition("/")[0] in ASKED_ONLY


def words_of(group: str, option: str) -> list[str]:
    """The default command line but for one choice, and what that choice cannot do without."""
    words = [f"{group}={option}"]
    if group == "prediction":
        words += ["schedule=vp", "sampler/grid=uniform"]
    if group == "model" and option in ("ncsnpp", "edm2", "edm2_small"):
        words += ["prediction=edm"]  # random waves of log(sigma)/4
    if group == "adapter":
        words += ["init=somewhere"]
    if option == "hybrid":
        words += ["schedule=ddpm", "prediction=eps", "loss=ddpm"]  # a table of steps
    if option == "fsdp":
        words += ["distributed.processes=2"]
    if option in TAUGHT:
        words += ["objective.method.teacher=missing-run"]
    if group == "dataset":
        words += MISSING.get(option, ())
    if (group, option) == ("sampler/grid", "listed"):
        words += ["sampler.grid.at=[1,0.5]", "sampler.steps=2"]
    if (group, option) in (("objective", "contrasting"), ("model", "clip")):
        words = ["objective=contrasting", "model=clip"]
    if (group, option) in (("objective", "classifying"), ("model", "classifier")):
        words = ["objective=classifying", "model=classifier"]
    if group == "model" and option.startswith("autoencoder"):
        words = ["objective=autoencoding", f"model={option}"]
    if option == "autoencoding" or group in ("objective/critic", "perceptual"):
        words = ["objective=autoencoding", "model=autoencoder_kl", *(words if option != "autoencoding" else [])]
    return words


@cache
def digits() -> tuple[Dataset, Pictures]:
    dataset = build(compose(*SMALL)["dataset"], Dataset, "dataset")
    pictures = dataset.load("train")
    assert pictures is not None
    return dataset, pictures


def two_steps(plan: Plan) -> list[torch.Tensor]:
    """Two updates of a freshly built trainer; the weights before, between and after."""
    _, pictures = digits()
    taught = list(range(10)) if plan.node["dataset"]["labels"] else []
    facts = Facts(channels=1, image_size=8, classes=list(pictures.classes), taught=taught, fingerprint="")
    if reads_texts(plan.node["objective"]):
        assert pictures.labels is not None
        texts = tuple(f"the digit {label}" for label in pictures.labels.tolist())
        pictures, facts["tokenizer"] = replace(pictures, texts=texts), learned(texts, plan.node["objective"]["vocabulary"])
    objective = objective_of(plan.node, facts)
    adapt(objective, plan.node)
    optimizer, average = build(plan.node["optimizer"], Optimizer, "optimizer"), build(plan.node["ema"], EMA, "ema")
    batches = Batches(pictures, plan.trainer.pace, plan.root.seed, flip=True)
    compute = Compute(torch.device("cpu"), None, False)
    trainer = Trainer(objective, batches, None, optimizer, average, None, plan.trainer, compute, 0, {})  # type: ignore[arg-type]
    flat = lambda: torch.cat([p.detach().flatten().clone() for p in objective.parameters()])  # noqa: E731
    seen, source = [flat()], batches.starting_at(0)
    for _ in range(2):
        trainer.step(next(source))
        seen.append(flat())
    assert math.isfinite(float(trainer.progress.tallies["loss"].sums))
    images = trainer.shadow.preview(trainer.batches.pictures, Source(0, torch.arange(plan.trainer.preview)))
    assert objective.shown in images
    return seen


def option_at(node: dict[str, Any], group: str) -> dict[str, Any]:
    for part in group.split("/"):
        node = node[part]
    return node


def objects(node: dict[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    found = [(path, node)] if "_target_" in node else []
    for key, value in node.items():
        found += objects(value, f"{path}.{key}".strip(".")) if isinstance(value, dict) else []
    return found


def test_the_groups_are_there() -> None:
    groups = {group for group, _ in OPTIONS}
    assert (
        set(TRAIN_GROUPS) <= groups and {"loss/times", "loss/norm", "loss/weight", "optimizer/decay", "sampler/grid"} <= groups
    )
    assert len(OPTIONS) > 65


@pytest.mark.parametrize(("group", "option"), [o for o in OPTIONS if not asked_only(o[0])], ids=lambda part: part)
def test_option(group: str, option: str) -> None:
    """Composed, checked, its keys its constructor's, rehearsed at its own size, trained two steps at a tiny one."""
    words = words_of(group, option)
    place = {"latents": ["codec.ckpt=missing-run"], "clip": ["texts.ckpt=missing-run"], "encoder": ["texts.name=missing-run"],
             "classifier": ["perceptual.ckpt=missing-run"]}  # fmt: skip
    words = [*words, "dataset.labels=false", *place[option]] if group in config.STAGES else words
    node = compose(*words)
    plan = config.check_train(node)
    given = TRAIN_GROUPS.get(group, ("", ()))[1]
    given = config.MODELS[option][1] if option == "clip" else given  # whose text_width is its own
    for path, part in objects(option_at(node, group)):
        expected = set(signature(part["_target_"]).parameters) - set(given if not path else ())
        assert set(part) - {"_target_"} == expected, f"{group}/{option}.yaml {path}"
    if group in config.STAGES or option in TAUGHT:  # of a run that is not there; test_text_to_image, test_few_steps have one
        with pytest.raises(ConfigError, match="missing-run"):
            opened(plan.node, Path("nowhere"))
        return
    if group == "guidance" and option in SECOND:
        with pytest.raises(ConfigError, match="guidance"):
            rehearse(plan.node)
        return
    if option in READERS:
        with pytest.raises(ConfigError, match=READERS[option]):
            rehearse(plan.node)
        return
    rehearse(config.check_train(changed(node, "dataset.size=32", "dataset.channels=3")).node)
    if group == "dataset":
        assert isinstance(build(plan.node["dataset"], Dataset, "dataset"), Dataset)
        return
    model = TINY_MODELS.get(option, TINY_UNET) if group == "model" else TINY_UNET
    shrunk = model if group == "model" else (*model, "model.multipliers=[1]")
    shrunk = TINY_CLASSIFIER if "classifying" in words[0] else shrunk
    shrunk = TINY_AUTOENCODER if "autoencoding" in words[0] else shrunk
    shrunk = TINY_CLIP if "contrasting" in words[0] else shrunk
    shrunk = (*shrunk, "dataset.labels=true") if group == "guidance" or "classifying" in words[0] else shrunk
    shrunk = (*shrunk, "sampler.steps=200") if option == "dpm_adaptive" else shrunk  # a limit, there, and 2 are too few
    before, between, after = two_steps(config.check_train(changed(node, *SMALL, *shrunk)))
    assert torch.isfinite(after).all()
    assert not torch.equal(before, between) and not torch.equal(between, after), "the weights do not move"


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "schedule"])
def test_shifted_takes_every_schedule(option: str) -> None:
    if option == "shifted":
        return
    node = compose("schedule=shifted", f"schedule@schedule.base={option}")
    assert node["schedule"]["base"] == compose(f"schedule={option}")["schedule"] and node["schedule"]["factor"] == 3.0
    config.check_train(node)


@pytest.mark.parametrize(
    ("group", "option"), [o for o in OPTIONS if asked_only(o[0]) or o[0] == "guidance"], ids=lambda part: part
)
def test_sample_takes_every_option(group: str, option: str) -> None:
    """Its keys are its constructor's."""
    words = [f"{group}={option}", *(["init=a.png"] if group.startswith("edit") else [])]
    words += {"edit/method": ["edit=inpaint", "edit.mask=b.png"], "edit": []}.get(group, [])
    words += ["edit.mask=b.png"] if option == "inpaint" else []
    asked = getattr(config.check_sample(compose("ckpt=somewhere", *words, primary="sample")), group.partition("/")[0])
    for path, part in objects(asked):
        given = () if path else config.GIVEN.get(group.partition("/")[0], ())
        expected = set(signature(part["_target_"]).parameters) - set(given)
        assert set(part) - {"_target_"} == expected, f"{group}/{option}.yaml {path}"


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "sampler"])
def test_sample_takes_every_sampler(option: str) -> None:
    asked = config.check_sample(compose("ckpt=somewhere", f"sampler={option}", primary="sample"))
    assert asked.root.ckpt == "somewhere" and asked.sampler["steps"] is not None
    alone = config.check_sample(compose("ckpt=somewhere", "sampler.steps=7", primary="sample"))
    assert alone.sampler == {"steps": 7}


@pytest.mark.parametrize("option", [file.stem for file in (CONFIGS / "sampler" / "grid").glob("*.yaml")])
def test_sample_takes_every_grid(option: str) -> None:
    asked = config.check_sample(compose("ckpt=x", "sampler=heun", f"sampler/grid={option}", primary="sample"))
    assert asked.sampler["grid"] == compose(f"sampler/grid={option}")["sampler"]["grid"]


def test_steps_given_to_a_named_sampler_win() -> None:
    """sample.yaml says sampler.steps null: null must not overwrite what the sampler's own file says, and a word must."""
    for option, own in (("heun", 18), ("ddim", 50)):
        node = compose("ckpt=x", f"sampler={option}", primary="sample")
        assert config.check_sample(node).sampler["steps"] == own
        node = compose("ckpt=x", f"sampler={option}", "sampler.steps=3", primary="sample")
        assert config.check_sample(node).sampler["steps"] == 3


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(CONFIGS).as_posix())
def test_file_keeps_the_house_rules(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert re.match(r"# \S", text), "the first line says what it is: --help shows it"
    assert "${hydra:" not in text
    missing = {line.split(":")[0].strip() for line in text.splitlines() if re.search(r":\s*\?\?\?", line)}
    assert missing <= {"path", "ckpt", "repo", "runs", "name", "teacher"}
    defaults = (yaml.safe_load(text) or {}).get("defaults", [])
    if file.parent == CONFIGS:
        assert defaults[0] == "_self_", "or the file silently beats every group and experiment"
    elif "_self_" in defaults:
        after = defaults[defaults.index("_self_") + 1 :]  # groups that its own values say are null until one is chosen
        assert all(set(part.values()) == {None} for part in after), "a file's own values win over the file that it is made of"


@pytest.mark.parametrize("number", ["3e-4", "1e-8", "1.0e-6"])
def test_exponents_are_numbers(number: str) -> None:
    """YAML 1.1 reads 3e-4 as text; OmegaConf does not."""
    assert compose(f"optimizer.lr={number}")["optimizer"]["lr"] == float(number)
    assert isinstance(compose()["optimizer"]["eps"], float)


def test_the_parts_of_an_objective_are_those_that_the_config_knows() -> None:
    """config.py says their names before torch is there, assembly.py makes them, or has them given."""
    assert (*PARTS, *Stages.NAMES, "teacher") == config.PARTS


PAIRS = [
    (("objective=classifying",), "not a Classifier; model=classifier goes with objective=classifying"),
    (("objective=autoencoding",), "not a Autoencoder; "),
    (("model=autoencoder_kl",), "not a Network; .* autoencoder_kl and autoencoder_vq with objective=autoencoding"),
    (("model=clip",), "not a Network; .*model=clip with objective=contrasting"),
    (("objective=contrasting",), "not a Clip; .*model=clip with objective=contrasting"),
    (("model=classifier",), "not a Network; model=classifier goes with objective=classifying"),
    (("prediction=eps",), "prediction=eps is impossible"),
    (("prediction=score", "schedule=zero_snr"), "prediction=score is impossible"),
    (("prediction=eps", "schedule=shifted"), "prediction=eps is impossible"),
    (("prediction=eps", "schedule=cosine", "schedule.zero_terminal_snr=true"), "prediction=eps is impossible"),
    (("trainer.steps=null",), "the run has no end"),
    (("trainer.batch=10", "trainer.accumulate=3"), "the batch must be a multiple"),
    (("optimizer/decay=late", "trainer.steps=null", "trainer.minutes=1"), "optimizer/decay=late needs to know the end"),
    (("sampler/grid=trailing", "sampler.steps=1001"), "only 1000 indices"),
]


@pytest.mark.parametrize(("words", "said"), PAIRS, ids=lambda part: " ".join(part) if isinstance(part, tuple) else "")
def test_impossible_pairs_are_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        config.check_train(compose(*words))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("words", [("prediction=eps", "schedule=vp"), ("prediction=eps", "schedule=shifted",
    "schedule@schedule.base=vp"),
                                   ("prediction=v", "schedule=zero_snr"), ("trainer.steps=null", "trainer.minutes=0.5"),
                                   ("sampler/grid=trailing", "sampler.steps=1000")], ids=" ".join)  # fmt: skip
def test_possible_pairs_are_taken(words: tuple[str, ...]) -> None:
    assert isinstance(config.check_train(compose(*words)), Plan)


def test_the_check_agrees_with_the_schedules() -> None:
    """What the config foresees of alpha(1) = 0, from the words alone, is what the object says."""
    from diffusion_cli.schedules import Schedule

    for _, option in [pair for pair in OPTIONS if pair[0] == "schedule"]:
        node = compose(f"schedule={option}")["schedule"]
        assert pairs._ends_in_noise(node) == build(node, Schedule, "schedule").reaches_zero, option


def test_all_that_is_wrong_is_said_at_once() -> None:
    node = compose("trainer.batch=-1", "optimizer.lr=0", "seed=-5", "loss.norm._target_=os.system", "dataset.resize=bend")
    with pytest.raises(ConfigError) as caught:
        config.check_train(node)
    lines = str(caught.value).splitlines()
    keys = ("trainer.batch", "optimizer.lr", "seed", "loss.norm._target_", "dataset.resize")
    assert len(lines) == 5 and all(any(line.startswith(key) for line in lines) for key in keys)


@pytest.mark.parametrize(
    "name", ["/", "/tmp/x", ".", "..", "a/../b", "a/..", "./a", "a b", "a=b", "a,b", "a//b", "a/", "", "a\nb", ".lock"]
)
def test_names_stay_inside_the_folder_of_runs(name: str) -> None:
    node = compose()
    node["name"] = name
    with pytest.raises(ConfigError, match="name is "):
        config.check_train(node)


@pytest.mark.parametrize("name", ["a", "a/b", "digits-v-cosine", "lr_3e-4", "x.y", 7, 1.5])
def test_good_names_are_taken(name: object) -> None:
    node = compose()
    node["name"] = name
    assert config.check_train(node).root.name == str(name)


MUTANTS = [None, True, -1, 0, 1.5, math.nan, math.inf, "word", "", [], [1, "a"], {}, {"_target_": "os.system"}, "???", 10**400]


def test_any_value_anywhere_is_taken_or_refused_in_words() -> None:
    """Every key of the default config, replaced by every kind of value or left out: an answer, never a crash."""
    base = compose()

    def places(node: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        return [
            p
            for key, value in node.items()
            for p in ([(*path, key)] + (places(value, (*path, key)) if isinstance(value, dict) else []))
        ]

    refused = taken = 0
    for place in places(base):
        for mutant in [*MUTANTS, "left out"]:
            node = copy.deepcopy(base)
            inner = option_at(node, "/".join(place[:-1])) if place[:-1] else node
            if mutant == "left out":
                del inner[place[-1]]
            else:
                inner[place[-1]] = mutant
            try:
                config.check_train(node)
                taken += 1
            except ConfigError as error:
                assert place[-1] in str(error) or place[0] in str(error) or "no end" in str(error), (place, mutant, str(error))
                refused += 1
    assert refused > 4 * taken


def test_a_run_of_an_older_program_goes_on_while_new_words_are_as_nothing_said() -> None:
    now = compose(*SMALL_NETWORK, "model.attention_levels=[1]")
    before = copy.deepcopy(now)
    for key in ("time", "resize", "head_width", "attention_levels"):  # words of the network that it had not yet
        del before["model"][key]
    assert frozen_changes(before, now) == []
    now["model"]["time"], now["model"]["attention_levels"] = "scale_shift", [0]
    assert {line.partition(":")[0] for line in frozen_changes(before, now)} == {"model.time", "model.attention_levels"}
    now = changed(before, "model.width=12")
    assert frozen_changes(before, now) == ["model.width: 8 in the run, 12 now"]
