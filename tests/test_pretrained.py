"""Pipelines of diffusers as ckpt=: the same answers and the same walks as theirs, whatever the scheduler; files are distrusted.

Networks of random weights, away from zero; walks are compared relative to the largest value of a state. Bound: 1e-5 for the
network's answers and for walks; their tables are float32, ours float64.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hub_of_models import COMMIT, Models, reach, served
from PIL import Image
from tiny import compose, train
from torch import Tensor

from diffusion_cli import config
from diffusion_cli.build import build
from diffusion_cli.errors import ConfigError, DataError, StorageError, UserError
from diffusion_cli.exporting import export
from diffusion_cli.finding import find, load_denoiser
from diffusion_cli.models import UNet, UNet2D
from diffusion_cli.models.diffusers_unet import ours_of, theirs_of
from diffusion_cli.samplers import Sampler
from diffusion_cli.sampling import sample
from diffusion_cli.vision import mend_torchvision

mend_torchvision()
diffusers = pytest.importorskip("diffusers")

PLAIN: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
OTHER = {
    **PLAIN,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
}


def network(**keys: Any) -> Any:
    torch.manual_seed(0)
    made = diffusers.UNet2DModel(**{**PLAIN, **keys})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return made.eval().requires_grad_(False)


def saved(folder: Path, net: Any, scheduler: Any, kind: str = "DDPMPipeline") -> Path:
    getattr(diffusers, kind)(unet=net, scheduler=scheduler).save_pretrained(folder)
    return folder


def close(mine: Tensor, theirs: Tensor, bound: float = 1e-5) -> None:
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() < bound * max(1, theirs.abs().max())


def drawn(ckpt: object, out: Path, *words: str) -> np.ndarray:
    """uint8 [N, H, W] or [N, H, W, C]"""
    given = (f"ckpt={ckpt}", f"out={out}", "n=4", "device=cpu", *words)
    folder = sample(config.check_sample(compose(*given, primary="sample")))
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("pipelines") / "plain", network(), diffusers.DDPMScheduler())


# -- networks ----------------------------------------------------------------------------------------------------------

NETWORKS: dict[str, tuple[dict[str, Any], type]] = {
    "as ddpm-celebahq-256": (
        {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "attention_head_dim": None},
        UNet,
    ),
    "as the defaults": ({}, UNet),
    "labels": ({"num_class_embeds": 4}, UNet),
    "other blocks": (OTHER, UNet2D),
    "other blocks and labels": ({**OTHER, "num_class_embeds": 4}, UNet2D),
    "a variance learned too": ({"out_channels": 6}, UNet),
    "other blocks and a variance": ({**OTHER, "out_channels": 6}, UNet2D),
    "a centred input": ({"center_input_sample": True}, UNet2D),
    "a scaled middle": ({"mid_block_scale_factor": 1.4}, UNet2D),
    "unequal widths": ({"block_out_channels": (16, 24)}, UNet2D),
}


def test_times_by_a_table_are_whole_numbers(tmp_path: Path) -> None:
    """An embedding that was learned for each index is asked between them too: at the nearest."""
    net = network(time_embedding_type="learned", num_train_timesteps=1000)
    denoiser = load_denoiser(find(saved(tmp_path / "it", net, diffusers.DDPMScheduler())), "ema")
    x, index = torch.randn(3, 3, 8, 8), torch.tensor([0, 412, 999])
    with torch.no_grad():
        close(denoiser.network(x, index + torch.tensor([-0.4, 0.4, 0.4])), net(x, index).sample)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_answer_alike(name: str, tmp_path: Path) -> None:
    keys, expected = NETWORKS[name]
    net = network(**keys)
    folder = saved(tmp_path / "it", net, diffusers.DDPMScheduler())
    denoiser = load_denoiser(find(folder), "ema")
    assert type(denoiser.network) is expected
    x, time = torch.randn(4, 3, 8, 8), 999 * torch.rand(4)
    labels = torch.arange(4) if "num_class_embeds" in keys else None
    with torch.no_grad():
        theirs = net(x, time, **({} if labels is None else {"class_labels": labels})).sample
        close(denoiser.network(x, time, labels), theirs)
    assert denoiser.network.variance_channels == theirs.shape[1] - 3 and theirs.std() > 0.01


def test_files_of_2022_lie_side_by_side_with_older_names(plain: Path, tmp_path: Path) -> None:
    """As google/ddpm-* are: no folders, and attention's layers are called query, key, value and proj_attn."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = safetensors.torch.load_file(plain / "unet" / "diffusion_pytorch_model.safetensors")
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
    assert any(".query." in key for key in weights)
    safetensors.torch.save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    for path in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        shutil.copy(plain / path, tmp_path)
    for name, value in load_denoiser(find(plain), "ema").state_dict().items():
        assert torch.equal(load_denoiser(find(tmp_path), "ema").state_dict()[name], value)


def test_weights_in_several_files_and_in_half_precision(plain: Path, tmp_path: Path) -> None:
    unet = diffusers.UNet2DModel.from_pretrained(plain / "unet")
    for name, keys in {"several": {"max_shard_size": "40KB"}, "half": {"variant": "fp16"}}.items():
        shutil.copytree(plain, tmp_path / name)
        shutil.rmtree(tmp_path / name / "unet")
        (unet.half() if name == "half" else unet).save_pretrained(tmp_path / name / "unet", **keys)
        mine, whole = (load_denoiser(find(folder), "ema").state_dict() for folder in (tmp_path / name, plain))
        assert all((mine[key] - whole[key]).abs().max() <= (1e-3 if name == "half" else 0) for key in whole)
        assert all(value.dtype == torch.float32 for value in mine.values())
    assert len(list((tmp_path / "several" / "unet").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("name", [name for name, (_, kind) in NETWORKS.items() if kind is UNet])
def test_the_table_of_keys_is_read_in_both_directions(name: str) -> None:
    told = {**network(**NETWORKS[name][0]).config}
    keys = ours_of(told, 3)
    assert keys is not None
    assert all(list(v) == list(told[k]) if isinstance(v, tuple) else v == told[k] for k, v in theirs_of(keys).items())


# -- processes ---------------------------------------------------------------------------------------------------------

TABLES: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "zero snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "100 steps": {"num_train_timesteps": 100, "beta_end": 0.2},
    "listed": {"trained_betas": [1e-4 + 2e-5 * k for k in range(500)], "num_train_timesteps": 500},
    "trailing": {"timestep_spacing": "trailing"},
    # not linspace: their step goes to index k - N / steps there too, beside the next of their own times
}


def walked(found: Any, steps: int, x: Tensor, fresh: list[Tensor], clip: bool) -> list[Tensor]:
    """Our walk by the pipeline's own sampler from x, with this fresh noise at each step."""
    denoiser = load_denoiser(found, "ema")
    sampler = build({**found.config["config"]["sampler"], "steps": steps, "clip": clip}, Sampler, "sampler")
    with torch.no_grad():
        return [state.x for state in sampler.walk(denoiser, denoiser.schedule, x, lambda i, *_: fresh[i])]


@pytest.mark.parametrize("kind", ["DDIM", "DDPM"])
@pytest.mark.parametrize("name", TABLES)
def test_walks_are_theirs(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state of a walk of ten steps from the same noise, and of DDPM's with the same fresh noise."""
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**{**TABLES[name], "clip_sample": False})
    net = network()
    found = find(saved(tmp_path / "it", net, scheduler, f"{kind}Pipeline"))
    scheduler.set_timesteps(10)
    x, *fresh = torch.randn(11, 2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    states = [x]
    for k, z in zip(scheduler.timesteps, fresh, strict=True):
        monkeypatch.setattr(f"diffusers.schedulers.scheduling_{kind.lower()}.randn_tensor", lambda *_, z=z, **__: z)
        states.append(scheduler.step(net(states[-1], k).sample, k, states[-1]).prev_sample)
    denoiser = load_denoiser(found, "ema")
    sigma = float(denoiser.schedule.sigma(torch.tensor(1.0, dtype=torch.float64)))
    assert 0.5 < sigma <= 1
    for mine, theirs in zip(walked(found, 10, x, fresh, False), states, strict=True):
        close(mine, theirs, 1e-5)
    assert states[-1].std() > 0.01


OTHERS = {
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "LMSDiscreteScheduler": {"use_karras_sigmas": True},
    "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {},
    "EDMEulerScheduler": {},
    "EDMDPMSolverMultistepScheduler": {},
}


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of diffusers' own arithmetic
@pytest.mark.parametrize("name", OTHERS)
def test_every_scheduler_that_is_read_draws(name: str, plain: Path, tmp_path: Path) -> None:
    """Its schedule tells the network of the times that the scheduler itself would, and its walk ends."""
    folder = shutil.copytree(plain, tmp_path / "it")
    scheduler = getattr(diffusers, name)(**OTHERS[name])
    scheduler.save_pretrained(folder / "scheduler")
    pictures = drawn(folder, tmp_path / "out", "sampler.steps=5")
    assert pictures.shape == (4, 8, 8, 3) and pictures.std() > 1
    denoiser = load_denoiser(find(folder), "ema")
    last = float(denoiser.prediction.c_noise(torch.tensor(1.0, dtype=torch.float64)))
    scheduler.set_timesteps(5)
    assert abs(last - float(scheduler.timesteps[0])) < (200 if name == "PNDMScheduler" else 1e-3 * abs(last) + 1e-3)


def test_networks_of_the_ve_sde_answer_alike(tmp_path: Path) -> None:
    """Theirs are of pictures in [0, 1] and give the score, x0 = x + s^2 score; asked at s from 0.05 to 500."""
    keys = {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "block_out_channels": (32, 32),
        "time_embedding_type": "fourier",
        "center_input_sample": True,
        "mid_block_scale_factor": 1.41421356,
    }
    net = network(**keys)
    folder = saved(tmp_path / "it", net, diffusers.ScoreSdeVeScheduler(), "ScoreSdeVePipeline")
    denoiser = load_denoiser(find(folder), "ema")
    s = torch.tensor([0.05, 1.0, 20.0, 500.0], dtype=torch.float64)
    t = denoiser.schedule.t_of_log_snr(-2 * torch.log(2 * s))  # alpha is 1
    x = torch.rand(4, 3, 8, 8) + s.float().view(4, 1, 1, 1) * torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        x0 = x + s.float().view(4, 1, 1, 1) ** 2 * net(x, s.float()).sample
        for mine, theirs in zip(denoiser(2 * x - 1, t), 2 * x0 - 1, strict=True):
            close(mine, theirs, 2e-5)
    assert drawn(folder, tmp_path / "out", "sampler.steps=3").shape == (4, 8, 8, 3)
    text = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**text, "center_input_sample": False}))
    assert "centres its input" in refused(folder)


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("sampler=dpmpp_2m", "sampler.steps=4", "trajectory=true"),
        ("sampler=heun", "sampler.steps=4"),
        ("sampler=unipc", "sampler.steps=4"),
        ("sampler=ddim", "sampler.steps=4", "init=PICTURE", "vary=0.3"),
        ("sampler=ddim", "sampler.steps=4", "init=PICTURE", "strength=0.5"),
        ("sampler=ddim", "sampler.steps=4", "init=PICTURE", "edit=upscale"),
        ("sampler=ddpm", "sampler.steps=4", "nearest=1", "data=DATA"),
    ],
    ids=lambda words: "-".join(word.partition("=")[2] for word in words[:1] + words[2:]),
)
def test_samplers_edits_and_neighbours(words: tuple[str, ...], plain: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(data / f"{i}.png")
    given = [word.replace("PICTURE", str(data / "0.png")).replace("DATA", str(data)) for word in words]
    assert drawn(plain, tmp_path / "out", *given).shape == (4, 8, 8, 3)
    text = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert text["ckpt"] == str(plain) and len(text["checkpoint"]) == 64
    assert ("nearest=1" not in words) or (tmp_path / "out" / "nearest.png").is_file()


def test_the_digest_is_of_the_files(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "other name")
    assert find(folder).digest == find(plain).digest
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("0.02", "0.03"))
    assert find(folder).digest != find(plain).digest


def test_pictures_go_to_outputs_and_not_beside_the_files(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = sample(config.check_sample(compose(f"ckpt={plain}", "n=1", "sampler.steps=2", "device=cpu", primary="sample")))
    assert folder == Path("outputs/plain/generated") / f"pipeline_{find(plain).digest[:8]}-ddpm-2-seed_0"


def test_a_better_pipeline_is_guided_by_a_worse_one(plain: Path, tmp_path: Path) -> None:
    worse = saved(tmp_path / "worse", network(dropout=0.1), diffusers.DDPMScheduler(beta_end=0.03))
    words = ("sampler=ddim", "sampler.steps=3", "guidance=auto", f"guidance.ckpt={worse}")
    guided = drawn(plain, tmp_path / "a", *words)
    assert (guided != drawn(plain, tmp_path / "b", *words[:2])).any()


# -- there and back ----------------------------------------------------------------------------------------------------

PLAIN_MODEL = ("model.width=DEFAULT", "model.groups=DEFAULT", "model.multipliers=DEFAULT")  # tiny.py's, which are a U-Net's
RUNS = {
    "eps": ("schedule=ddpm", "prediction=eps", "sampler=ddim"),
    "v": ("schedule=zero_snr", "prediction=v", "sampler=ddim"),
    "vp": ("schedule=vp", "prediction=eps", "sampler=ddim"),
    "flow": ("schedule=flow", "prediction=flow"),
    "edm": ("schedule=edm", "prediction=edm", "loss=edm"),
    "dit": (*PLAIN_MODEL, "model=dit", "model.width=16", "model.depth=2", "model.heads=2", "model.time_shift=1"),
    "labelled dit": ("dataset.labels=true", *PLAIN_MODEL, "model=dit", "model.width=16", "model.depth=2", "model.time_shift=1"),
    "labelled": ("dataset.labels=true", "schedule=cosine", "prediction=eps", "sampler=ddim"),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_export_comes_back_as_it_went(name: str, tmp_path: Path) -> None:
    """The same pictures from the same seed, to 1 of 255, also guided by labels, whose names it knows."""
    run = train(tmp_path, *RUNS[name], "optimizer.lr=0.01", name="run")
    folder = export(config.check_export(compose(f"ckpt={run}", "to=diffusers", f"out={tmp_path / 'it'}", primary="export")))
    words = ["sampler=heun", "sampler.steps=5", "seed=3"]
    words += ["label=7", "guidance=cfg", "guidance.scale=2"] if "labelled" in name else []
    mine, back = drawn(run, tmp_path / "a", *words), drawn(folder, tmp_path / "b", *words)
    assert np.abs(mine.astype(int) - back).max() <= 1 and mine.std() > 1
    facts = find(folder).config["facts"]
    assert facts["classes"] == ([str(k) for k in range(10)] if "labelled" in name else [])


# -- what is refused, in one line --------------------------------------------------------------------------------------


def refused(folder: object, *words: str, kind: type[UserError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        drawn(folder, Path("never"), "sampler.steps=2", *words)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and not Path("never").exists()
    return text


def changed(plain: Path, tmp_path: Path, path: str, **keys: Any) -> Path:
    folder = shutil.copytree(plain, tmp_path / "changed")
    text = json.loads((folder / path).read_text())
    (folder / path).write_text(json.dumps({**text, **keys}))
    return folder


INDEX, CONFIG, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("path", "keys", "says"),
    [
        (INDEX, {"_class_name": "DiTPipeline"}, "is a DiTPipeline without its vae"),
        (INDEX, {"_class_name": "Odd", "vae": ["diffusers", "AutoencoderKL"]}, "is a Odd, which is not read here"),
        (INDEX, {"_class_name": "DDPMPipelin"}, "did you mean DDPMPipeline"),
        (INDEX, {"unet": ["my_code", "MyNet"]}, "brings code of its own for unet, which is never run"),
        (CONFIG, {"_class_name": "Kandinsky3UNet"}, "its network is a Kandinsky3UNet"),
        (CONFIG, {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 8}, "its network reads texts"),
        (CONFIG, {"sample_size": [8, 16]}, "size \\[8, 16\\], and square ones"),
        (CONFIG, {"class_embed_type": "timestep"}, "by class_embed_type timestep"),
        (CONFIG, {"time_embedding_type": "learned"}, "UNet2DModel of diffusers refuses these keys"),
        (CONFIG, {"block_out_channels": []}, "is not understood"),
        (CONFIG, {"norm_num_groups": 7}, "width is 16 and groups is 7"),
        (CONFIG, {"in_channels": 4, "out_channels": 4}, "knows 4 channels"),
        (
            SCHEDULER,
            {"_class_name": "CMStochasticIterativeScheduler"},
            "its CMStochasticIterativeScheduler is none that is read",
        ),
        (SCHEDULER, {"prediction_type": "odd"}, "prediction_type is odd"),
        (SCHEDULER, {"beta_schedule": "odd"}, "beta_schedule is odd"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "ends in pure noise .* epsilon"),
    ],
)
def test_what_is_not_read_is_said(path: str, keys: dict[str, Any], says: str, plain: Path, tmp_path: Path) -> None:
    assert re.search(says, refused(changed(plain, tmp_path, path, **keys), kind=UserError))


def test_pickles_and_damage(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "it")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be used" in refused(folder, kind=StorageError)
    tensors = safetensors.torch.load(whole)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:8]
    safetensors.torch.save_file(tensors, weights)
    assert "size mismatch" in refused(folder, kind=StorageError)
    del tensors["conv_in.weight"]
    safetensors.torch.save_file(tensors, weights)
    assert "cannot be used" in refused(folder, kind=StorageError)
    weights.rename(weights.with_suffix(".bin"))
    assert "is a pickle" in refused(folder) and "weights_only=True" in refused(folder)
    (folder / SCHEDULER).write_text("{")
    assert "cannot be read as JSON" in refused(folder, kind=StorageError)
    (folder / CONFIG).unlink()
    assert "is missing" in refused(folder, kind=StorageError)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("weights=raw",), "write weights=ema"),
        (("label=3",), "trained without labels"),
        (("nearest=1",), "name a folder of them with data=DIR"),
    ],
)
def test_what_a_pipeline_cannot_be_asked(words: tuple[str, ...], says: str, plain: Path) -> None:
    assert says in refused(plain, *words, kind=UserError)


def test_no_export_of_a_pipeline(plain: Path) -> None:
    with pytest.raises(ConfigError, match="is a pipeline already"):
        export(config.check_export(compose(f"ckpt={plain}", "to=folder", primary="export")))


# -- the hub -----------------------------------------------------------------------------------------------------------


def cached(cache: Path, plain: Path, repo: str = "google/ddpm-tiny") -> str:
    """As the hub's library lays a repository out."""
    commit = "a" * 40
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(plain, place / "snapshots" / commit)
    return commit


def test_the_cache_serves_without_a_network(
    plain: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    commit = cached(cache, plain)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = find("hf://google/ddpm-tiny")
    assert found.said == f"hf://google/ddpm-tiny@{commit}" and found.run == Path("outputs/google-ddpm-tiny")
    words = ("sampler=ddim", "sampler.steps=2")
    assert (drawn("hf://google/ddpm-tiny", tmp_path / "a", *words) == drawn(plain, tmp_path / "b", *words)).all()
    assert "looking into its cache" in capsys.readouterr().out
    assert "not in its cache" in refused("hf://google/another", kind=DataError)
    assert "write hf://OWNER/NAME" in refused("hf://a/b/../c")


@pytest.fixture
def hub(plain: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Models]:
    """A tiny pipeline with a pickle and a variant beside its weights; a latent one; one of pickles alone; one that is gated."""
    folders = {name: shutil.copytree(plain, tmp_path / name) for name in ("tiny", "latent", "pickled")}
    unet = folders["tiny"] / "unet"
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors", "more.py"):
        (unet / name).write_bytes(b"not to be fetched")
    index = json.loads((plain / INDEX).read_text())
    (folders["latent"] / INDEX).write_text(json.dumps({**index, "_class_name": "LDMPipeline"}))
    weights = folders["pickled"] / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with served(Models({f"me/{name}": folder for name, folder in folders.items()}, ("me/gated",))) as models:
        reach(models, monkeypatch)
        yield models


def test_the_hub_gives_what_is_read_and_nothing_else(
    hub: Models, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    words = ("sampler=ddim", "sampler.steps=2")
    expected = drawn(plain, tmp_path / "a", *words)
    for place in ("hf://me/tiny", f"hf://me/tiny@{COMMIT}"):
        assert find(place).said == f"hf://me/tiny@{COMMIT}" and find(place).digest == find(plain).digest
        assert (drawn(place, tmp_path / place[-4:], *words) == expected).all()
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert set(hub.fetched) == {INDEX, CONFIG, SCHEDULER, weights} and not hub.unknown
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # and from now on without asking
    assert find("hf://me/tiny").said == f"hf://me/tiny@{COMMIT}"


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("hf://me/latent", "is a LDMPipeline without its vqvae"),
        ("hf://me/pickled", "diffusion_pytorch_model.bin is a pickle"),
        ("hf://me/gated", "is gated: accept its terms on"),
        ("hf://me/nowhere", "the hub has no model me/nowhere that you may read"),
        ("hf://me/tiny@v9", "me/tiny has no revision v9"),
    ],
)
def test_what_the_hub_refuses_is_said(place: str, says: str, hub: Models) -> None:
    assert says in refused(place)
    assert not [name for name in hub.fetched if "safetensors" in name], "weights come after the refusals"


def test_without_diffusers(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What our own UNet computes needs no diffusers; other networks say which extra has it."""
    other = saved(tmp_path / "other", network(**OTHER), diffusers.DDPMScheduler())
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert load_denoiser(find(plain), "ema")
    assert "pip install 'diffusion-cli[diffusers]'" in refused(other)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"facts": {}}',
        '{"facts": {"classes": ["a"], "taught": [3]}}',
        '{"facts": {"classes": ["a"], "taught": [0]}}',
        '{"label_dropout": "x"}',
    ],
)
def test_facts_that_are_not_ours(text: str, plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "it")
    (folder / "facts.json").write_text(text)
    assert "facts.json" in refused(folder, kind=StorageError)
