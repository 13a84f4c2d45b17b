"""Rules that look at one step alone: their order of convergence, the law of those that draw noise, and what each promises.

That they are k-diffusion's and diffusers' rules is proven in test_peers_k.py; what all samplers promise, in test_samplers.py.
"""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from closed_form import FAMILIES, Gaussian, Mixture, close, distance_from_uniform, f64, name, pictures
from walks import LINES, fresh, make, no_noise, order_of, preset, walk_error

from diffusion_cli.denoiser import Condition
from diffusion_cli.errors import NumericError
from diffusion_cli.guidance import APG, CFG, CFGZero
from diffusion_cli.samplers import (
    Adaptive,
    Euler,
    HalfWay,
    Heun,
    Karras,
    LogSNR,
    NoisyHalfWay,
    PredictorCorrector,
    ProbabilityFlow,
    SingleStep,
    Uniform,
    last,
)
from diffusion_cli.samplers.frames import Point, point
from diffusion_cli.schedules import EDM, VE, VP, Betas, Flow

every_family = pytest.mark.parametrize("schedule", FAMILIES, ids=name)
SOME = [Betas("cosine"), EDM(), Flow()]  # test_peers_k.py: these rules give the same numbers on every schedule
some_families = pytest.mark.parametrize("schedule", SOME, ids=name)
GRID = Karras(sigma_min=0.02, sigma_max=50.0, rho=3.0)
ZERO, ONE = f64(0.0)[0], f64(1.0)[0]

# ---------------------------------------------------------------------------- order of convergence

RULES = {
    "euler": (Euler, {}, 1),
    "heun, noise": (Heun, {"frame": "noise"}, 2),
    "heun, data": (Heun, {"frame": "data"}, 2),
    "half way, noise": (HalfWay, {"frame": "noise"}, 2),
    "noisy half way without noise": (NoisyHalfWay, {}, 2),
    "flow, midpoint": (ProbabilityFlow, {"method": "midpoint"}, 2),
    "flow, rk4": (ProbabilityFlow, {"method": "rk4"}, 4),
    **{
        f"single step {order}, {frame}, {rule}": (SingleStep, {"order": order, "frame": frame, "rule": rule}, order)
        for order, rules in {1: ["paper"], 2: ["midpoint", "heun"], 3: ["paper", "midpoint", "heun"]}.items()
        for frame in ("data", "noise")
        for rule in rules
    },
}


@pytest.mark.parametrize("schedule", LINES, ids=name)
@pytest.mark.parametrize("rule", RULES)
def test_order_of_convergence(rule, schedule):
    kind, options, order = RULES[rule]
    steps = [48, 96, 192] if order > 2 else [60, 120, 240]  # and one to the picture: groups of 2 and of 3 have no rest
    errors = [walk_error(make(kind, n + 1, GRID, **options), schedule, Mixture()) for n in steps]
    assert order - 0.3 < order_of(steps, errors) < order + 0.4


@pytest.mark.parametrize("rule", ["heun, noise", "heun, data", "half way, noise", "flow, rk4", "single step 3, data, heun"])
def test_order_of_convergence_from_pure_noise(rule):
    """On the straight line, from alpha = 0 on; where rho is infinite one move of order 1 is allowed, which leaves order 2."""
    kind, options, order = RULES[rule]
    steps = [49, 97, 193]
    errors = [walk_error(make(kind, n + 1, Uniform(), **options), Flow(), Mixture()) for n in steps]
    assert order_of(steps, errors) > (3.5 if order == 4 else 1.6)


def test_a_group_is_forgotten_before_the_next():
    """What is foreseen in one group must not reach the next: a single-step rule restarts from a state alone."""
    sampler, schedule, ask = make(SingleStep, 7, LogSNR(-4, 4), order=3), VP(), Mixture().denoise(VP())
    states, times = list(sampler.walk(ask, schedule, pictures(2), no_noise)), sampler.times(schedule)
    again = list(sampler.moves(ask, schedule, states[3].x, times[3:], no_noise))
    for a, b in zip(states[3:], again, strict=True):
        assert torch.equal(a.x, b.x)
    assert not torch.equal(list(sampler.moves(ask, schedule, states[2].x, times[2:], no_noise))[-1].x, states[-1].x)


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("order", [1, 2, 3])
def test_groups_are_full_but_for_the_last(order, steps):
    """The lists of orders that diffusers' DPMSolverSinglestepScheduler makes with lower_order_final."""
    from diffusers import DPMSolverSinglestepScheduler

    places = [Point(ONE, 1.0, float(sigma)) for sigma in range(steps, -1, -1)]
    asked = [k + 1 for group in make(SingleStep, steps, order=order).groups(places) for k in range(len(group))]
    peer = DPMSolverSinglestepScheduler(solver_order=order, lower_order_final=True)
    if steps > order:  # theirs has no list for fewer
        assert asked == peer.get_order_list(steps)
    assert len(asked) == steps and asked[-1] == 1


# ---------------------------------------------------------------------------- the law of what comes out


def law(sampler, schedule, data: Gaussian, draws: int = 3) -> tuple[float, float]:
    """Mean and variance of the result, exactly, as walks.law has it, for samplers that draw up to 3 noises a step."""
    n = sampler.steps
    start = sampler.times(schedule)[0]
    x = (schedule.alpha(start) * data.m).expand(draws * n + 2, 1, 1, 1).clone()
    x[1] += data.spread(schedule, start)
    basis = torch.eye(draws * n + 2, dtype=torch.float64)[:, 2:].view(-1, 1, 1, 1, n, draws)
    states = sampler.walk(data.denoise(schedule), schedule, x, lambda step, which=0: basis[..., step, which])
    end = last(states).x.flatten()
    return float(end[0]), float(((end[1:] - end[0]) ** 2).sum())


CHURN = {"S_churn": 20.0, "S_min": 0.05, "S_max": 20.0}
NOISY = {  # the order in which the variance tends to that of the data
    "euler": (Euler, {"eta": 1.0}, 1),
    "euler, churn": (Euler, CHURN, 1),
    "heun": (Heun, {"eta": 1.0}, 2),
    "heun, noise": (Heun, {"eta": 0.5, "frame": "noise"}, 2),
    "heun, churn": (Heun, CHURN, 2),
    "half way, data": (HalfWay, {"eta": 1.0}, 2),
    "half way, noise": (HalfWay, {"eta": 1.0, "frame": "noise"}, 2),
    "half way, churn": (HalfWay, CHURN, 2),
    "noisy half way": (NoisyHalfWay, {"eta": 1.0}, 2),
    "noisy half way, 0.5": (NoisyHalfWay, {"eta": 0.5}, 2),
    "single step 1": (SingleStep, {"eta": 1.0, "order": 1}, 1),
    "single step 2": (SingleStep, {"eta": 1.0}, 2),
    "single step 2, noise": (SingleStep, {"eta": 1.0, "frame": "noise"}, 2),
    "single step 3": (SingleStep, {"eta": 1.0, "order": 3, "rule": "heun"}, 2),
    "single step 3, noise": (SingleStep, {"eta": 0.5, "order": 3, "frame": "noise"}, 2),
    "reverse diffusion": (PredictorCorrector, {"corrections": 0}, 1),
    "ancestral prediction": (PredictorCorrector, {"corrections": 0, "predictor": "ancestral"}, 1),
}


@some_families
@pytest.mark.parametrize("rule", NOISY)
def test_the_law_of_the_samples_tends_to_that_of_the_data(rule, schedule):
    kind, options, order = NOISY[rule]
    data, steps = Gaussian(0.3, 0.5), [72, 144, 288]
    means, variances = zip(*(law(make(kind, n + 1, Karras(1e-3, 40.0, 3.0), **options), schedule, data) for n in steps))
    errors = [abs(v - data.s**2) for v in variances]
    assert order_of(steps, errors) > order - 0.4
    limit = variances[-1] + (variances[-1] - variances[-2]) / (2**order - 1)  # Richardson's
    assert abs(limit - data.s**2) < 0.01 * data.s**2
    assert all(abs(m - data.m) < (0.02 if rule == "reverse diffusion" else 1e-9) for m in means)


@some_families
@pytest.mark.parametrize("snr", [0.1, 0.3])
def test_langevin_steps_keep_the_law(snr, schedule):
    """800 pictures that have the law of x_t, 40 corrections: the law stays, to what steps of this size leave."""
    data, t = Mixture(), f64(0.5)[0]
    x = torch.rand(800, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, spread = (p.view(2) for p in data._parts(schedule, t))
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    which = (x > data.weights[0]).long()
    x = mean[which] + spread[which] * z
    sampler, at, ask, noise = make(PredictorCorrector, 2, snr=snr), point(schedule, t), data.denoise(schedule), fresh(x)
    start = x
    for k in range(40):
        x = sampler._corrected(x, ask(x, t), at, noise(0, k))
    assert (x - start).abs().mean() > 0.5 * snr * float(spread[0])  # they do move
    assert distance_from_uniform(data.cdf(schedule, x, t)) < 0.015 + snr**2 / 10


def test_predictor_and_corrector_draw_the_data():
    schedule, data = VE(), Mixture()
    x = torch.randn(300, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = make(PredictorCorrector, 120, Karras(0.01, 40.0, 3.0), snr=0.16)
    end = last(sampler.walk(data.denoise(schedule), schedule, sampler.start(schedule, x), fresh(x))).x
    assert distance_from_uniform(data.cdf(schedule, end, ZERO)) < 0.04  # 4800 pixels; order 1 leaves the larger part


# ---------------------------------------------------------------------------- steps that choose themselves


@some_families
@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_steps_are_as_exact_as_they_are_asked_to_be(order, schedule):
    data, x = Mixture(), torch.linspace(-1.5, 1.5, 7, dtype=torch.float64).view(7, 1, 1, 1)
    errors, moves = [], []
    for tolerance in (1e-2, 1e-3, 1e-4):
        sampler = make(Adaptive, 1000, GRID, order=order, rtol=tolerance, atol=tolerance)
        start, end = (sampler.times(schedule)[i] for i in (0, -2))
        states = list(sampler.walk(data.denoise(schedule), schedule, schedule.sigma(start) * x, no_noise))
        errors.append(float((states[-2].x - data.carry(schedule, schedule.sigma(start) * x, start, end)).abs().max()))
        moves.append(len(states))
        assert states[-2].t == end and errors[-1] < 5 * tolerance
    assert moves[0] < moves[1] < moves[2] < 500 and errors[2] < errors[0] / 10


def test_each_picture_has_a_step_of_its_own():
    """Their times differ, and a picture asks at the same ones whatever is drawn beside it."""
    schedule, sampler = EDM(), make(Adaptive, 200, GRID, rtol=1e-3, atol=1e-3)
    x = 50 * pictures(4)
    ask = Mixture().denoise(schedule)

    def asked(chosen):
        times: list[torch.Tensor] = []
        last(sampler.walk(lambda x, t: times.append(t) or ask(x, t), schedule, x[chosen], no_noise))
        return times[:-1]  # the last is asked of all at one time

    together = torch.stack(asked(slice(None)))  # [questions, B]
    assert together.std(1).max() > 1e-3
    for i in range(4):
        alone = torch.stack(asked(slice(i, i + 1)))[:, 0]
        assert torch.equal(alone, together[: len(alone), i])


class Told:
    """A denoiser of Gaussian pixels whose mean is that of the label; 0 without one."""

    schedule, network = EDM(), SimpleNamespace(num_classes=3)

    def __call__(self, x, t, cond, hint=None):
        mean = f64(-0.5, 0.2, 0.8, 0.0)[cond].view(-1, 1, 1, 1)
        return mean + Gaussian(0.0, 0.4).denoise(self.schedule)(x - mean, t)


def of(labels):
    return Condition(labels, torch.full_like(labels, 3))


GUIDED = [CFG(2.0), CFG(2.0, (0.5, 5.0)), CFG(2.0, rescale=0.7), APG(2.0, (0.5, None)), CFGZero(2.0, zero_init=0.3)]


@pytest.mark.parametrize("guidance", GUIDED, ids=repr)
def test_guidance_is_asked_at_a_time_for_each_picture(guidance):
    labels, t, x = torch.tensor([0, 2, 1, 0, 2]), f64(0.9, 0.3, 0.6, 0.68, 0.4), pictures(5)
    together = guidance.guide(Told(), of(labels))(x, t, None)
    for i in range(5):
        alone = guidance.guide(Told(), of(labels[i : i + 1]))(x[i : i + 1], t[i], None)
        close(together[i : i + 1], alone, 1e-13)
    sampler, question = make(Adaptive, 300, GRID), guidance.guide(Told(), of(labels))
    whole = last(sampler.walk(lambda x, t: question(x, t, None), EDM(), 50 * x, no_noise)).x
    question = guidance.guide(Told(), of(labels[1:2]))
    alone = last(sampler.walk(lambda x, t: question(x, t, None), EDM(), 50 * x[1:2], no_noise)).x
    close(whole[1:2], alone, 1e-9)


def test_too_few_moves_are_an_error_and_not_a_picture():
    ask = Mixture().denoise(VP())
    with pytest.raises(NumericError, match=r"2 of 2 pictures are not done after 5 moves.*raise sampler\.steps"):
        last(replace(preset("dpm_adaptive"), steps=5).walk(ask, VP(), pictures(2), no_noise))
    with pytest.raises(NumericError, match="not done after 1 moves"):
        poison = torch.tensor([1.0, math.nan], dtype=torch.float64).view(2, 1, 1, 1)
        last(make(Adaptive, 1000, LogSNR()).walk(lambda x, t: poison * ask(x, t), VP(), pictures(2), no_noise))


def test_a_safety_that_no_move_can_reach_is_refused():
    with pytest.raises(ValueError, match=r"safety is 3\.0"):
        make(Adaptive, 10, safety=3.0)


@some_families
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "adaptive_heun"])
def test_the_flow_is_as_exact_as_it_is_asked_to_be(method, schedule):
    errors = []
    for tolerance in (1e-3, 1e-5):
        sampler = make(ProbabilityFlow, 4, LogSNR(-7, 8), method=method, rtol=tolerance, atol=tolerance)
        x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64).view(7, 1, 1, 1)
        times = sampler.times(schedule)
        x = schedule.sigma(times[0]) * x
        for state in list(sampler.walk(Mixture().denoise(schedule), schedule, x, no_noise))[:-1]:
            errors.append(float((state.x - Mixture().carry(schedule, x, times[0], state.t)).abs().max()))
        assert max(errors[-4:]) < 20 * tolerance


def test_the_flow_asks_at_no_time_beyond_the_move():
    """A step of an adaptive solver ends where the move ends, and in float32 too no angle lies outside."""
    asked = []
    schedule, sampler = Flow(), make(ProbabilityFlow, 3, Uniform())
    ask = Mixture().denoise(schedule)
    for state in sampler.walk(lambda x, t: asked.append(float(t)) or ask(x, t), schedule, pictures(2).float(), no_noise):
        assert state.x.dtype == torch.float32 or state.t == 0
        assert min(asked) >= state.t - 1e-7 and max(asked) <= 1
    assert len(asked) > 20


# ---------------------------------------------------------------------------- churn and fresh noise


@pytest.mark.parametrize("schedule", [EDM(), Betas(), Flow()], ids=name)
def test_churn_is_within_its_bounds_and_never_past_the_schedules_end(schedule):
    sampler = make(Euler, 20, Karras(0.01, 1e4, 3.0), S_churn=10.0, S_min=0.1, S_max=5.0)
    wide = replace(sampler, S_min=0.0, S_max=None)
    times = sampler.times(schedule)
    rho = torch.exp(-schedule.log_snr(times) / 2)
    for s in (sampler, wide):
        asked, drawn = [], []
        ask = lambda x, t: asked.append(t) or Gaussian().denoise(schedule)(x, t)  # noqa: B023, E731
        noise = lambda i, which=0: drawn.append((i, which)) or pictures(2, i)  # noqa: B023, E731
        last(s.walk(ask, schedule, pictures(2), noise))
        hat = torch.exp(-schedule.log_snr(torch.stack(asked)) / 2)
        inside = (rho[:-1] >= s.S_min) & (rho[:-1] <= (s.S_max or math.inf))
        wanted = torch.where(inside, rho[:-1] * (1 + min(10 / 20, math.sqrt(2) - 1)), rho[:-1])
        close(hat / wanted.clamp(max=float(torch.exp(-schedule.log_snr(ONE) / 2))), torch.ones(20), 1e-9)
        assert drawn == [(i, 1) for i in range(20) if hat[i] > rho[i] * (1 + 1e-9)]


def test_bounds_of_churn_the_wrong_way_round_are_refused():
    with pytest.raises(ValueError, match=r"S_min is 2\.0 and S_max 1\.0"):
        make(Heun, 10, S_min=2.0, S_max=1.0)


@pytest.mark.parametrize("kind", [Euler, Heun, HalfWay, NoisyHalfWay], ids=name)
@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("schedule", [Betas(zero_terminal_snr=True), EDM(), Flow()], ids=name)
def test_a_noisy_walk_draws_no_noise_on_its_last_move(schedule, eta, kind):
    """eta above 1 as well, where all the noise is fresh; and from alpha = 0."""
    sampler, drawn, asked = make(kind, 6, Uniform(), eta=eta, S_noise=1.1), [], []
    denoise = Gaussian().denoise(schedule)
    states = list(
        sampler.walk(
            lambda x, t: asked.append(t) or denoise(x, t),
            schedule,
            sampler.start(schedule, pictures(2)),
            lambda i, which=0: drawn.append(i) or pictures(2, i + 10 * which),
        )
    )
    assert set(drawn) == {0, 1, 2, 3, 4} and min(asked) > 0 and all(s.x.isfinite().all() for s in states)
    close(states[-1].x, states[-2].x0, 1e-9)


def test_all_fresh_noise_is_scaled_by_S_noise():
    schedule, x, zero = VP(), pictures(2), lambda i, which=0: 0 * pictures(2)
    ask = Gaussian().denoise(schedule)
    for kind in (Euler, Heun, HalfWay, NoisyHalfWay):
        one, two = (make(kind, 9, eta=0.7, S_churn=3.0, S_noise=s) for s in (1.0, 2.0))
        quiet, single, double = (
            last(s.walk(ask, schedule, x, n)).x for s, n in ((one, zero), (one, fresh(x)), (two, fresh(x)))
        )
        close(double - quiet, 2 * (single - quiet), 1e-9)  # a linear denoiser


def test_pairs_of_times_alone_decide_a_move():
    """A walk made of pieces is the walk."""
    schedule, ask, times = VP(), Mixture().denoise(VP()), LogSNR().times(9, VP())
    for sampler in (make(Heun, 9), make(HalfWay, 9), make(ProbabilityFlow, 9, method="rk4")):
        x = pictures(2)
        whole = [s.x for s in sampler.moves(ask, schedule, x, times, no_noise)]
        for pair, after in zip(pairwise(times), whole[1:], strict=True):
            x = last(sampler.moves(ask, schedule, x, torch.stack(pair), no_noise)).x
            close(x, after, 1e-12)
