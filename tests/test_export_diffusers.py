"""to=diffusers: its own classes load the folder, and answer and walk as ours do from the same noise; what does not map is said.

Walks are compared relative to the largest value of a state (a network that was never trained answers beyond [-1, 1], and eps
is divided by alpha). Bound: 1e-5; 2e-5 for x0, where theirs divides the rounding of a float32 table by sigma near the end; 1e-4
for eps that is clipped, where the rounding was divided by alpha before a large x0 became a small one.
"""

import json
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_export import PLAIN, asked, run_python
from tiny import train
from torch import Tensor

from diffusion_cli.denoiser import Denoiser
from diffusion_cli.errors import ConfigError
from diffusion_cli.exporting import diffusers_models
from diffusion_cli.exporting.diffusers_schedulers import Peer, peer_of
from diffusion_cli.finding import find, load_denoiser
from diffusion_cli.models import DiT, Network, UNet
from diffusion_cli.predictions import X0, Eps, NextStep, Preconditioned, Prediction, Score, V, Velocity
from diffusion_cli.samplers import Ancestral, Grid, Karras, Leading, Listed, State, Trailing
from diffusion_cli.schedules import EDM, VE, VP, Betas, Flow, Mix, Schedule, Shifted
from diffusion_cli.vision import mend_torchvision

mend_torchvision()
diffusers = pytest.importorskip("diffusers")

SMALL = {"width": 16, "multipliers": (1, 2), "blocks": 1, "attention_levels": (), "groups": 8, "dropout": 0.0}
STEPS = 10
SCHEDULES: dict[str, Schedule] = {
    "ddpm": Betas(),
    "cosine": Betas("cosine"),
    "scaled_linear": Betas("scaled_linear", first=0.00085, last=0.012),
    "sigmoid": Betas("sigmoid"),
    "laplace": Betas("laplace"),
    "zero_snr": Betas("scaled_linear", first=0.00085, last=0.012, zero_terminal_snr=True),
    "100 steps": Betas(steps=100),
    "shifted cosine": Shifted(Betas("cosine"), 2.0),
    "vp": VP(),
    "shifted vp": Shifted(VP(), 2.0),
    "ve": VE(),
    "edm": EDM(),
    "flow": Flow(),
    "shifted flow": Shifted(Flow(), 3.0),
    "mix": Mix(),
}
PRESERVING = {
    "ddpm",
    "cosine",
    "scaled_linear",
    "sigmoid",
    "laplace",
    "zero_snr",
    "100 steps",
    "shifted cosine",
    "vp",
    "shifted vp",
}
MAPPED: dict[type[Prediction], set[str]] = {
    Eps: PRESERVING - {"zero_snr"},
    X0: PRESERVING,
    V: PRESERVING,
    Velocity: {"flow"},
    Preconditioned: set(SCHEDULES) - {"mix"},
    Score: set(),
    NextStep: set(),
}


def stirred(network: Network) -> Network:
    """Away from the zeros of a fresh network, for asking alone."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pair() -> tuple[Network, Any]:
    torch.manual_seed(0)
    network = stirred(UNet(1, 8, 0, **SMALL))  # type: ignore[arg-type]
    assert network(torch.ones(1, 1, 8, 8), torch.ones(1)).std() > 0.01, "a network that answers 0 agrees with any"
    return network, diffusers_models.peer_of(network, SMALL, None)


def grid_of(peer: Peer, schedule: Schedule) -> Grid:
    """Our grid with the times at which the scheduler asks by default."""
    base = schedule.base if isinstance(schedule, Shifted) else schedule
    if peer.name == "EDMEulerScheduler":
        return Karras(peer.config["sigma_min"], peer.config["sigma_max"], peer.config["rho"])
    if peer.name == "FlowMatchEulerDiscreteScheduler":
        return Listed(tuple(torch.linspace(1, 0.001, STEPS, dtype=torch.float64).tolist()))
    return Trailing(base.steps) if isinstance(base, Betas) else Leading(1000)


def close(mine: Tensor, theirs: Tensor, bound: float = 1e-5) -> None:
    assert (mine - theirs).abs().max() < bound * max(1, theirs.abs().max())


MAPS = [(kind, name, False) for kind, names in MAPPED.items() for name in sorted(names)]
CLIPS = [(kind, name, True) for kind in (Eps, X0, V) for name in sorted(MAPPED[kind])]  # the other schedulers cannot


@pytest.mark.parametrize(("kind", "name", "clip"), [*MAPS, *CLIPS])
def test_every_process_that_maps_walks_the_same(
    kind: type[Prediction], name: str, clip: bool, pair: tuple[Network, Any]
) -> None:
    schedule = SCHEDULES[name]
    prediction = kind(schedule)
    peer = peer_of(prediction, clip)
    scheduler = getattr(diffusers, peer.name)(**json.loads(json.dumps(peer.config)))
    scheduler.set_timesteps(STEPS)
    denoiser = Denoiser(pair[0], prediction)
    sampler = Ancestral(STEPS, grid_of(peer, schedule), clip)
    times = sampler.times(schedule)
    told = [float(prediction.c_noise(t)) for t in times[:-1]]
    assert max(abs(a - float(b)) for a, b in zip(told, scheduler.timesteps, strict=True)) < 1e-4

    x = sampler.start(schedule, torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    alpha = [float(schedule.alpha(t)) if peer.scales else 1.0 for t in times]  # theirs walks in x / alpha
    extra = {"use_clipped_model_output": True} if clip else {}
    states = [x / alpha[0]]
    with torch.no_grad():
        ours = [state.x for state in sampler.walk(denoiser, schedule, x, lambda *_: x)]
        for k in scheduler.timesteps:
            z = scheduler.scale_model_input(states[-1], k) if peer.scales else states[-1]
            states.append(scheduler.step(pair[1](z, k).sample, k, states[-1], **extra).prev_sample)
    for mine, theirs, share in zip(ours, states, alpha, strict=True):
        close(mine / share, theirs, 2e-5 if kind is X0 else 1e-4 if kind is Eps and clip else 1e-5)
    assert ours[-1].std() > 0.01


@pytest.mark.parametrize(("kind", "name"), list(product(MAPPED, SCHEDULES)))
def test_every_other_process_is_refused_with_its_reason(kind: type[Prediction], name: str) -> None:
    if name in MAPPED[kind]:
        assert peer_of(kind(SCHEDULES[name]), False)
        return
    try:
        prediction = kind(SCHEDULES[name])
    except ValueError:
        return  # impossible with us too
    with pytest.raises(ConfigError) as caught:
        peer_of(prediction, False)
    text = str(caught.value)
    reasons = {
        Score: "no scheduler of diffusers reads prediction=score",
        NextStep: "no scheduler of diffusers reads prediction=next_step",
        Velocity: "diffusers reads prediction=flow on schedule=flow alone, not on",
    }
    expected = (
        "the noise of schedule=mix is uniform" if name == "mix" else reasons.get(kind, "variance-preserving schedules alone")
    )
    assert expected in text and len(text.splitlines()) == 1 and "to=folder, onnx and torch_export take any" in text


# -- networks ----------------------------------------------------------------------------------------------------------


def asked_both(network: Network, peer: Any, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, time = torch.randn(3, 1, 8, 8, generator=generator), 999 * torch.rand(3, generator=generator)
    with torch.no_grad():
        named = {} if labels is None else {"class_labels": labels}
        return network(x, time, labels), peer(x, timestep=time, **named).sample


UNETS: list[dict[str, Any]] = [
    {**SMALL, "attention_levels": (1,), "head_width": 8},
    {**SMALL, "time_order": "cos_sin", "time_shift": 0, "downsample_padding": "both", "norm_eps": 1e-5, "blocks": 2},
]


@pytest.mark.parametrize("keys", UNETS, ids=["heads", "other options"])
def test_a_unet_with_labels_open_or_told_for_good(keys: dict[str, Any]) -> None:
    network = stirred(UNet(1, 8, 5, **keys))
    labels = torch.tensor([1, 4, 5])
    mine, theirs = asked_both(network, diffusers_models.peer_of(network, keys, None), labels)
    close(mine, theirs)
    answers = []
    for label in (2, 5):  # a class, and the null label
        peer = diffusers_models.peer_of(network, keys, label)
        assert peer.config.num_class_embeds is None
        x, time = torch.randn(3, 1, 8, 8), 999 * torch.rand(3)
        with torch.no_grad():
            close(network(x, time, torch.full((3,), label)), peer(x, time).sample)
            answers.append(peer(torch.ones(1, 1, 8, 8), 3).sample)
    assert (answers[0] - answers[1]).abs().max() > 1e-4


DIT: dict[str, Any] = {"patch_size": 2, "width": 32, "depth": 2, "heads": 2, "time_shift": 1}


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_dit_of_the_same_waves(channels: int, classes: int) -> None:
    network = stirred(DiT(channels, 8, classes, **DIT))
    peer = diffusers_models.peer_of(network, DIT, None)
    x, time = torch.randn(3, channels, 8, 8), 999 * torch.rand(3)
    labels = torch.tensor([1, 4, 5]) if classes else None
    with torch.no_grad():
        mine = network(x, time, labels)
        theirs = peer(x, timestep=time, class_labels=labels if classes else torch.zeros(3, dtype=torch.long)).sample
    close(mine, theirs)
    assert mine.std() > 0.01


@pytest.mark.parametrize(
    ("network", "keys", "label", "says"),
    [
        (DiT(1, 8, 5, **{**DIT, "time_shift": 0}), {}, None, "waves of other frequencies.*model.time_shift=1"),
        (DiT(1, 8, 5, **DIT, mlp_ratio=2.0), {"mlp_ratio": 2.0}, None, "model.mlp_ratio is 2, and diffusers' DiT has 4"),
        (DiT(1, 8, 5, **DIT), {}, 3, "label=3 cannot be told for good"),
        (UNet(1, 8, 0, 1, **SMALL), {}, None, "is self-conditioned"),  # type: ignore[arg-type]
        (UNet(1, 8, 0, **SMALL, patch_size=2), {"patch_size": 2}, None, "patch_size is 2, and diffusers' UNet2DModel has"),  # type: ignore[arg-type]
    ],
)
def test_networks_that_do_not_map(network: Network, keys: dict[str, Any], label: int | None, says: str) -> None:
    own = DIT if isinstance(network, DiT) else SMALL
    with pytest.raises(ConfigError, match=rf"^to=diffusers: .*{says}"):
        diffusers_models.peer_of(network, {**own, **keys}, label)


# -- whole folders -----------------------------------------------------------------------------------------------------

LABELLED = ("dataset.labels=true", "trainer.steps=2")
RUNS = {
    "flow": LABELLED,
    "cosine": (*LABELLED, "schedule=cosine", "prediction=eps", "sampler=ddim"),
    "edm": ("trainer.steps=2", "schedule=edm", "prediction=edm", "loss=edm"),
    "dit": (*LABELLED, *PLAIN[1:], "model=dit", "model.width=16", "model.depth=1", "model.heads=2", "model.time_shift=1"),
    "gated": (*PLAIN, "trainer.steps=1", "model=unet_gated", "model.width=8", "model.levels=2"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, words in RUNS.items():
        train(folder, *words, name=name)
    return folder


FOLDERS = [  # run, words, pipeline or None, the label that it is told
    ("flow", (), None, 9),
    ("flow", ("label=none",), "DDPMPipeline", 10),
    ("flow", ("label=3",), "DDPMPipeline", 3),
    ("cosine", (), "ConsistencyModelPipeline", 9),
    ("cosine", ("label=none",), "DDIMPipeline", 10),
    ("edm", (), "ConsistencyModelPipeline", None),
    ("dit", (), None, 9),
]


class Diffusers(Ancestral):
    """DDIM in diffusers' own manner of clipping: x0 is kept within [-1, 1], and the noise is that of the x0 before."""

    def moves(self, ask: Any, schedule: Schedule, x: Tensor, times: Tensor, noise: Any) -> Iterator[State]:
        for i, (t, s) in enumerate(pairwise(times)):
            x0 = ask(x, t)
            yield State(i, t, x, x0)
            rest = (x - float(schedule.alpha(t)) * x0) / float(schedule.sigma(t))
            x = float(schedule.alpha(s)) * x0.clamp(-1, 1) + float(schedule.sigma(s)) * rest
        yield State(len(times) - 1, times[-1], x, x)


@pytest.mark.parametrize(("name", "words", "pipeline", "label"), FOLDERS, ids=lambda value: str(value or ""))
def test_the_python_of_the_card_draws_what_we_draw(
    name: str,
    words: tuple[str, ...],
    pipeline: str | None,
    label: int | None,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The card's own lines, 50 steps from a seed; then our Euler walk from the same noise over the same times."""
    folder = asked(runs / name, "to=diffusers", "weights=raw", f"out={tmp_path / 'it'}", *words)
    index = folder / "model_index.json"
    assert (json.loads(index.read_text())["_class_name"] if index.exists() else None) == pipeline
    monkeypatch.chdir(folder)
    made = run_python(folder)
    assert Image.open("picture.png").size == (8, 8)

    denoiser = load_denoiser(find(runs / name), "raw")
    peer = peer_of(denoiser.prediction, name == "cosine")
    scheduler = made["pipeline"].scheduler if pipeline else made["scheduler"]
    noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    # Theirs begins EDM's walk with a variance of sigma_max^2 + 1
    x = scheduler.init_noise_sigma * noise if peer.scales else noise
    monkeypatch.setitem(globals(), "STEPS", 50)
    sampler = Ancestral(50, grid_of(peer, denoiser.schedule), clip=pipeline == "DDIMPipeline")
    if pipeline == "ConsistencyModelPipeline" and peer.config.get("clip_sample"):
        sampler = Diffusers(50, sampler.grid, clip=False)
    labels = None if label is None else torch.full((16,), label)
    with torch.no_grad():
        walk = list(sampler.walk(lambda x, t: denoiser(x, t, labels), denoiser.schedule, x, lambda *_: x))
    expected = (walk[-1].x.clamp(-1, 1) + 1) * 127.5
    shown = np.stack([np.asarray(image) for image in made["images"]]) if pipeline else made["pictures"]
    got = torch.as_tensor(shown).reshape(16, 1, 8, 8).float()
    assert (got - expected).abs().max() < 0.51, "pixels are rounded"


def test_diffusers_own_loader_takes_the_folder_apart(runs: Path, tmp_path: Path) -> None:
    folder = asked(runs / "cosine", "to=diffusers", "label=none", f"out={tmp_path / 'it'}")
    loaded = diffusers.DiffusionPipeline.from_pretrained(str(folder))
    assert isinstance(loaded, diffusers.DDIMPipeline) and isinstance(loaded.unet, diffusers.UNet2DModel)
    other = diffusers.DPMSolverMultistepScheduler.from_config(loaded.scheduler.config)  # another sampler of theirs
    assert other.config.prediction_type == "epsilon" and other.config.beta_schedule == "squaredcos_cap_v2"
    sums = json.loads((folder / "export.json").read_text())["files"]
    assert {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"} <= sums.keys()
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("gated", (), "diffusers has no UNetGated: UNet and DiT and UNet2DCondition map"),
        ("flow", ("label=all",), "label=all: a single class is told for good, or none"),
        ("flow", ("label=42",), "label=42: "),
        ("edm", ("label=3",), "label=3: this network was trained without labels"),
    ],
)
def test_runs_that_do_not_map(name: str, words: tuple[str, ...], says: str, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        asked(runs / name, "to=diffusers", f"out={tmp_path / 'it'}", *words)
    assert says in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "it").exists()
