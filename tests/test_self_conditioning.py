"""Self-conditioning: the network is told what it foresaw before, in training a first guess, in sampling its last answer."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import compose, figures, hashes, stopped, train, words
from torch import Tensor

from diffusion_cli import config
from diffusion_cli.assembly import Facts, objective_of
from diffusion_cli.commands.sample import with_scale
from diffusion_cli.data import Batch
from diffusion_cli.denoiser import HINT_RANGE
from diffusion_cli.editing import PureNoise
from diffusion_cli.guidance import CFG, Guided, Unguided
from diffusion_cli.objectives import Denoising
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Heun, Uniform, last
from diffusion_cli.sampling import sample
from diffusion_cli.walking import remembering, walk

TOLD = ("objective.self_conditioning=0.5", "model.dropout=0.2", "dataset.labels=true")


def objective(share: float, tmp: Path = Path("unused")) -> Denoising:
    """Stirred, so that its answers are not those of a fresh network, which are 0."""
    node = config.check_train(compose(*words(tmp, f"objective.self_conditioning={share}", "dataset.labels=true"))).node
    facts = Facts(channels=1, image_size=8, classes=list("0123456789"), taught=list(range(10)), fingerprint="")
    made = objective_of(node, facts)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    assert isinstance(made, Denoising)
    return made.eval()


def batch(count: int = 64) -> tuple[Batch, Source]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1
    return Batch(x, torch.arange(count) % 10, torch.arange(count)), Source(0, torch.arange(count), 5)


def gradient(made: Denoising, loss: Tensor) -> Tensor:
    made.zero_grad()
    loss.mean().backward()
    return torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])


def recorded(made: Denoising, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The x that the network is given, at each call."""
    seen: list[Tensor] = []
    made.denoiser.network.register_forward_pre_hook(lambda network, given: seen.append(given[0].detach().clone()))
    return seen


def test_some_pictures_have_the_first_guess_for_a_hint_and_the_others_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made = objective(0.5)
    seen = recorded(made, monkeypatch)
    data, source = batch(256)
    made.loss(data, source)
    first, second = seen
    assert torch.equal(first[:, :1], second[:, :1]) and not first[:, 1:].any(), "the same x_t, and no hint at first"
    told = second[:, 1:].flatten(1).abs().sum(1) > 0
    assert 96 < int(told.sum()) < 160, "about half of them"
    with torch.no_grad():
        t, _ = made.criterion.draw(made.denoiser.schedule, source)
        guess = made.denoiser(first[:, :1], t, made._told(data, source))
    assert (second[told, 1:] - guess[told].clamp(-HINT_RANGE, HINT_RANGE)).abs().max() < 1e-6
    for share, count in ((1.0, 256), (0.0, 0)):
        made.self_conditioning = share
        seen.clear()
        made.loss(data, source)
        assert int((seen[-1][:, 1:].flatten(1).abs().sum(1) > 0).sum()) == count
        assert len(seen) == (2 if share else 1), "no share, no second question"


def test_no_gradient_flows_through_the_guess() -> None:
    made = objective(1.0)
    data, source = batch()
    got = gradient(made, made.loss(data, source)[0])
    denoiser, schedule = made.denoiser, made.denoiser.schedule
    t, correction = made.criterion.draw(schedule, source)
    noise = schedule.noise(source, "noise", (1, 8, 8))
    x, labels = schedule.mix(data.x, noise, t), made._told(data, source)
    hint = denoiser(x, t, labels).detach()
    F = denoiser.output(x, t, labels, hint)[0]
    wanted = gradient(made, made.criterion(F, denoiser.prediction.target(data.x, noise, t), t, correction, denoiser.prediction))
    assert (got - wanted).abs().max() < 1e-6 and wanted.abs().max() > 1e-3


def test_gradients_survive_autocast() -> None:
    """Weights that were cast for the first guess, without gradient, must not serve the question that is trained."""
    made = objective(0.5)
    data, source = batch()
    full = gradient(made, made.loss(data, source)[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss = made.loss(data, source)[0]
    half = gradient(made, loss)
    assert half.shape == full.shape and float(torch.nn.functional.cosine_similarity(half, full, dim=0)) > 0.99


def test_with_zero_weights_on_the_hint_it_is_the_plain_network() -> None:
    plain, told = objective(0.0), objective(1.0)
    assert plain.denoiser.network.hint_channels == 0 and told.denoiser.network.hint_channels == 1
    state = copy.deepcopy(plain.state_dict())
    key = "denoiser.network.conv_in.weight"
    state[key] = torch.cat([state[key], torch.zeros_like(state[key])], dim=1)
    told.load_state_dict(state)
    data, source = batch()
    assert (plain.loss(data, source)[0] - told.loss(data, source)[0]).abs().max() < 1e-6
    ids = Source(0, torch.arange(4))
    sampler = Heun(4, Uniform(), False)
    with torch.no_grad():
        x, y = (last(walk(made.denoiser, sampler, ids, torch.arange(4), CFG(2.0))).x for made in (plain, told))
    assert (x - y).abs().max() < 1e-5


def test_each_answer_is_the_hint_of_the_next_question() -> None:
    """Also of the second question of a step; a new walk begins with none; clipping or guiding does not come between."""
    hints: list[Tensor | None] = []

    def guided(x: Tensor, t: Tensor, hint: Tensor | None) -> Tensor:
        hints.append(hint)
        return x * 0.5 + t.float()

    question: Guided = guided
    for _ in range(2):
        hints.clear()
        ask, answers = remembering(question), []
        for t in torch.tensor([1.0, 0.7, 0.3]):
            answers.append(ask(torch.ones(2, 1, 2, 2), t))
        assert hints[0] is None
        assert all(hint is not None and torch.equal(hint, a) for hint, a in zip(hints[1:], answers[:-1], strict=True))


@pytest.mark.parametrize("guidance", [Unguided(), CFG(3.0)], ids=["told", "guided"])
def test_the_network_sees_its_last_answer_along_a_walk(guidance: Unguided | CFG, monkeypatch: pytest.MonkeyPatch) -> None:
    made = objective(0.5)
    seen = recorded(made, monkeypatch)
    with torch.no_grad():
        states = list(walk(made.denoiser, Heun(3, Uniform(), False), Source(0, torch.arange(2)), torch.arange(2), guidance,
                           PureNoise()))  # fmt: skip
    assert len(seen) == 5 and not seen[0][:, 1:].any(), "two a step, but for the last"
    assert len(seen[0]) == (4 if isinstance(guidance, CFG) else 2)
    for call, state in ((1, states[0]), (3, states[1])):  # the second question of a step knows the first's answer
        for half in seen[call][:, 1:].split(2):
            assert (half - state.x0.clamp(-HINT_RANGE, HINT_RANGE)).abs().max() < 1e-6
    made.denoiser.output(
        torch.zeros(1, 1, 8, 8), torch.tensor(0.5), torch.zeros(1, dtype=torch.long), torch.full((1, 1, 8, 8), 1e6)
    )[0]
    assert seen[-1].max() == HINT_RANGE


def test_it_resumes_to_the_bit(tmp_path: Path) -> None:
    base = ("trainer.steps=8", "trainer.save_every=0", "trainer.report_every=2", "trainer.evaluate_every=4", *TOLD)
    whole = train(tmp_path / "whole", *base)
    for stop in (3, 6):
        stopped(tmp_path / "parts", stop, *base)
    parts = train(tmp_path / "parts", *base)
    assert hashes(parts) == hashes(whole) and figures(parts) == figures(whole)
    other = train(tmp_path / "other", *base, "objective.self_conditioning=0.9")
    assert hashes(other) != hashes(whole), "the share matters"


def test_it_trains_and_samples(tmp_path: Path) -> None:
    run = train(tmp_path, "trainer.steps=30", "trainer.save_every=30", "optimizer.lr=3e-3", *TOLD)
    losses = [row["train/loss"] for row in figures(run) if "train/loss" in row]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])

    def made(out: str, *more: str) -> np.ndarray:
        asked = [
            f"ckpt={run}",
            "n=4",
            "batch=4",
            "device=cpu",
            "sampler.steps=4",
            f"out={tmp_path / out}",
            *with_scale(list(more)),
        ]
        merged = {word.partition("=")[0]: word for word in asked}
        folder = sample(config.check_sample(compose(*merged.values(), primary="sample")))
        return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]).astype(int)

    for words_of_it in ((), ("guidance=2",), ("sampler=dpmpp_2m",)):
        name = "-".join(words_of_it).replace("=", "_") or "plain"
        four, ones = made(name, *words_of_it), made(name + "1", *words_of_it, "batch=1")
        assert np.abs(four - ones).max() <= 1 and four.std() > 5
    config_of_it = json.loads(next((run / "checkpoints").glob("step_*")).joinpath("config.json").read_text())["config"]
    assert config_of_it["objective"]["self_conditioning"] == 0.5
