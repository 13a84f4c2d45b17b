"""Samplers against closed forms: order of convergence, exact laws, published formulas, and the contract of a walk. float64.

Families have tests of their own: test_multistep.py, test_single_step.py; test_peers.py and test_peers_k.py compare with others'
programs number for number.
"""

import math
from dataclasses import replace
from itertools import cycle, pairwise, product

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
from often import some
from walks import PRESETS, fresh, law, make, no_noise, order_of, preset, walk_error

from diffusion_cli.samplers import (
    PNDM,
    Adaptive,
    Ancestral,
    HalfWay,
    Heun,
    Karras,
    LogSNR,
    Multistep,
    NoisyHalfWay,
    Own,
    PredictorCorrector,
    ProbabilityFlow,
    Sampler,
    SingleStep,
    Tail,
    Trailing,
    Uniform,
    last,
)
from diffusion_cli.schedules import EDM, VE, VP, Betas, Flow

every_sampler = pytest.mark.parametrize("kind", concrete(Sampler), ids=name)
every_sampler_and_preset = pytest.mark.parametrize(
    "kind", [*concrete(Sampler), *PRESETS], ids=lambda k: k if isinstance(k, str) else name(k)
)
every = pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
ZERO, ONE = f64(0.0)[0], f64(1.0)[0]


# ---------------------------------------------------------------------------- the fixtures themselves


@pytest.mark.parametrize("schedule", FAMILIES, ids=name)
def test_the_closed_forms_agree_with_each_other(schedule):
    one, two = Gaussian(0.3, 0.5), Mixture((0.4, 0.6), (0.3, 0.3), (0.5, 0.5))
    x, t, s = torch.linspace(-2, 2, 9, dtype=torch.float64), f64(0.8)[0], f64(0.3)[0]
    x = x * one.spread(schedule, t)
    close(two.denoise(schedule)(x, t), one.denoise(schedule)(x, t), 1e-12)
    close(two.carry(schedule, x, t, s), one.carry(schedule, x, t, s), 1e-9)


# ---------------------------------------------------------------------------- order of convergence


OWN_TESTS = (Adaptive, ProbabilityFlow, PredictorCorrector)
# A new sampler is held to order 1 until it is named here. None: it chooses its own steps or draws noise, and has its own tests.
ORDER = {Heun: 2, HalfWay: 2, NoisyHalfWay: 2, SingleStep: 2, Multistep: 2, PNDM: 2, **dict.fromkeys(OWN_TESTS)}
every_rule = pytest.mark.parametrize("kind", [kind for kind in concrete(Sampler) if ORDER.get(kind, 1)], ids=name)


LAWS = [Mixture(), Gaussian()]


@pytest.mark.parametrize(("schedule", "data"), some(list(product(FAMILIES, LAWS)), list(zip(FAMILIES, cycle(LAWS)))), ids=name)
@every_rule
def test_order_of_convergence(kind, schedule, data):
    grid = Karras(sigma_min=0.02, sigma_max=50.0, rho=3.0)
    steps = [64, 128, 256]
    errors = [walk_error(make(kind, n, grid), schedule, data) for n in steps]
    order = ORDER.get(kind, 1)
    assert order - 0.1 < order_of(steps, errors) < order + 0.3
    assert errors[-1] < (0.02 if order == 1 else 2e-3)


@pytest.mark.parametrize("data", [Gaussian(), Mixture()], ids=name)
@every_rule
def test_order_of_convergence_from_pure_noise_on_the_straight_line(kind, data):
    """From alpha = 0 itself, and all the way to the picture."""
    schedule, steps, errors = Flow(), [64, 128, 256], []
    for n in steps:
        x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
        end = last(make(kind, n, Uniform()).walk(data.denoise(schedule), schedule, x, no_noise)).x
        errors.append(float((end - data.carry(schedule, x, ONE, ZERO)).abs().max()))
    # multistep rules step in lambda, where equal steps in t are uneven at both ends: h^2 log(1 / h), which is seen as 1.7
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


# ---------------------------------------------------------------------------- the law of what comes out


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


@pytest.mark.parametrize("schedule", FAMILIES, ids=name)
def test_a_consistency_model_draws_the_data_exactly(schedule):
    """Told the end of the flow instead of the mean, a move of which all noise is fresh keeps the law, however large."""
    data, sampler = Gaussian(), make(Ancestral, 3, Uniform(), eta=1.0, variance="all")

    x = (schedule.alpha(ONE) * data.m).expand(5, 1, 1, 1).clone()
    x[1] += data.spread(schedule, ONE)
    basis = torch.eye(5, dtype=torch.float64)[:, 2:].view(5, 1, 1, 1, 3)
    end = last(
        sampler.walk(lambda x, t: data.carry(schedule, x, t, ZERO), schedule, x, lambda step: basis[..., step])
    ).x.flatten()
    close(end[0], data.m, 1e-10)
    close(((end[1:] - end[0]) ** 2).sum(), data.s**2, 1e-10)


def test_ddpm_draws_the_mixture():
    """Not linear, and with the counted noise itself: 4000 samples against the distribution function of the data."""
    schedule, data = Betas(), Mixture()
    x = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = make(Ancestral, 250, Trailing(), eta=1.0)
    end = last(sampler.walk(data.denoise(schedule), schedule, x, fresh(x))).x.flatten()
    assert distance_from_uniform(data.cdf(schedule, end, ZERO)) < 1.95 / math.sqrt(4000)


# ---------------------------------------------------------------------------- the contract of a walk


def walks_from_noise_to_the_picture(sampler: Sampler, schedule) -> None:
    times, moves = sampler.times(schedule), sampler.length(schedule)
    assert times.dtype == torch.float64 and 0 < times[0] <= 1 and times[-1] == 0 and (times.diff() < 0).all()
    x = sampler.start(schedule, pictures(2))
    close(x, schedule.sigma(times[0]) * pictures(2), 1e-6)
    states = list(sampler.walk(Gaussian().denoise(schedule), schedule, x, fresh(x)))
    assert [s.step for s in states] == list(range(len(states)))
    at = torch.stack([s.t for s in states])
    if moves is None:  # it found its steps as it went
        assert at[0] == times[0] and at[-1] == 0 and (at.diff() <= 0).all()
    else:
        assert moves == len(times) - 1 and torch.equal(at, times)
    assert all(s.x.isfinite().all() and s.x0.isfinite().all() and s.x.shape == x.shape for s in states)
    assert torch.equal(states[0].x, x)
    assert torch.equal(states[-1].x, states[-1].x0)
    close(states[-1].x, states[-2].x0, 1e-12 * float(x.abs().max().clamp(min=1)))  # the last move adds and keeps no noise


@every_sampler
@every
def test_every_sampler_walks_every_schedule(schedule, kind):
    for steps, grid in [(1, Own()), (5, Own()), (5, LogSNR()), (3, Trailing()), (4, Tail(Uniform(), 0.65))]:
        walks_from_noise_to_the_picture(make(kind, steps, grid), schedule)


@pytest.mark.parametrize("schedule", [Betas(zero_terminal_snr=True), EDM()], ids=name)
@every_sampler
def test_every_sampler_walks_every_grid(kind, schedule):
    for grid in GRIDS:
        for steps in (1, 5):
            walks_from_noise_to_the_picture(make(kind, steps, grid), schedule)


@every
def test_every_grid_falls_on_every_schedule(schedule):
    for grid in GRIDS:
        for steps in (1, 2, 5, 40):
            times = make(Ancestral, steps, grid).times(schedule)  # raises where it does not
            assert times.dtype == torch.float64 and 0 < times[0] <= 1 and times[-1] == 0
            assert len(times) == steps + 1 or isinstance(grid, Tail)


@pytest.mark.parametrize("schedule", [Betas(), Betas(zero_terminal_snr=True), EDM(), Flow()], ids=name)
@pytest.mark.parametrize("option", PRESETS)
def test_every_preset_walks_from_noise_to_the_picture(option, schedule):
    walks_from_noise_to_the_picture(replace(preset(option), clip=False), schedule)
    for steps, grid in [(1, Own()), (2, LogSNR()), (4, Trailing()), (7, Uniform())]:
        walks_from_noise_to_the_picture(make(option, steps, grid), schedule)


@pytest.mark.parametrize("schedule", [Betas(), Betas(zero_terminal_snr=True), EDM(), Flow()], ids=name)
@every_sampler_and_preset
def test_a_walk_over_a_piece_of_a_grid_ends_where_it_is_told(kind, schedule):
    sampler, data, x = make(kind, 8), Gaussian(), pictures(2)
    times = Uniform().times(8, schedule)[:6]
    states = list(sampler.moves(data.denoise(schedule), schedule, x, times, fresh(x)))
    assert states[-1].t == times[-1] == states[-1].t and states[-1].x.isfinite().all()
    assert torch.equal(states[-1].x, states[-1].x0)
    if sampler.length(schedule) is not None:
        assert torch.equal(torch.stack([s.t for s in states]), times)


@pytest.mark.parametrize("variance", ["small", "large", "all"])
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
    calls = {
        Ancestral: lambda n: n,
        Multistep: lambda n: n,
        Heun: lambda n: 2 * n - 1,
        PNDM: lambda n: n + 3 * min(3, n - 1),
    }
    for steps in (1, 2, 9):
        asked = []

        def denoise(x, t, asked=asked):
            asked.append(float(t))
            return torch.zeros_like(x)

        last(make(kind, steps).walk(denoise, VP(), pictures(1), fresh(pictures(1))))
        assert min(asked) > 0
        if kind in calls:
            assert len(asked) == calls[kind](steps)


@every_sampler_and_preset
def test_a_picture_does_not_depend_on_the_batch_it_is_drawn_in(kind):
    sampler, schedule, x = make(kind, 6), VP(), pictures(5)
    ask = Mixture().denoise(schedule)
    whole = last(sampler.walk(ask, schedule, x, fresh(x))).x
    for i in range(5):
        alone = last(sampler.walk(ask, schedule, x[i : i + 1], fresh(x[i : i + 1], first=i))).x[0]
        close(alone, whole[i], 5e-3 if isinstance(sampler, ProbabilityFlow) else 1e-12)  # one step size for a batch, there


@every_sampler_and_preset
def test_a_walk_asks_one_question_at_a_time(kind):
    """A generator: the state at t is there before the next move is asked for."""
    asked = []
    walk = make(kind, 4).walk(lambda x, t: asked.append(t) or x, VP(), pictures(1), fresh(pictures(1)))
    next(walk)
    assert len(asked) == 1


@every_sampler_and_preset
def test_clipping_keeps_every_foreseen_picture_in_range(kind):
    schedule = VP()
    walk = make(kind, 5, clip=True).walk(lambda x, t: 3 * x, schedule, pictures(4), fresh(pictures(4)))
    foreseen = torch.stack([s.x0 for s in walk])
    assert foreseen.abs().max() == 1
    loose = make(kind, 5).walk(lambda x, t: 3 * x, schedule, pictures(4), fresh(pictures(4)))
    assert torch.stack([s.x0 for s in loose]).abs().max() > 1
