"""Learned variances: the bound is its formula, reaches v alone, is least at the true variance; walks are those of diffusers."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from closed_form import close, f64, name, pictures
from test_export import asked
from test_sampling import ask
from test_sampling import pictures as images
from test_terms import objective
from tiny import SMALL_NETWORK, changed, compose, train, words
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from walks import fresh, make, ours

from diffusion_cli import config
from diffusion_cli.assembly import objective_of, rehearse
from diffusion_cli.data import Batch
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.errors import ConfigError
from diffusion_cli.exporting.parcel import MEAN_ALONE, Model
from diffusion_cli.finding import find, load_denoiser
from diffusion_cli.guidance import CFG, Unguided
from diffusion_cli.initial import begin
from diffusion_cli.losses import MSE, Discrete, Hybrid, Loss, One, Told
from diffusion_cli.losses.hybrid import HALF, bits, log_level, spread
from diffusion_cli.models import Network
from diffusion_cli.predictions import V
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Ancestral, Trailing, Varied, last
from diffusion_cli.schedules import EDM, VP, Betas, Flow, Schedule
from diffusion_cli.walking import walk

TABLES = [Betas(), Betas("cosine"), Betas(zero_terminal_snr=True), VP(), Flow(), EDM()]
HYBRID = ("objective/term=hybrid", "loss=ddpm", "schedule=ddpm", "prediction=eps", "sampler=ddpm", "sampler.variance=learned")


@pytest.mark.parametrize("schedule", TABLES, ids=name)
def test_a_step_costs_the_divergence_of_two_normals(schedule: Schedule) -> None:
    """Against torch.distributions, the posterior by Bayes' rule of N(alpha_s x0, sigma_s^2), N(alpha_t / alpha_s x_s, beta)."""
    x0, foreseen, v = pictures(3), 0.7 * pictures(3, seed=1), torch.rand(3, *pictures(1).shape[1:], dtype=torch.float64)
    t, s = f64(0.05, 0.4, 1.0), f64(0.03, 0.39, 0.6)
    found = bits(schedule, x0, foreseen, v, t, s)
    for i in range(3):
        alpha, sigma, alpha_s, sigma_s = (f(u[i]) for u in (t, s) for f in (schedule.alpha, schedule.sigma))
        x, a = alpha * x0[i] + sigma * 0.3, alpha / alpha_s
        beta = sigma**2 - a**2 * sigma_s**2
        precision = 1 / sigma_s**2 + a**2 / beta
        mean = lambda y: (alpha_s * y / sigma_s**2 + a * x / beta) / precision  # noqa: B023, E731
        spread_p = torch.exp((v[i] * beta.log() - (1 - v[i]) * precision.log()) / 2)
        wanted = kl_divergence(Normal(mean(x0[i]), precision**-0.5), Normal(mean(foreseen[i]), spread_p))
        close(found[i], wanted.mean() / math.log(2), 1e-7 * max(1, float(found[i])))


def test_the_last_step_costs_the_share_of_a_grey_level() -> None:
    """All 256 shares add up to 1, the inner ones are those of torch.distributions, and so is the cost of the step."""
    mean, log_variance = f64(-1.01, -0.3, 0.999).view(3, 1), f64(-9.0, -7.0, -4.0).view(3, 1)
    levels = torch.arange(256, dtype=torch.float64) * 2 * HALF - 1
    shares = log_level(levels.expand(3, -1), mean, log_variance).exp()
    close(shares.sum(1), torch.ones(3, dtype=torch.float64), 1e-9)
    there = Normal(mean, torch.exp(log_variance / 2))
    close(shares[:, 1:-1], (there.cdf(levels + HALF) - there.cdf(levels - HALF))[:, 1:-1], 1e-11)
    x0, foreseen, v = (
        levels[torch.tensor([[3, 200]])].view(1, 1, 1, 2),
        f64(-0.9, 0.5).view(1, 1, 1, 2),
        f64(0.2, 0.9).view(1, 1, 1, 2),
    )
    low, high, _ = spread(Betas(), f64(1e-3), f64(0.0))
    close(low, spread(Betas(), f64(2e-3), f64(1e-3))[0], 1e-12)
    wanted = -log_level(x0, foreseen, v * high + (1 - v) * low).mean() / math.log(2)
    close(bits(Betas(), x0, foreseen, v, f64(1e-3), f64(0.0))[0], wanted, 1e-12)


def true_share(schedule: Schedule, t: Tensor, s: Tensor, scale: float) -> Tensor:
    """v of N(0, scale^2) data: the variance of x_s given x_t is beta~ and what is not known of x0, through the mean."""
    low, high, factor = spread(schedule, t, s)
    of_x0 = scale**2 * schedule.sigma(t) ** 2 / (schedule.alpha(t) ** 2 * scale**2 + schedule.sigma(t) ** 2)
    return (torch.log(torch.where(s == 0, 0, low.exp()) + factor**2 * of_x0) - low) / (high - low)


def test_training_finds_the_variance_of_gaussian_data() -> None:
    """A share v for each of ten steps, learned by the term of 2,000 numbers a step with the exact mean, from 1/2."""
    schedule, scale, steps, count = VP(), 0.5, 10, 2_000
    t = torch.arange(2, steps + 1).double() / steps
    x0, noise = torch.randn(2, 9, 1, 1, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = scale * x0
    over = lambda c: c[:, None, None, None]  # noqa: E731
    alpha, sigma = over(schedule.alpha(t)), over(schedule.sigma(t))
    foreseen = alpha * scale**2 / (alpha**2 * scale**2 + sigma**2) * (alpha * x0 + sigma * noise)
    F = (alpha * (alpha * x0 + sigma * noise) - foreseen) / sigma  # as V has it
    loss, v = Loss(Discrete(steps), MSE(), One()), torch.full((9,), 0.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([v], lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        Hybrid(1.0)(Told(x0, noise, t, t, F, [], over(v).expand_as(x0)), V(schedule), loss).sum().backward()
        optimizer.step()
    wanted = true_share(schedule, t, t - 1 / steps, scale)
    assert float(wanted.min()) > 0.1 and float((wanted - 0.5).abs().max()) > 0.2
    close(v.detach(), wanted, 0.05)


@pytest.mark.parametrize("schedule", [Betas(), VP(), Flow()], ids=name)
def test_with_the_true_variance_a_walk_of_few_steps_keeps_the_law_of_gaussian_data(schedule: Schedule) -> None:
    """Five steps, exactly: a walk is linear in its start and in each noise. The posterior's variance makes it too narrow."""
    scale, sampler = 0.5, make(Ancestral, 5, eta=1.0, variance="learned")
    times = sampler.times(schedule)
    shares = iter(true_share(schedule, t[None], s[None], scale) for t, s in pairwise(times))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * scale**2 / (alpha**2 * scale**2 + sigma**2) * x

    v = [next(shares) for _ in times[:-2]]

    def spread_of(sampler: Ancestral) -> float:
        found, start = 0.0, torch.sqrt(schedule.alpha(times[0]) ** 2 * scale**2 + schedule.sigma(times[0]) ** 2)
        for which in range(-1, 4):
            said = iter(v)
            ask = Varied(denoise, lambda said=said: next(said)) if sampler.varied else denoise
            noise = lambda i, _=0, which=which: f64(float(i == which)).view(1, 1, 1, 1)  # noqa: E731
            x = start * f64(float(which == -1)).view(1, 1, 1, 1)
            found += float(list(sampler.walk(ask, schedule, x, noise))[-2].x) ** 2
        return found

    wanted = float(schedule.alpha(times[-2]) ** 2 * scale**2 + schedule.sigma(times[-2]) ** 2)
    assert abs(spread_of(sampler) / wanted - 1) < 1e-9
    assert spread_of(make(Ancestral, 5, eta=1.0)) < 0.98 * wanted


@pytest.mark.parametrize("steps", [250, 25])
def test_a_step_is_that_of_diffusers(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    from diffusers.schedulers import scheduling_ddpm

    schedule, x = Betas(), pictures(2)
    peer = scheduling_ddpm.DDPMScheduler(clip_sample=False, timestep_spacing="trailing", variance_type="learned_range")
    peer.alphas_cumprod, peer.one = schedule.alpha_bar, f64(1.0)[0]
    peer.set_timesteps(steps)
    F = lambda x, k: torch.cat([0.9 * x, torch.sin(5 * x + k)], dim=1)  # noqa: E731
    states = [x]
    for i, k in enumerate(peer.timesteps):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: fresh(x)(i))  # noqa: B023
        states.append(peer.step(F(states[-1], k), k, states[-1]).prev_sample)
    said = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        eps, raw = F(x, torch.round(1000 * t) - 1).chunk(2, dim=1)
        said[:] = [(raw + 1) / 2]
        return (x - schedule.sigma(t) * eps) / schedule.alpha(t)

    sampler = make(Ancestral, steps, Trailing(), eta=1.0, variance="learned")
    got = list(sampler.walk(Varied(denoise, lambda: said[0]), schedule, x, fresh(x)))
    # theirs adds noise on the last trailing step, too, where that is of more than one index; ours ends in the picture itself
    assert max(float((a.x - b).abs().max()) for a, b in zip(got[:-1], states[:-1], strict=True)) < 1e-5
    small = ours(make(Ancestral, steps, Trailing(), eta=1.0), schedule, x)
    assert float((small[1] - got[1].x).abs().max()) > 1e-3, "a variance of its own"


def test_the_bound_reaches_v_alone() -> None:
    """Of the last layer, the rows of the mean get no gradient from the term."""
    made = objective(*HYBRID)
    network, batch, source = (
        made.denoiser.network,
        Batch(torch.rand(8, 1, 8, 8) * 2 - 1, None, torch.arange(8)),
        Source(0, torch.arange(8)),
    )
    t, _ = made.criterion.draw(made.denoiser.schedule, source)
    noise = torch.randn(8, 1, 8, 8)
    F, v = made.denoiser.output(made.denoiser.schedule.mix(batch.x, noise, t), t)
    assert F.shape == v.shape == batch.x.shape and network.conv_out.weight.shape[0] == 2
    assert made.term is not None and not made.coupled
    added = made.term(Told(batch.x, noise, t, t, F, [], v), made.denoiser.prediction, made.criterion)
    added.mean().backward()
    grad = network.conv_out.weight.grad
    assert float(grad[:1].abs().max()) == 0 and float(grad[1:].abs().max()) > 1e-6
    network.zero_grad()
    losses, tallies = made.loss(batch, source)
    assert float(tallies["term"].sums) > 0 and bool(torch.isfinite(losses).all())


class OfLabel(Network):
    """Answers 0; v is 1 for label 0 and 0 where nothing is told."""

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        told = (self.labels(x, cond) == 0).to(x)[:, None, None, None]
        return torch.cat([0 * x, (2 * told - 1).expand_as(x)], dim=1)


@pytest.mark.parametrize("guidance", [Unguided(), CFG(3.0), CFG(3.0, interval=(0.1, 1.0))], ids=str)
def test_guidance_leaves_the_variance_to_what_is_told(guidance) -> None:
    denoiser, source = Denoiser(OfLabel(1, 4, 3, variance_channels=1), V(VP())), Source(0, torch.arange(2))
    learned = make(Ancestral, 6, eta=1.0, variance="learned")
    for label, variance in ((0, "large"), (2, "small")):
        told = torch.full((2,), label)
        found = last(walk(denoiser, learned, source, told, guidance)).x
        wanted = last(walk(denoiser, replace(learned, variance=variance), source, told)).x
        close(found, wanted, 1e-6)
    assert denoiser.note is None, "what is noted belongs to a walk"


def test_what_cannot_be_is_refused_before_any_data_is_read() -> None:
    compose_ = lambda *more: compose(*words(Path("unused"), *HYBRID, *more))  # noqa: E731
    with pytest.raises(ConfigError, match="UViT says none"):
        config.check_train(compose_("model=uvit", *(f"{word.partition('=')[0]}=DEFAULT" for word in SMALL_NETWORK)))
    with pytest.raises(ConfigError, match="this network has learned none"):
        rehearse(config.check_train(compose_("objective/term=contrastive")).node)
    node = config.check_train(compose_()).node
    rehearse(node)
    for more, line in {
        ("loss=simple",): "the steps of a table",
        ("schedule=mix", "prediction=v"): "white Gaussian noise",
    }.items():
        with pytest.raises(ConfigError, match=line):
            rehearse(config.check_train(compose(*words(Path("unused"), *HYBRID, *more))).node)
    with pytest.raises(ConfigError, match="at least 2"):
        rehearse(changed(node, "loss.times.steps=1"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("hybrid"), *HYBRID)


def test_it_is_sampled_by_every_walk_and_learned_is_refused_elsewhere(run: Path, tmp_path: Path) -> None:
    plain = train(tmp_path, *HYBRID[1:-1], name="plain")
    own, ddim, small = (
        images(ask(run, tmp_path / f"{i}", *word))
        for i, word in enumerate([(), ("sampler=ddim",), ("sampler=ddpm", "sampler.steps=2")])
    )
    assert own.shape == ddim.shape and np.abs(own - small).max() > 0 < np.abs(ddim - small).max()
    learned = ("sampler=ddpm", "sampler.steps=2", "sampler.variance=learned")
    assert np.array_equal(images(ask(run, tmp_path / "again", *learned)), own)
    with pytest.raises(ConfigError, match="this network has learned none"):
        ask(plain, tmp_path / "no", *learned)
    with pytest.raises(ConfigError, match="is of a free walk"):
        ask(
            run,
            tmp_path / "no",
            "edit=inpaint",
            "init=" + str(sorted((tmp_path / "0").glob("0*.png"))[0]),
            "edit.box=[2,2,6,6]",
        )


@pytest.mark.parametrize("way", ["to", "from"])
def test_training_goes_on_with_a_variance_and_without(way: str, run: Path, tmp_path: Path) -> None:
    """The mean's rows stay what they were; those of a new variance begin as zeros, in the middle of both extremes."""
    first = run if way == "from" else train(tmp_path, *HYBRID[1:-1], name="plain")
    more = ("objective/term=hybrid", "loss=ddpm") if way == "to" else ("objective.term=null",)
    plan = config.planned(compose(*words(tmp_path, f"init={first}", *more)), [f"init={first}", *more, "sampler=ddpm"])
    found = find(first)
    made = objective_of(plan.node, found.config["facts"])
    begin(made, found, None, found.config["facts"])
    one, two = load_denoiser(found, "ema"), made.denoiser.eval()
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 1.0])
    close(one.output(x, t)[0], two.output(x, t)[0], 1e-6)
    v = two.output(x, t)[1]
    assert (v is None) if way == "from" else bool((v == 0.5).all())


def test_a_run_is_exported_and_read_again(run: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    asked(run, "to=diffusers", f"out={tmp_path / 'it'}")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "it")
    assert pipeline.scheduler.config.variance_type == "learned_range" and pipeline.unet.config.out_channels == 2
    one, two = (load_denoiser(find(place), "ema") for place in (run, tmp_path / "it"))
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 1.0])
    for ours_, theirs in zip(one.output(x, t), two.output(x, t), strict=True):
        close(ours_, theirs, 1e-6)
    assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
    asked(run, "to=torch_export", f"out={tmp_path / 'graph'}")
    cards = [(tmp_path / name / "README.md").read_text() for name in ("it", "graph")]
    assert [MEAN_ALONE in card for card in cards] == [False, True]
    mean = Model(find(run), one, config.check_export(compose(f"ckpt={run}", "to=onnx", primary="export"))).of_mean().denoiser
    assert mean.network.variance_channels == 0
    close(mean.output(x, t)[0], one.output(x, t)[0], 1e-6)
