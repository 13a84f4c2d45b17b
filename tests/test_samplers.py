"""Samplers against closed forms: order of convergence, exact laws, published formulas, and diffusers number for number.

float64. Peers that round their state to float32 are held to what float32 leaves; the others to 1e-10.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from closed_form import (
    FAMILIES,
    GRIDS,
    SCHEDULES,
    Gaussian,
    Mixture,
    close,
    concrete,
    distance_from_uniform,
    f64,
    name,
    pictures,
)

from diffusion_cli.randomness import Source
from diffusion_cli.samplers import (
    Ancestral,
    Beta,
    DPMpp2M,
    Grid,
    Heun,
    Karras,
    Leading,
    Linspace,
    LogSNR,
    Own,
    Quadratic,
    Sampler,
    Tail,
    Trailing,
    Uniform,
    last,
)
from diffusion_cli.schedules import EDM, VE, VP, Betas, Flow, Shifted

every_sampler = pytest.mark.parametrize("kind", concrete(Sampler), ids=name)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=name)
every = pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
ZERO, ONE = f64(0.0)[0], f64(1.0)[0]


def make(kind: type[Sampler], steps: int, grid: Grid | None = None, clip: bool = False, **rest) -> Sampler:
    return kind(steps=steps, grid=grid or Own(), clip=clip, **rest)


def fresh(like: torch.Tensor, seed: int = 0, first: int = 0):
    """Counted noise for a walk over pictures like these, in float64."""
    slots = torch.arange(first, first + len(like))
    return lambda step, which=0: Source(seed, slots, step).normal(f"sample {which}", like.shape[1:]).to(like)


def no_noise(step: int, which: int = 0) -> torch.Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


# ---------------------------------------------------------------------------- the fixtures themselves


@pytest.mark.parametrize("schedule", FAMILIES, ids=name)
def test_the_closed_forms_agree_with_each_other(schedule):
    one, two = Gaussian(0.3, 0.5), Mixture((0.4, 0.6), (0.3, 0.3), (0.5, 0.5))
    x, t, s = torch.linspace(-2, 2, 9, dtype=torch.float64), f64(0.8)[0], f64(0.3)[0]
    x = x * one.spread(schedule, t)
    close(two.denoise(schedule)(x, t), one.denoise(schedule)(x, t), 1e-12)
    close(two.carry(schedule, x, t, s), one.carry(schedule, x, t, s), 1e-9)


# ---------------------------------------------------------------------------- order of convergence


def order_of(steps: list[int], errors: list[float]) -> float:
    """The slope of log(error) against log(1 / steps)."""
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


ORDER = {Ancestral: 1, Heun: 2, DPMpp2M: 2}  # a new sampler is held to order 1 until it is named here


def walk_error(kind: type[Sampler], schedule, data, grid: Grid, steps: int) -> float:
    """Distance from the exact probability flow at the last time above 0 (the jump to 0 has a test of its own)."""
    sampler = make(kind, steps, grid)
    start, end = (grid.times(steps, schedule)[i] for i in (0, -2))
    x = schedule.sigma(start) * torch.linspace(-1.5, 1.5, 7, dtype=torch.float64) + 0.1
    state = list(sampler.walk(data.denoise(schedule), schedule, x, no_noise))[-2]
    assert state.t == end
    return float((state.x - data.carry(schedule, x, start, end)).abs().max())


@pytest.mark.parametrize("data", [Gaussian(), Mixture()], ids=name)
@pytest.mark.parametrize("schedule", FAMILIES, ids=name)
@every_sampler
def test_order_of_convergence(kind, schedule, data):
    grid = Karras(sigma_min=0.02, sigma_max=50.0, rho=3.0)
    steps = [64, 128, 256]
    errors = [walk_error(kind, schedule, data, grid, n) for n in steps]
    order = ORDER.get(kind, 1)
    assert order - 0.1 < order_of(steps, errors) < order + 0.3
    assert errors[-1] < (0.02 if order == 1 else 2e-3)


@pytest.mark.parametrize("data", [Gaussian(), Mixture()], ids=name)
@every_sampler
def test_order_of_convergence_from_pure_noise_on_the_straight_line(kind, data):
    """From alpha = 0 itself, and all the way to the picture."""
    schedule, steps, errors = Flow(), [64, 128, 256], []
    for n in steps:
        x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
        end = last(make(kind, n, Uniform()).walk(data.denoise(schedule), schedule, x, no_noise)).x
        errors.append(float((end - data.carry(schedule, x, ONE, ZERO)).abs().max()))
    # DPM-Solver++ steps in lambda, where equal steps in t are uneven at both ends: h^2 log(1 / h), which is seen as 1.7
    assert order_of(steps, errors) > ORDER.get(kind, 1) - 0.4


# ---------------------------------------------------------------------------- one move by published formulas


def one_move(sampler: Sampler, schedule, x, x0, t, s, z) -> torch.Tensor:
    """x at s from x at t when the denoiser says x0 and the fresh noise is z."""
    times = torch.stack([t, s, ZERO]) if s > 0 else torch.stack([t, s])
    return list(sampler.moves(lambda *_: x0, schedule, x, times, lambda step: z))[1].x


MOVES = [(1.0, 0.9), (0.9, 0.899), (0.5, 0.1), (0.03, 0.001)]


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("schedule", [VP(), Betas(), Betas("cosine"), Betas(zero_terminal_snr=True)], ids=name)
def test_ancestral_is_ddpms_posterior(schedule, variance):
    x, x0, z = pictures(3, 1), pictures(3, 2), pictures(3, 3)
    for t, s in (f64(*m) for m in MOVES):
        bar_t, bar_s = schedule.alpha(t) ** 2, schedule.alpha(s) ** 2
        beta = 1 - bar_t / bar_s
        # Ho et al. 2020, eq. 7 and section 3.2
        mean = bar_s.sqrt() * beta / (1 - bar_t) * x0 + (1 - beta).sqrt() * (1 - bar_s) / (1 - bar_t) * x
        spread = {"small": (1 - bar_s) / (1 - bar_t) * beta, "large": beta}[variance].sqrt()
        sampler = make(Ancestral, 2, eta=1.0, variance=variance)
        close(one_move(sampler, schedule, x, x0, t, s, 0 * z), mean, 1e-10)
        close(one_move(sampler, schedule, x, x0, t, s, z) - mean, spread * z, 1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("schedule", [VP(), Betas("cosine")], ids=name)
def test_ancestral_is_ddims_family(schedule, eta):
    x, x0, z = pictures(3, 1), pictures(3, 2), pictures(3, 3)
    for t, s in (f64(*m) for m in MOVES):
        bar_t, bar_s = schedule.alpha(t) ** 2, schedule.alpha(s) ** 2
        spread = eta * torch.sqrt((1 - bar_s) / (1 - bar_t)) * torch.sqrt(1 - bar_t / bar_s)  # Song et al. 2021, eq. 16
        eps = (x - bar_t.sqrt() * x0) / (1 - bar_t).sqrt()
        wanted = bar_s.sqrt() * x0 + torch.sqrt(1 - bar_s - spread**2) * eps + spread * z  # eq. 12
        close(one_move(make(Ancestral, 2, eta=eta), schedule, x, x0, t, s, z), wanted, 1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("schedule", [EDM(), VE()], ids=name)
def test_ancestral_is_k_diffusions_euler_ancestral(schedule, eta):
    x, x0, z = pictures(3, 1), pictures(3, 2), pictures(3, 3)
    for t, s in (f64(*m) for m in [(1.0, 0.9), (0.9, 0.899), (0.5, 0.3)]):
        sigma_from, sigma_to = float(schedule.sigma(t)), float(schedule.sigma(s))
        # k_diffusion/sampling.py, get_ancestral_step and sample_euler_ancestral, as published
        sigma_up = min(sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
        sigma_down = (sigma_to**2 - sigma_up**2) ** 0.5
        wanted = x + (x - x0) / sigma_from * (sigma_down - sigma_from) + z * sigma_up
        close(one_move(make(Ancestral, 2, eta=eta), schedule, x, x0, t, s, z), wanted, 1e-11 * max(1, sigma_from))


@every
def test_without_noise_ancestral_is_transfer(schedule):
    x, x0 = pictures(3, 1), pictures(3, 2)
    for t, s in (f64(*m) for m in [*MOVES[:3], (0.2, 0.0), (1.0, 0.0)]):
        got = one_move(make(Ancestral, 2), schedule, x, x0, t, s, None)
        close(got, schedule.transfer(x, x0, t, s), 1e-10 * float(schedule.sigma(ONE).clamp(min=1)))


@pytest.mark.parametrize("schedule", [EDM(), VE()], ids=name)
def test_heun_is_algorithm_1_of_karras(schedule):
    sampler, denoise = make(Heun, 6, Karras()), Mixture().denoise(schedule)
    states = list(sampler.walk(denoise, schedule, 40 * pictures(2), no_noise))
    for (_, t, x, _), (_, s, got, _) in pairwise(states):
        sigma_t, sigma_s = schedule.sigma(t), schedule.sigma(s)
        d = (x - denoise(x, t)) / sigma_t
        wanted = x + (sigma_s - sigma_t) * d
        if sigma_s > 0:
            wanted = x + (sigma_s - sigma_t) * (d + (wanted - denoise(wanted, s)) / sigma_s) / 2
        close(got, wanted, 1e-10)


def test_heun_on_the_straight_line_is_heuns_rule_in_t():
    schedule, denoise = Flow(), Mixture().denoise(Flow())

    def velocity(x, t):
        return (x - denoise(x, t)) / t

    states = list(make(Heun, 6).walk(denoise, schedule, pictures(2), no_noise))
    for (_, t, x, _), (_, s, got, _) in pairwise(states[:-1]):
        d = velocity(x, t)
        close(got, x + (s - t) * (d + velocity(x + (s - t) * d, s)) / 2, 1e-12)


@pytest.mark.parametrize("schedule", FAMILIES, ids=name)
def test_dpmpp_is_algorithm_2_of_lu(schedule):
    grid, denoise = LogSNR(-6, 6), Mixture().denoise(schedule)
    states = list(make(DPMpp2M, 7, grid).walk(denoise, schedule, pictures(2), no_noise))
    times = grid.times(7, schedule)
    alpha, sigma, lam = schedule.alpha(times), schedule.sigma(times), schedule.log_snr(times) / 2
    x0 = [denoise(s.x, s.t) for s in states[:-1]]
    for i in range(1, 6):  # the last move, to lambda = inf, is of order 1
        h, r = lam[i + 1] - lam[i], (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
        D = (1 + 1 / (2 * r)) * x0[i] - x0[i - 1] / (2 * r)
        close(states[i + 1].x, sigma[i + 1] / sigma[i] * states[i].x - alpha[i + 1] * (torch.exp(-h) - 1) * D, 1e-9)
    close(states[1].x, schedule.transfer(states[0].x, x0[0], times[0], times[1]), 1e-12)


# ---------------------------------------------------------------------------- the law of what comes out


def law(sampler: Ancestral, schedule, data: Gaussian) -> tuple[float, float]:
    """Mean and variance of the result, exactly: a walk with a linear denoiser is linear in its start and in each noise.

    Row 0 starts at the mean and has no noise, row 1 starts one deviation away, row 2 + i has noise 1 at step i alone.
    """
    start, n = sampler.grid.times(sampler.steps, schedule)[0], sampler.steps
    x = (schedule.alpha(start) * data.m).expand(n + 2, 1, 1, 1).clone()
    x[1] += data.spread(schedule, start)
    basis = torch.eye(n + 2, dtype=torch.float64)[:, 2:].view(n + 2, 1, 1, 1, n)
    end = last(sampler.walk(data.denoise(schedule), schedule, x, lambda step: basis[..., step])).x.flatten()
    return float(end[0]), float(((end[1:] - end[0]) ** 2).sum())


@pytest.mark.parametrize("eta, variance", [(0.0, "small"), (0.5, "small"), (1.0, "small"), (1.0, "large")])
@pytest.mark.parametrize("schedule", FAMILIES, ids=name)
def test_the_law_of_the_samples_tends_to_that_of_the_data(schedule, eta, variance):
    data, steps, spreads = Gaussian(0.3, 0.5), [50, 100, 200], []
    for n in steps:
        sampler = make(Ancestral, n, Karras(0.01, 40.0, 3.0), eta=eta, variance=variance)
        mean, spread = law(sampler, schedule, data)
        assert abs(mean - data.m) < 1e-10
        spreads.append(spread)
    errors = [abs(v - data.s**2) for v in spreads]
    assert order_of(steps, errors) > 0.8
    limit = 2 * spreads[-1] - spreads[-2]  # Richardson's: the error of order 1 taken away
    assert abs(limit - data.s**2) < 0.012 * data.s**2


def test_ddpm_draws_the_mixture():
    """Not linear, and with the counted noise itself: 4000 samples against the distribution function of the data."""
    schedule, data = Betas(), Mixture()
    x = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = make(Ancestral, 250, Trailing(), eta=1.0)
    end = last(sampler.walk(data.denoise(schedule), schedule, x, fresh(x))).x.flatten()
    assert distance_from_uniform(data.cdf(schedule, end, ZERO)) < 1.95 / math.sqrt(4000)


# ---------------------------------------------------------------------------- the contract of a walk


@pytest.mark.parametrize("steps", [1, 5])
@every_grid
@every_sampler
@every
def test_every_sampler_walks_every_schedule_on_every_grid(schedule, kind, grid, steps):
    sampler = make(kind, steps, grid)
    times = grid.times(steps, schedule)
    moves = len(times) - 1
    assert moves == steps or (isinstance(grid, Tail) and 1 <= moves <= steps)
    x = sampler.start(schedule, pictures(2))
    close(x, schedule.sigma(times[0]) * pictures(2), 1e-6)
    states = list(sampler.walk(Gaussian().denoise(schedule), schedule, x, fresh(x)))
    assert [s.step for s in states] == list(range(moves + 1))
    assert torch.equal(torch.stack([s.t for s in states]), times)
    assert times.dtype == torch.float64 and 0 < times[0] <= 1 and times[-1] == 0 and (times.diff() < 0).all()
    assert all(s.x.isfinite().all() and s.x0.isfinite().all() and s.x.shape == x.shape for s in states)
    assert torch.equal(states[0].x, x)
    assert torch.equal(states[-1].x, states[-1].x0)
    close(states[-1].x, states[-2].x0, 1e-12 * float(x.abs().max().clamp(min=1)))  # the last move adds and keeps no noise


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
@every
def test_a_noisy_walk_is_finite_and_ends_in_the_picture_foreseen(schedule, eta, variance):
    sampler = make(Ancestral, 6, Uniform(), eta=eta, variance=variance)
    asked = []

    def noise(step):
        asked.append(step)
        return pictures(2, step)

    states = list(sampler.walk(Gaussian().denoise(schedule), schedule, sampler.start(schedule, pictures(2)), noise))
    assert asked == [0, 1, 2, 3, 4]  # none on the last move
    assert all(s.x.isfinite().all() for s in states)
    close(states[-1].x, states[-2].x0, 1e-9)


@every_sampler
def test_calls_of_the_network_are_counted(kind):
    calls = {Ancestral: lambda n: n, DPMpp2M: lambda n: n, Heun: lambda n: 2 * n - 1}
    for steps in (1, 2, 9):
        asked = []

        def denoise(x, t, asked=asked):
            asked.append(float(t))
            return torch.zeros_like(x)

        last(make(kind, steps).walk(denoise, VP(), pictures(1), fresh(pictures(1))))
        assert min(asked) > 0
        if kind in calls:
            assert len(asked) == calls[kind](steps)


@every_sampler
@pytest.mark.parametrize("rest", [{}, {"eta": 1.0}], ids=["", "noisy"])
def test_a_picture_does_not_depend_on_the_batch_it_is_drawn_in(kind, rest):
    if rest and kind is not Ancestral:
        rest = {}
    sampler, schedule, x = make(kind, 6, **rest), VP(), pictures(5)
    ask = Mixture().denoise(schedule)
    whole = last(sampler.walk(ask, schedule, x, fresh(x))).x
    for i in range(5):
        alone = last(sampler.walk(ask, schedule, x[i : i + 1], fresh(x[i : i + 1], first=i))).x[0]
        close(alone, whole[i], 1e-12)


@every_sampler
def test_a_walk_asks_one_question_at_a_time(kind):
    """A generator: the state at t is there before the next move is asked for."""
    asked = []
    walk = make(kind, 4).walk(lambda x, t: asked.append(t) or x, VP(), pictures(1), fresh(pictures(1)))
    next(walk)
    assert len(asked) == 1


@every_sampler
def test_clipping_keeps_every_foreseen_picture_in_range(kind):
    schedule = VP()
    walk = make(kind, 5, clip=True).walk(lambda x, t: 3 * x, schedule, pictures(4), fresh(pictures(4)))
    foreseen = torch.stack([s.x0 for s in walk])
    assert foreseen.abs().max() == 1
    loose = make(kind, 5).walk(lambda x, t: 3 * x, schedule, pictures(4), fresh(pictures(4)))
    assert torch.stack([s.x0 for s in loose]).abs().max() > 1


# ---------------------------------------------------------------------------- diffusers, number for number
#
# Both sides get the same denoiser, times and noise. The peer's table is replaced by ours in float64 (test_schedules.py compares
# the tables), so that what is compared is the rule.

DATA = Mixture()


def told_by(schedule, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x0, eps) that the closed form gives for x at t."""
    x0 = DATA.denoise(schedule)(x, t)
    return x0, (x - schedule.alpha(t) * x0) / schedule.sigma(t)


def ours(sampler: Sampler, schedule, x: torch.Tensor) -> list[torch.Tensor]:
    return [s.x for s in sampler.walk(DATA.denoise(schedule), schedule, x, fresh(x))]


def same_states(got: list[torch.Tensor], wanted: list[torch.Tensor], atol: float) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        close(a, b.double(), atol)


SPACING = {"leading": Leading(), "linspace": Linspace(), "trailing": Trailing()}


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("spacing, steps, table", [("leading", 33, 1000), ("trailing", 20, 1000), ("linspace", 50, 50)])
@pytest.mark.parametrize("curve, theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_ddim_is_that_of_diffusers(eta, spacing, steps, table, curve, theirs):
    """With linspace and fewer steps than indices DDIMScheduler moves to index k - N // n, which is not where it asks next: it
    agrees with itself, and with us, on the full table alone."""
    from diffusers import DDIMScheduler

    schedule, x = Betas(curve, table), pictures(2)
    grid = type(SPACING[spacing])(table)
    peer = DDIMScheduler(table, clip_sample=False, timestep_spacing=spacing, beta_schedule=theirs)
    peer.alphas_cumprod, peer.final_alpha_cumprod = schedule.alpha_bar, ONE
    peer.set_timesteps(steps)
    states = [x]
    for i, k in enumerate(peer.timesteps):
        _, eps = told_by(schedule, states[-1], (k.double() + 1) / table)
        states.append(peer.step(eps, k, states[-1], eta=eta, variance_noise=fresh(x)(i)).prev_sample)
    same_states(ours(make(Ancestral, steps, grid, eta=eta), schedule, x), states, 1e-9)


def test_ddim_from_pure_noise_is_that_of_diffusers():
    """Lin et al. 2024: zero terminal signal, v and trailing steps."""
    from diffusers import DDIMScheduler

    schedule, x = Betas("scaled_linear", first=0.00085, last=0.012, zero_terminal_snr=True), pictures(2)
    peer = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction")
    peer.alphas_cumprod, peer.final_alpha_cumprod = schedule.alpha_bar, ONE
    peer.set_timesteps(20)
    states = [x]
    for k in peer.timesteps:
        t = (k.double() + 1) / 1000
        x0, eps = told_by(schedule, states[-1], t)
        states.append(peer.step(schedule.alpha(t) * eps - schedule.sigma(t) * x0, k, states[-1]).prev_sample)
    same_states(ours(make(Ancestral, 20, Trailing()), schedule, x), states, 1e-9)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("spacing, steps", [("trailing", 1000), ("trailing", 25), ("leading", 25), ("linspace", 30)])
def test_ddpm_is_that_of_diffusers(monkeypatch, variance, spacing, steps):
    from diffusers.schedulers import scheduling_ddpm

    schedule, x = Betas(), pictures(2)
    peer = scheduling_ddpm.DDPMScheduler(clip_sample=False, timestep_spacing=spacing, variance_type=f"fixed_{variance}")
    peer.alphas_cumprod, peer.one = schedule.alpha_bar, ONE
    peer.set_timesteps(steps)
    states = [x]
    for i, k in enumerate(peer.timesteps):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: fresh(x)(i))  # noqa: B023
        _, eps = told_by(schedule, states[-1], (k.double() + 1) / 1000)
        states.append(peer.step(eps, k, states[-1]).prev_sample)
    got = ours(make(Ancestral, steps, SPACING[spacing], eta=1.0, variance=variance), schedule, x)
    # small: they keep the variance above 1e-20, so their last trailing step adds noise of size 1e-10
    same_states(got[:-1], states[:-1], 1e-8)
    if variance == "large" and peer.timesteps[-1] > 0:
        # theirs adds the whole step's noise on the way to the picture too: a noisy picture, which is not what we return
        assert (got[-1] - states[-1]).abs().max() > 1e-3
    else:
        close(got[-1], states[-1], 1e-8)


def in_sigma(peer, schedule, times: torch.Tensor) -> None:
    """Gives a peer that counts in sigma / alpha our times: exactly, where its own are interpolated in float32."""
    ratio = torch.exp(-schedule.log_snr(times) / 2)
    peer.sigmas, peer.timesteps = ratio, times[:-1] * 1000
    peer.set_begin_index(0)


# These round the state to float32 at every step, in coordinates x / alpha of size up to 160, and 20,000 on the cosine table
FLOAT32 = 1e-4


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("schedule", [Betas(), Betas("cosine"), EDM(), VE()], ids=name)
def test_euler_is_that_of_diffusers(schedule, spacing):
    from diffusers import EulerDiscreteScheduler

    x, times = pictures(2), SPACING[spacing].times(25, schedule)
    peer = EulerDiscreteScheduler()
    in_sigma(peer, schedule, times)
    x, states = float(schedule.sigma(times[0])) * x, []
    y = x / schedule.alpha(times[0])
    states.append(x)
    for t, s in pairwise(times):
        peer.is_scale_input_called = True
        _, eps = told_by(schedule, y * schedule.alpha(t), t)
        y = peer.step(eps, t, y).prev_sample.double()
        states.append(y * schedule.alpha(s))
    same_states(ours(make(Ancestral, 25, SPACING[spacing]), schedule, x), states, FLOAT32)


@pytest.mark.parametrize("schedule", [Betas(), EDM(), VE()], ids=name)
def test_euler_ancestral_is_that_of_diffusers(monkeypatch, schedule):
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as module

    times = Linspace().times(25, schedule)
    peer = module.EulerAncestralDiscreteScheduler()
    in_sigma(peer, schedule, times)
    x = float(schedule.sigma(times[0])) * pictures(2)
    y, states = x / schedule.alpha(times[0]), [x]
    for i, (t, s) in enumerate(pairwise(times)):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: fresh(x)(i))  # noqa: B023
        peer.is_scale_input_called = True
        _, eps = told_by(schedule, y * schedule.alpha(t), t)
        y = peer.step(eps, t, y).prev_sample.double()
        states.append(y * schedule.alpha(s))
    same_states(ours(make(Ancestral, 25, Linspace(), eta=1.0), schedule, x), states, FLOAT32)


@pytest.mark.parametrize("schedule", [EDM(), VE()], ids=name)
def test_heun_is_that_of_diffusers(schedule):
    """On alpha = 1 alone: on other schedules theirs is Heun's rule in sigma / alpha, ours in the schedule's own terms."""
    from diffusers import HeunDiscreteScheduler

    n, grid = 12, Karras(sigma_max=40.0)
    times = grid.times(n, schedule)
    peer = HeunDiscreteScheduler()
    in_sigma(peer, schedule, times)
    twice = torch.cat([torch.arange(1), torch.arange(1, n).repeat_interleave(2), torch.tensor([n])])
    peer.sigmas, peer.prev_derivative, peer.dt = peer.sigmas[twice], None, None
    x = 40 * pictures(2)
    y, states = x, [x]
    for i in range(2 * n - 1):
        t = times[(i + 1) // 2]  # where the question is asked: t_0, then each t twice
        _, eps = told_by(schedule, y, t)
        y = peer.step(eps, t, y).prev_sample
        if i % 2 == 1 or i == 2 * n - 2:
            states.append(y)
    same_states(ours(make(Heun, n, grid), schedule, x), states, 1e-10)


@pytest.mark.parametrize("steps", [5, 12, 30])
@pytest.mark.parametrize("schedule", [Betas(), Betas("cosine"), VP()], ids=name)
def test_dpmpp_2m_is_that_of_diffusers(schedule, steps):
    from diffusers import DPMSolverMultistepScheduler

    grid = Linspace()
    times = grid.times(steps, schedule)
    peer = DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++", final_sigmas_type="zero")
    peer.set_timesteps(steps)
    in_sigma(peer, schedule, times)
    x = pictures(2)
    states = [x]
    for t in times[:-1]:
        _, eps = told_by(schedule, states[-1], t)
        states.append(peer.step(eps, t, states[-1]).prev_sample)
    same_states(ours(make(DPMpp2M, steps, grid), schedule, x), states, 2e-5)  # their state is float32


@pytest.mark.parametrize("steps", [6, 18])
def test_dpmpp_2m_on_edm_is_that_of_diffusers(steps):
    from diffusers import EDMDPMSolverMultistepScheduler

    schedule, x = EDM(), 80 * pictures(2)
    peer = EDMDPMSolverMultistepScheduler()
    peer.set_timesteps(steps)
    close(peer.sigmas.double(), schedule.sigma(schedule.times(steps)), 80 * 2e-6)
    states = [x]
    for t, time in zip(schedule.times(steps), peer.timesteps):
        x0, _ = told_by(schedule, states[-1], t)
        sigma = schedule.sigma(t)  # their network says F: x0 = c_skip x + c_out F
        S2 = sigma**2 + 0.25
        states.append(peer.step((x0 - 0.25 / S2 * states[-1]) / (sigma / 2 / S2.sqrt()), time, states[-1]).prev_sample)
    same_states(ours(make(DPMpp2M, steps), schedule, x), states, 5e-4)  # sigmas and state are float32, x is up to 300


@pytest.mark.parametrize("steps", [6, 18])
def test_euler_on_edm_is_that_of_diffusers(steps):
    from diffusers import EDMEulerScheduler

    schedule, x = EDM(), 80 * pictures(2)
    peer = EDMEulerScheduler()
    peer.set_timesteps(steps)
    states = [x]
    for t, time in zip(schedule.times(steps), peer.timesteps):
        peer.is_scale_input_called = True
        x0, _ = told_by(schedule, states[-1], t)
        states.append(peer.step(x0, time, states[-1], pred_original_sample=x0).prev_sample.double())
    same_states(ours(make(Ancestral, steps), schedule, x), states, 5e-4)  # as above


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 25])
def test_flow_euler_is_that_of_diffusers(shift, steps):
    """Given our uniform steps; their default ones end at 1 / 1000 and not at 1 / n before the last."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule, x = Shifted(Flow(), shift), pictures(2)
    times = Uniform().times(steps, schedule)
    peer = FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(sigmas=times[:-1].tolist())
    close(peer.sigmas.double(), schedule.sigma(times), 2e-7)
    states = [x]
    for t, time in zip(times, peer.timesteps):
        x0, eps = told_by(schedule, states[-1], t)
        states.append(peer.step(eps - x0, time, states[-1]).prev_sample)
    same_states(ours(make(Ancestral, steps, Uniform()), schedule, x), states, 5e-6)  # their state is float32


# ---------------------------------------------------------------------------- grids

COUNTS = [1, 2, 3, 7, 10, 17, 20, 33, 50, 99, 100, 250, 333, 500, 999, 1000]


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("grid", [Leading, Linspace, Trailing], ids=name)
def test_indices_are_those_of_diffusers(grid, steps):
    from diffusers import DDIMScheduler

    if grid is Linspace and steps == 1:
        assert grid().times(1, VP()).tolist() == [1, 0]  # theirs is index 0, from which nothing can be drawn
        return
    peer = DDIMScheduler(timestep_spacing=grid.__name__.lower(), steps_offset=0)
    peer.set_timesteps(steps)
    k = grid().times(steps, VP())[:-1] * 1000 - 1
    close(k, peer.timesteps.double(), 1e-9)


@pytest.mark.parametrize("grid", [Leading, Linspace, Trailing], ids=name)
def test_more_steps_than_indices_are_refused(grid):
    with pytest.raises(ValueError, match=r"sampler\.steps is 51.*only 50"):
        grid(table=50).times(51, VP())


def test_uniform_and_quadratic_are_their_formulas():
    close(Uniform().times(8, VP()), 1 - torch.arange(9, dtype=torch.float64) / 8, 1e-15)
    close(Quadratic().times(8, VP()), (1 - torch.arange(9, dtype=torch.float64) / 8) ** 2, 1e-15)


@every
@pytest.mark.parametrize("steps, rho", [(2, 7.0), (18, 7.0), (40, 3.0)])
def test_karras_is_equation_5_in_sigma_over_alpha(schedule, steps, rho):
    high = min(80.0, float(schedule.sigma(ONE) / schedule.alpha(ONE)))  # a schedule that ends earlier is walked from its end
    i = torch.arange(steps, dtype=torch.float64)
    published = (high ** (1 / rho) + i / (steps - 1) * (0.002 ** (1 / rho) - high ** (1 / rho))) ** rho
    times = Karras(rho=rho).times(steps, schedule)[:-1]
    close(schedule.sigma(times) / schedule.alpha(times) / published, torch.ones(steps), 1e-9)


@pytest.mark.parametrize("start", [1.0, 0.75, 0.6, 0.03, 1e-6])
def test_a_tail_is_what_is_left_of_a_grid(start):
    whole, tail = Quadratic().times(10, VP()), Tail(Quadratic(), start).times(10, VP())
    assert tail[0] == start and tail[-1] == 0 and (tail.diff() < 0).all()
    assert torch.equal(tail[1:], whole[whole < start])


def test_edms_own_grid_is_karras():
    close(Own().times(18, EDM()), Karras().times(18, EDM()), 1e-14)


@every
def test_log_snr_steps_are_equal(schedule):
    times = LogSNR().times(12, schedule)[:-1]
    log_snr = schedule.log_snr(times)
    end = float(schedule.log_snr(ONE))
    close(log_snr, torch.linspace(max(-10.0, end), 10, 12, dtype=torch.float64), 1e-9)


def share_below(x: float, a: float, b: float) -> float:
    """The distribution function of Beta(a, b) by its power series: independent of any quadrature."""
    if x > 0.5:
        return 1 - share_below(1 - x, b, a)
    total, coefficient = 0.0, 1.0  # sum over n of (1 - b)_n / n! x^n / (a + n)
    for n in range(100):
        total += coefficient * x**n / (a + n)
        coefficient *= (n + 1 - b) / (n + 1)
    return x**a * total * math.gamma(a + b) / (math.gamma(a) * math.gamma(b))


# the quadrature is good to 1e-7 where the density of u has no pole, a and b >= 1/2; below, 1e-4 is what it gives
@pytest.mark.parametrize("a, b, atol", [(0.6, 0.6, 1e-7), (0.5, 0.9, 1e-7), (2.5, 0.7, 1e-7), (0.3, 0.3, 2e-4)])
def test_beta_steps_are_quantiles(a, b, atol):
    times = Beta(a, b).times(20, VP()).tolist()
    assert times[0] == 1 and times[-1] == 0
    close(f64(*(share_below(t, a, b) for t in times[1:-1])), torch.linspace(1, 0, 21, dtype=torch.float64)[1:-1], atol)


@pytest.mark.parametrize(
    "a, b, quantile",
    [
        (1, 1, lambda p: p),
        (0.5, 0.5, lambda p: torch.sin(math.pi * p / 2) ** 2),
        (3, 1, lambda p: p ** (1 / 3)),
        (1, 2, lambda p: 1 - (1 - p) ** 0.5),
    ],
)
def test_beta_quantiles_with_a_closed_form(a, b, quantile):
    close(Beta(a, b).times(16, VP()), quantile(1 - torch.arange(17, dtype=torch.float64) / 16), 1e-8)
