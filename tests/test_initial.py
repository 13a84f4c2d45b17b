"""init=: a run begins from a trained model's own weights and process; adapters add to them and leave them to the bit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import compose, figures, hashes, stopped, train, words
from torch import Tensor

from diffusion_cli import checkpoint, config
from diffusion_cli.adapters import LoRA, merged
from diffusion_cli.assembly import adapt, denoiser_of, objective_of
from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.finding import find, load_denoiser
from diffusion_cli.initial import adopted, begin
from diffusion_cli.models import UNet2D
from diffusion_cli.sampling import sample
from diffusion_cli.settings import Plan
from diffusion_cli.vision import mend_torchvision

BARE = ("model.width=DEFAULT", "model.groups=DEFAULT", "model.multipliers=DEFAULT")  # no words about the network
PROCESS = ("schedule=cosine", "prediction=v", "sampler=ddim")
LORA = ("adapter=lora", "adapter.rank=2", "adapter.alpha=3")
NEW = ("trainer.steps=4", *BARE)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows the digits' classes, with a process that is not the default."""
    return train(
        tmp_path_factory.mktemp("base"), *PROCESS, "dataset.labels=true", "optimizer.lr=3e-2", "ema=decay", name="base"
    )


def other(folder: Path, **keys: Any) -> Path:
    """A pipeline whose network only diffusers' own class computes."""
    mend_torchvision()
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        resnet_time_scale_shift="scale_shift", **keys,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet=net, scheduler=diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def planned(*line: str) -> Plan:
    return config.planned(compose(*line), line)


def saved(run: Path, name: str = "weights", step: int | None = None) -> dict[str, Tensor]:
    folders = checkpoint.folders(run / "checkpoints")
    return checkpoint.load(folders[0] if step is None else run / "checkpoints" / f"step_{step:08d}").tensors(name)


# -- what the model brings ---------------------------------------------------------------------------------------------


def test_the_models_process_stands_above_the_defaults_and_below_the_words(base: Path) -> None:
    theirs = yaml.safe_load((base / "config.yaml").read_text())
    node = planned("name=x", f"init={base}").node
    for group in ("schedule", "prediction", "model", "sampler", "objective"):
        assert node[group] == theirs[group], group
    assert node["optimizer"] == compose()["optimizer"] != theirs["optimizer"]  # how it was trained is not what it is
    assert node["init_digest"] == find(base).digest
    node = planned("name=x", f"init={base}", "schedule=vp", "model.dropout=0.3", "sampler/grid=karras", "sampler.steps=7").node
    assert node["schedule"] == compose("schedule=vp")["schedule"]
    assert node["model"] == {**theirs["model"], "dropout": 0.3}
    assert node["sampler"]["_target_"] == theirs["sampler"]["_target_"] and node["sampler"]["steps"] == 7
    assert node["sampler"]["grid"] == compose("sampler/grid=karras")["sampler"]["grid"] != theirs["sampler"]["grid"]

    words = ("objective.method.steps=2", "objective.method.teacher=there")
    deep = planned("name=x", f"init={base}", "objective=progressive", *words).node["objective"]
    assert (deep["method"]["steps"], deep["method"]["teacher"]) == (2, "there")
    assert deep["label_dropout"] == theirs["objective"]["label_dropout"]


def test_what_is_impossible_together_is_said_of_what_the_model_brings(base: Path) -> None:
    """prediction=eps cannot be had with the default, flow; it can with the model's cosine, and not with flow that is said."""
    assert planned("name=x", f"init={base}", "prediction=eps", "schedule=vp").node["prediction"]["_target_"].endswith("Eps")
    with pytest.raises(ConfigError, match="prediction=eps is impossible"):
        planned("name=x", f"init={base}", "prediction=eps", "schedule=flow")


def test_a_run_begins_from_the_averaged_weights_or_the_raw(base: Path, tmp_path: Path) -> None:
    average, raw = saved(base, "average"), saved(base, "weights")
    assert any(not torch.equal(average[name], raw[name]) for name in raw)
    for word, expected in ((), average), (("init_weights=raw",), raw):
        plan = planned("dataset.labels=true", "name=x", f"outputs={tmp_path}", f"init={base}", *word)
        found = find(base)
        objective = objective_of(plan.node, found.config["facts"])
        begin(objective, found, plan.root.init_weights, found.config["facts"])
        for name, value in objective.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_the_first_loss_is_the_trained_models(tmp_path: Path) -> None:
    long = ("trainer.steps=150", "trainer.batch=32", "trainer.report_every=10", "optimizer.lr=5e-3", "trainer.save_every=0")
    first = train(tmp_path, *long, name="first")
    again = train(tmp_path, *long, *BARE, f"init={first}", "optimizer.lr=1e-5", "trainer.steps=10", name="again")
    fresh, last, begun = figures(first)[0], figures(first)[-2], figures(again)[0]
    assert begun["train/loss"] < 1.15 * last["train/loss"] < 0.6 * fresh["train/loss"]


@pytest.mark.parametrize("more", [(), LORA], ids=["all weights", "adapters"])
def test_both_kinds_of_network_of_a_pipeline_train(more: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    from diffusion_cli.exporting import export

    pytest.importorskip("diffusers")
    ours = export(config.check_export(compose(f"ckpt={base}", "to=diffusers", f"out={tmp_path / 'p'}", primary="export")))
    for name, place in ("ours", ours), ("theirs", other(tmp_path / "other")):
        run = train(
            tmp_path, *NEW, *more, f"init={place}", f"dataset.labels={'true' if name == 'ours' else 'false'}", name=name
        )
        network = load_denoiser(find(run), "ema").network
        assert isinstance(network, UNet2D) == (name == "theirs")
        start = load_denoiser(find(place), "ema").network.state_dict()
        assert any(not torch.equal(start[key], value) for key, value in network.state_dict().items())
        node = find(run).config["config"]
        assert node["schedule"]["_target_"].endswith("Betas") and "label_dropout" in node["objective"]


# -- classes -----------------------------------------------------------------------------------------------------------


def test_classes_are_known_by_name_and_new_ones_begin_as_no_class(base: Path) -> None:
    found = find(base)
    facts = {**found.config["facts"], "classes": ["7", "seven", "2"]}
    objective = objective_of(planned("name=x", f"init={base}", "dataset.labels=true").node, facts)  # type: ignore[arg-type]
    begin(objective, found, None, facts)  # type: ignore[arg-type]
    name = "denoiser.network.class_embedding.weight"
    before, after = saved(base, "average")[name], objective.state_dict()[name]
    assert torch.equal(after, before[[7, 10, 2, 10]])


def test_a_network_without_classes_answers_as_before_whatever_it_is_told(tmp_path: Path) -> None:
    plain = train(tmp_path, "trainer.steps=2", "optimizer.lr=3e-2", name="plain")
    found = find(plain)
    facts = {**found.config["facts"], "classes": ["a", "b"], "taught": [0, 1]}
    objective = objective_of(planned("name=x", f"init={plain}").node, facts)  # type: ignore[arg-type]
    begin(objective, found, None, facts)  # type: ignore[arg-type]
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.9])
    objective.eval()
    with torch.no_grad():
        before = load_denoiser(found, "ema")(x, t)
        after = objective.denoiser(x, t, torch.tensor([0, 2]))  # type: ignore[operator]
    assert (after - before).abs().max() < 1e-6  # another place in memory, another order of sums


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), LORA], ids=["all weights", "adapters"])
def test_a_run_goes_on_to_the_bit_though_its_origin_is_gone(more: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "origin")
    line = (*NEW, *more, "model.dropout=0.2", "dataset.labels=true", f"init={tmp_path / 'origin'}")
    whole = train(tmp_path, *line, name="whole")
    stopped(tmp_path, 3, *line)
    shutil.rmtree(tmp_path / "origin")
    resumed = train(tmp_path, *line)
    assert hashes(resumed) == hashes(whole) and figures(resumed) == figures(whole)
    node = yaml.safe_load((resumed / "config.yaml").read_text())
    assert node["init_digest"] == find(base).digest and node["schedule"]["_target_"].endswith("Betas")
    with pytest.raises(ConfigError, match="schedule"):
        train(tmp_path, *line, "schedule=vp")
    with pytest.raises(ConfigError, match=r"init: .* in the run, null now"):
        train(tmp_path, *NEW, "dataset.labels=true", *PROCESS)


def test_jobs_of_a_sweep_begin_from_it_too(base: Path, tmp_path: Path) -> None:
    line = words(tmp_path, *NEW, "trainer.steps=1", "dataset.labels=true", f"init={base}", "schedule=vp,edm", name="many")
    command = [str(Path(sys.executable).with_name("diffusion-train")), "-m", *line, "hydra.launcher.threads=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for option in ("vp", "edm"):
        node = find(tmp_path / "many" / f"schedule_{option}").config["config"]
        assert node["schedule"] == compose(f"schedule={option}")["schedule"]
        assert node["prediction"]["_target_"].endswith(".V") and node["init_digest"] == find(base).digest
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and "2 finished before" in again.stdout, again.stdout + again.stderr


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("dataset.size=16", "image_size 8, and dataset.size is 16: write dataset.size=8"),
        ("dataset.channels=3", "channels 1, and dataset.channels is 3: write dataset.channels=1"),
        ("dataset.labels=false", "is told classes, and dataset.labels is false: write dataset.labels=true"),
        ("init_digest=abc", "and init_digest is abc"),
        ("adapter.rank=0", "adapter.rank is 0: it must be"),
        ("adapter.targets=[cv1]", "targets names cv1, and this network's layers are"),
        ("model.blocks=2", "does not fit this network: .* leave out the words"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(word: str, said: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        train(tmp_path, *NEW, *LORA, "dataset.labels=true", f"init={base}", word)
    assert "\n" not in str(caught.value)
    assert not checkpoint.folders(tmp_path / "run" / "checkpoints")


def test_adapters_need_a_model_and_peft(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="adapter=lora adds to a trained model: say which, init="):
        planned("name=x", "adapter=lora")
    monkeypatch.setattr(config, "find_spec", lambda name: None if name == "peft" else object())
    with pytest.raises(ConfigError, match=r"pip install 'diffusion-cli\[lora\]'"):
        planned("name=x", "adapter=lora", f"init={base}")


def test_a_place_that_is_none_is_said_with_the_word(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"init=.*nowhere does not exist"):
        planned("name=x", f"init={tmp_path / 'nowhere'}")


def test_a_model_that_changed_between_look_and_start_is_refused(base: Path, tmp_path: Path) -> None:
    from diffusion_cli.training import train as begin_training

    line = words(tmp_path, *NEW, "dataset.labels=true", f"init={base}")
    node = {**adopted(compose(*line), line), "init_digest": "0" * 64}
    with pytest.raises(ConfigError, match="has changed since it was looked up"):
        begin_training(config.check_train(node))


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(base: Path) -> Path:
    return train(base.parent, *NEW, *LORA, "dataset.labels=true", f"init={base}", "optimizer.lr=3e-2", name="adapted")


def test_the_base_is_left_to_the_bit(base: Path, adapted: Path) -> None:
    before, after = saved(base, "average"), saved(adapted)
    trained = {name for name in after if ".lora_" in name or "class_embedding" in name}
    same = {name.replace(".base_layer.", "."): value for name, value in after.items() if name not in trained}
    assert same.keys() == {name for name in before if "class_embedding" not in name}
    assert all(torch.equal(value, before[name]) for name, value in same.items())
    averaged = saved(adapted, "average")
    assert all(torch.equal(averaged[name], after[name]) for name in after if name not in trained)
    assert all(not torch.equal(averaged[name], after[name]) for name in trained)
    optimizer = {name.rpartition("/")[0] for name in saved(adapted, "optimizer")}
    assert optimizer == trained


def test_as_many_weights_are_trained_as_is_said(base: Path, adapted: Path) -> None:
    """r (in k k + out) for each layer, and the table of classes."""
    network = load_denoiser(find(base), "ema").network
    layers = [part for part in network.modules() if type(part) in (torch.nn.Linear, torch.nn.Conv2d)]
    expected = sum(2 * (part.weight[0].numel() + part.weight.shape[0]) for part in layers)
    after = saved(adapted)
    assert sum(value.numel() for name, value in after.items() if ".lora_" in name) == expected
    assert sum(".lora_A." in name for name in after) == len(layers)


def test_merged_weights_answer_as_the_adapted_network(base: Path, adapted: Path) -> None:
    found = find(adapted)
    node, facts = found.config["config"], found.config["facts"]
    objective = objective_of(node, facts)
    adapt(objective, node)
    objective.load_state_dict(found.tensors("average"))
    objective.eval()
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 7, 10])
    with torch.no_grad():
        theirs = objective.denoiser.output(x, t, labels)[0]  # type: ignore[operator,union-attr]
        mine = load_denoiser(found, "ema").output(x, t, labels)[0]
        before = load_denoiser(find(base), "ema").output(x, t, labels)[0]
    assert (mine - theirs).abs().max() < 1e-5 < 1e-2 < (mine - before).abs().max()


def test_adapters_are_sampled_exported_and_begun_from_without_peft(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusion_cli.exporting import export

    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    sample(config.check_sample(compose(f"ckpt={adapted}", "n=2", f"out={tmp_path / 's'}", "device=cpu", primary="sample")))
    folder = export(config.check_export(compose(f"ckpt={adapted}", f"out={tmp_path / 'e'}", primary="export")))
    card = (folder / "README.md").read_text()
    assert f"| begun from | base, of digest `{find(adapted.parent / 'base').digest}` |" in card and "LoRA (rank 2" in card
    expected = load_denoiser(find(adapted), "ema").state_dict()
    for name, value in load_denoiser(find(folder), "ema").state_dict().items():
        assert torch.equal(value, expected[name])
    run = train(tmp_path, *NEW, "dataset.labels=true", f"init={adapted}", name="further")
    assert not any("lora" in name for name in saved(run))
    with pytest.raises(ConfigError, match=r"diffusion-cli\[lora\]"):
        train(tmp_path, *NEW, *LORA, "dataset.labels=true", f"init={adapted}", name="more")


def test_some_layers_alone(base: Path) -> None:
    network = denoiser_of(find(base).config["config"], find(base).config["facts"]).network
    LoRA(rank=1, targets=("conv1",), whole=("conv_out",)).put_into(network)
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    assert trained == {name for name, _ in network.named_parameters() if ".conv1.lora_" in name or name.startswith("conv_out.")}


def test_adapters_that_fit_no_layer_are_damage(adapted: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(adapted, tmp_path / "run"))
    found = find(run)
    tensors = {name: value[..., :1, :1] if ".lora_A." in name else value for name, value in found.tensors("average").items()}
    with pytest.raises(RuntimeError):
        merged(tensors, 1.0)
    node = {**found.config, "config": {**found.config["config"], "adapter": {"rank": 2}}}
    files = checkpoint.packed(found.step, {"average": found.tensors("average")}, node, found.state)
    for name, data in files.items():
        (found.folder / name).write_bytes(data)
    assert json.loads(files["config.json"])
    with pytest.raises(StorageError, match="cannot be used"):
        load_denoiser(find(run), "ema")
