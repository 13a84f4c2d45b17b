"""Multistep rules: weights against exact integrals, moves that are exact for polynomials, measured orders of convergence, and
the law of those with fresh noise. float64. test_peers.py and test_peers_k.py compare them with others' programs.
"""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from closed_form import FAMILIES, Gaussian, Mixture, close, distance_from_uniform, f64, name, pictures
from walks import DATA, LINES, PRESETS, fresh, law, make, no_noise, order_of, preset, walk_error

from diffusion_cli.samplers import PNDM, Exponential, Grid, Karras, LogSNR, Multistep, Own, Trailing, Uniform, last
from diffusion_cli.samplers.frames import point_at, points
from diffusion_cli.samplers.multistep_weights import lagrange, moments, weights
from diffusion_cli.schedules import EDM, VP, Betas, Flow

ONE, ZERO = f64(1.0)[0], f64(0.0)[0]

# ---------------------------------------------------------------------------- weights


def exact_moment(k: int, z: float) -> float:
    """Integral from 0 to 1 of e^(z (1 - v)) v^k = k! sum over i of z^i / (i + k + 1)!, in fractions: no digit is lost."""
    total, term, z_ = Fraction(0), Fraction(1, k + 1), Fraction(z)
    for i in range(40 + 4 * int(abs(z))):
        total += term
        term *= z_ / (i + k + 2)
    return float(total)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("h", [1e-12, 1e-8, 1e-4, 0.03, 0.5, 0.999, 1.0, 1.001, 2.5, 7.0, 20.0, 50.0, 100.0])
def test_moments_keep_their_digits_for_small_and_large_steps(h, sign):
    for k, got in enumerate(moments(5, sign * h)):
        assert got == pytest.approx(exact_moment(k, sign * h), rel=3e-13, abs=0)


def test_an_infinite_past_or_no_step_at_all_has_no_surprises():
    assert moments(3, 0.0) == pytest.approx([1, 1 / 2, 1 / 3], rel=1e-15)
    assert all(math.isfinite(m) for m in moments(5, -1000.0) + moments(5, 700.0))


def test_weights_of_equal_steps_are_those_of_adams_and_bashforth():
    """Hairer, Norsett and Wanner 1993, section III.1."""
    wanted = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    for row in wanted:
        assert weights([-float(j) for j in range(len(row))], moments(len(row), 0.0)) == pytest.approx(row, rel=1e-14)
    moulton = weights([1.0, 0.0, -1.0, -2.0], moments(4, 0.0))  # the corrector's: the new point first
    assert moulton == pytest.approx([9 / 24, 19 / 24, -5 / 24, 1 / 24], rel=1e-14)


@pytest.mark.parametrize(
    "places", [[0.0], [0.0, -0.3], [0.0, -1e-3, -7.0], [1.0, 0.0, -2.5, -2.6], [1.0, 0.0, -1.0, -2.0, -30.0]]
)
def test_lagranges_polynomials_are_one_at_their_place_and_zero_at_the_others(places):
    for j, row in enumerate(lagrange(places)):
        for k, v in enumerate(places):
            assert sum(c * v**i for i, c in enumerate(row)) == pytest.approx(float(j == k), abs=1e-9)


# ---------------------------------------------------------------------------- moves that are exact


def polynomial(degree: int):
    """Some polynomial of lambda, [2, 2, 3, 2] at each."""
    terms = [pictures(2, 10 + k) for k in range(degree + 1)]
    return lambda lam: sum(term * lam**k / math.factorial(k) for k, term in enumerate(terms))


def quadrature(m, low: float, high: float, growth: float) -> torch.Tensor:
    """Integral from low to high of e^(growth lambda) m(lambda), by Gauss and Legendre's rule."""
    import numpy as np

    nodes, shares = np.polynomial.legendre.leggauss(60)
    half = (high - low) / 2
    return sum(w * half * math.exp(growth * lam) * m(lam) for lam, w in zip((low + high) / 2 + half * nodes, shares))


def exact_move(frame: str, x, t, s, m, eta: float, z) -> torch.Tensor:
    """The solution of the reverse process from t to s where x0 (data) or the noise is the function m of lambda."""
    h = s.lam - t.lam
    if frame == "data":
        drift = s.sigma * math.exp(-eta * s.lam) * (1 + eta) * quadrature(m, t.lam, s.lam, 1 + eta)
        spread = s.sigma * math.sqrt(1 - math.exp(-2 * eta * h))
        return s.sigma / t.sigma * math.exp(-eta * h) * x + drift + spread * z
    drift = -s.alpha * (1 + eta) * quadrature(m, t.lam, s.lam, -1)
    return s.alpha / t.alpha * x + drift + s.sigma * math.sqrt(eta * (math.exp(2 * h) - 1)) * z


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("order, corrector", [(1, 0), (2, 0), (3, 0), (4, 0), (1, 2), (2, 3), (3, 4), (3, 2), (4, 5)])
@pytest.mark.parametrize("frame", ["data", "noise"])
@pytest.mark.parametrize("schedule", [Betas("cosine"), Flow()], ids=name)
def test_every_move_is_exact_where_what_is_foreseen_is_a_polynomial_of_log_snr(schedule, frame, order, corrector, eta):
    """On uneven steps. With a corrector: from one corrected state to the next."""
    degree, reach = (corrector or order) - 1, max(order, corrector - 1)
    m = polynomial(degree)
    lams = [-2.0, -1.7, -1.1, -0.9, 0.0, 0.8, 1.0, 1.9, 2.0]
    times = torch.stack([point_at(schedule, lam).t for lam in lams])

    def ask(x, t):
        at = points(schedule, t[None])[0]
        return m(at.lam) if frame == "data" else (x - at.sigma * m(at.lam)) / at.alpha

    sampler = make(Multistep, 8, frame=frame, order=order, corrector=corrector, eta=eta)
    z = fresh(pictures(2))
    states = list(sampler.moves(ask, schedule, pictures(2), times, z))
    at = points(schedule, times)
    corrected = pairwise(states[:-1]) if corrector else pairwise(states)  # the last state is a prediction
    for i, (before, after) in enumerate(corrected):
        if i >= reach - 1:  # enough was seen
            close(after.x, exact_move(frame, before.x, at[i], at[i + 1], m, eta, z(i)), 1e-8)


@pytest.mark.parametrize("frame", ["data", "noise"])
@pytest.mark.parametrize("h", [1e-8, 1e-5, 0.3, 6.0])
def test_moves_of_any_length_are_exact(h, frame):
    schedule, m = EDM(), polynomial(2)
    lams = [0.0, h, 2.5 * h, 3 * h]
    times = torch.stack([point_at(schedule, lam - 3.0).t for lam in lams])

    def ask(x, t):
        v = (points(schedule, t[None])[0].lam + 3.0) / h  # smooth on the scale of the step
        return m(v) if frame == "data" else x - schedule.sigma(t) * m(v)

    states = list(make(Multistep, 3, frame=frame, order=3).moves(ask, schedule, pictures(2), times, no_noise))
    t, s = points(schedule, times[2:])
    wanted = exact_move(frame, states[2].x, t, s, lambda lam: m((lam + 3.0) / h), 0.0, 0.0)
    close(states[3].x, wanted, 1e-10 * float(wanted.abs().max()))


def test_in_its_own_variable_a_polynomial_is_integrated_exactly_too():
    """Noise frame: dy = n d rho. Data frame with eta: d(kappa^(1 + eta))."""
    schedule, lams = VP(), [-1.0, -0.6, -0.5, 0.1, 0.4]
    times = torch.stack([point_at(schedule, lam).t for lam in lams])
    at, m = points(schedule, times), polynomial(2)

    def noise_ask(x, t):
        p = points(schedule, t[None])[0]
        return (x - p.sigma * m(p.rho)) / p.alpha

    states = list(
        make(Multistep, 4, frame="noise", clock="frame", order=3).moves(noise_ask, schedule, pictures(2), times, no_noise)
    )
    close(states[4].x, exact_move("noise", states[3].x, at[3], at[4], lambda lam: m(math.exp(-lam)), 0.0, 0.0), 1e-10)

    def data_ask(x, t):
        return m(math.exp(1.5 * points(schedule, t[None])[0].lam))

    z = fresh(pictures(2))
    states = list(make(Multistep, 4, clock="frame", order=3, eta=0.5).moves(data_ask, schedule, pictures(2), times, z))
    close(states[4].x, exact_move("data", states[3].x, at[3], at[4], lambda lam: m(math.exp(1.5 * lam)), 0.5, z(3)), 1e-10)


# ---------------------------------------------------------------------------- order of convergence

SMOOTH = Karras(sigma_min=0.02, sigma_max=50.0, rho=3.0)
ORDERS = [  # options, order
    ({"slope": "midpoint"}, 2),
    ({}, 2),
    ({"order": 3}, 3),
    ({"order": 4}, 4),
    ({"frame": "noise", "slope": "midpoint"}, 2),
    ({"frame": "noise"}, 2),
    ({"frame": "noise", "order": 3}, 3),
    ({"frame": "noise", "clock": "frame", "order": 2}, 2),
    ({"frame": "noise", "clock": "frame", "order": 4}, 4),
    ({"frame": "noise", "clock": "index", "order": 4}, 2),  # the steps are not equal: see below
    ({"order": 1, "corrector": 2, "slope": "midpoint"}, 2),
    ({"order": 2, "corrector": 3, "slope": "midpoint"}, 3),
    ({"order": 2, "corrector": 3, "slope": "bh1"}, 3),
    ({"order": 3, "corrector": 4}, 4),
    ({"frame": "noise", "order": 2, "corrector": 3}, 3),
]


def said(options: object) -> str:
    return "-".join(map(str, options.values())) if isinstance(options, dict) else str(options)


def measured(kind, schedule, data, grid: Grid, steps: list[int], **options) -> float:
    return order_of(steps, [walk_error(make(kind, n, grid, **options), schedule, data) for n in steps])


@pytest.mark.parametrize("options, order", ORDERS, ids=said)
@pytest.mark.parametrize("schedule", LINES, ids=name)
def test_order_of_convergence(schedule, options, order):
    assert order - 0.25 < measured(Multistep, schedule, DATA, SMOOTH, [64, 128, 256], **options) < order + 0.75


@pytest.mark.parametrize("options, order", ORDERS, ids=said)
def test_order_of_convergence_on_a_gaussian(options, order):
    found = measured(Multistep, VP(), Gaussian(), SMOOTH, [64, 128, 256], **options)
    assert order - 0.2 < found < order + 0.7


@pytest.mark.parametrize("data", [Gaussian(), Mixture()], ids=name)
def test_half_the_curvature_is_order_2(data):
    """DPM-Solver++(3M) as k-diffusion and diffusers have it gives the coefficient of v^2 the weight phi_3, half its integral.
    What is left out is of the third order in h at every move. On few steps it errs no more, on many it does."""
    steps = [512, 1024, 2048]
    half = [walk_error(make(Multistep, n, SMOOTH, order=3, curvature="half"), EDM(), data) for n in steps]
    whole = [walk_error(make(Multistep, n, SMOOTH, order=3), EDM(), data) for n in steps]
    assert 1.8 < order_of(steps, half) < 2.2 and 2.8 < order_of(steps, whole) < 3.3
    assert half[-1] > 10 * whole[-1]


def test_two_points_corrected_by_two_are_of_order_2():
    """SA-Solver's orders (2, 2); bh1's error is of the third order in h at each move."""
    found = measured(Multistep, EDM(), DATA, SMOOTH, [256, 512, 1024], order=2, corrector=2, slope="bh1")
    assert 1.9 < found < 2.4


class EqualRho(Grid):
    def times(self, steps, schedule):
        sigma = torch.linspace(3.0, 0.3, steps, dtype=torch.float64)
        return torch.cat([schedule.t_of_log_snr(-2 * torch.log(sigma)), f64(0.0)])


@pytest.mark.parametrize("schedule", [EDM(), VP(), Flow()], ids=name)
def test_ipndm_and_pndm_are_of_order_4_where_sigma_over_alpha_falls_evenly(schedule):
    """Only there are the weights of equal steps right; elsewhere they are of order 2 (ORDERS). On such a grid iPNDM is LMS."""
    for warm_up in ("runge_kutta", "heun"):
        assert 3.6 < measured(PNDM, schedule, DATA, EqualRho(), [128, 256, 512], warm_up=warm_up) < 4.4
    same = {"frame": "noise", "order": 4}
    index, rho = (
        last(make(Multistep, 9, EqualRho(), clock=c, **same).walk(DATA.denoise(schedule), schedule, pictures(2), no_noise))
        for c in ("index", "frame")
    )
    close(index.x, rho.x, 1e-9)


@pytest.mark.parametrize("warm_up", ["runge_kutta", "heun"])
@pytest.mark.parametrize("schedule", FAMILIES, ids=name)
def test_pndm_is_of_order_2_on_uneven_steps(schedule, warm_up):
    assert 1.8 < measured(PNDM, schedule, DATA, SMOOTH, [64, 128, 256], warm_up=warm_up) < 2.5


# ---------------------------------------------------------------------------- published formulas


@pytest.mark.parametrize("schedule", FAMILIES, ids=name)
def test_dpmpp_2m_is_algorithm_2_of_lu(schedule):
    grid, denoise = LogSNR(-6, 6), DATA.denoise(schedule)
    states = list(replace(preset("dpmpp_2m"), steps=7, grid=grid).walk(denoise, schedule, pictures(2), no_noise))
    times = grid.times(7, schedule)
    alpha, sigma, lam = schedule.alpha(times), schedule.sigma(times), schedule.log_snr(times) / 2
    x0 = [denoise(s.x, s.t) for s in states[:-1]]
    for i in range(1, 6):  # the last move, to lambda = inf, is of order 1
        h, r = lam[i + 1] - lam[i], (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
        D = (1 + 1 / (2 * r)) * x0[i] - x0[i - 1] / (2 * r)
        close(states[i + 1].x, sigma[i + 1] / sigma[i] * states[i].x - alpha[i + 1] * (torch.exp(-h) - 1) * D, 1e-9)
    close(states[1].x, schedule.transfer(states[0].x, x0[0], times[0], times[1]), 1e-12)


# ---------------------------------------------------------------------------- ends and options


@pytest.mark.parametrize("options", [o for o, _ in ORDERS], ids=said)
def test_from_pure_noise_the_first_move_is_transfer_and_history_begins_after_it(options):
    schedule, x, times = Flow(), pictures(2), Uniform().times(6, Flow())
    ask = DATA.denoise(schedule)
    states = list(make(Multistep, 6, Uniform(), **options).walk(ask, schedule, x, no_noise))
    begun = schedule.transfer(x, ask(x, times[0]), times[0], times[1])
    piece = list(make(Multistep, 6, **options).moves(ask, schedule, begun, times[1:], no_noise))
    for got, wanted in zip(states[1:], piece, strict=True):
        close(got.x, wanted.x, 1e-12)


def test_taper_takes_no_more_points_than_moves_are_left():
    schedule, grid, x = VP(), Exponential(0.02, 5.0), pictures(2)
    ask = DATA.denoise(schedule)
    walks = {
        label: [s.x for s in make(Multistep, 7, grid, **options).walk(ask, schedule, x, no_noise)]
        for label, options in {"third": {"order": 3}, "tapered": {"order": 3, "taper": True}}.items()
    }
    for i in range(6):  # up to the move from 5, which has two left
        assert torch.equal(walks["tapered"][i], walks["third"][i])
    at, before = points(schedule, grid.times(7, schedule)), walks["tapered"]
    seen = [ask(before[i], at[i].t) for i in (5, 4)]
    h = at[6].lam - at[5].lam
    shares = weights([0.0, (at[4].lam - at[5].lam) / h], moments(2, -h))
    second = at[6].sigma / at[5].sigma * before[5] + at[6].alpha * h * sum(w * m for w, m in zip(shares, seen))
    close(before[6], second, 1e-12)
    assert (walks["third"][6] - second).abs().max() > 1e-4


def test_fresh_noise_is_drawn_only_during_its_times():
    drawn = []

    def noise(step, which=0):
        drawn.append(step)
        return pictures(2, step)

    sampler = make(Multistep, 10, Uniform(), eta=1.0, during=(0.25, 0.75))
    last(sampler.walk(DATA.denoise(VP()), VP(), pictures(2), noise))
    assert drawn == [3, 4, 5, 6, 7]  # t = 0.7 ... 0.3
    with pytest.raises(ValueError, match=r"during is \[0.8, 0.2\]"):
        make(Multistep, 10, during=(0.8, 0.2))


@pytest.mark.parametrize("option", PRESETS)
def test_without_history_a_deterministic_preset_of_one_step_is_transfer(option):
    sampler = preset(option)
    if isinstance(sampler, Multistep):
        x, schedule = pictures(2), VP()
        end = last(replace(sampler, steps=1, grid=Own()).walk(DATA.denoise(schedule), schedule, x, fresh(x))).x
        close(end, schedule.transfer(x, DATA.denoise(schedule)(x, ONE), ONE, ZERO), 1e-12)


# ---------------------------------------------------------------------------- the law of those with fresh noise

NOISY = [
    {"order": 1},
    {"order": 2, "slope": "midpoint"},
    {"order": 2},
    {"order": 3, "curvature": "half"},
    {"order": 3},
    {"order": 2, "corrector": 2, "slope": "bh1"},
    {"order": 3, "corrector": 4},
    {"frame": "noise", "order": 1},
    {"frame": "noise", "order": 2},
    {"frame": "noise", "order": 2, "corrector": 3},
]


@pytest.mark.parametrize("eta", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("options", [o for o in NOISY if "frame" not in o], ids=said)
@pytest.mark.parametrize("schedule", FAMILIES, ids=name)
def test_a_single_picture_is_noised_exactly_at_every_step(schedule, options, eta):
    """All data at one point, m: x0 is constant, so that moves of any length carry N(alpha_t m, sigma_t^2) to that of s."""
    m, n = 0.3, 6
    sampler = make(Multistep, n, LogSNR(-6, 8), eta=eta, **options)
    times = sampler.times(schedule)
    x = torch.full((n + 2, 1, 1, 1), float(schedule.alpha(times[0])) * m, dtype=torch.float64)
    x[1] += schedule.sigma(times[0])
    basis = torch.eye(n + 2, dtype=torch.float64)[:, 2:].view(n + 2, 1, 1, 1, n)
    for state in list(sampler.walk(lambda x, t: torch.full_like(x, m), schedule, x, lambda step: basis[..., step]))[:-1]:
        row = state.x.flatten()
        close(row[0], schedule.alpha(state.t) * m, 1e-9)
        close(((row[1:] - row[0]) ** 2).sum() / schedule.sigma(state.t) ** 2, ONE, 1e-9)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("options", NOISY, ids=said)
@pytest.mark.parametrize("schedule", [Betas(), EDM(), Flow()], ids=name)
def test_the_law_of_the_samples_tends_to_that_of_the_data(schedule, options, eta):
    data, steps, spreads = Gaussian(0.3, 0.5), [50, 100, 200], []
    for n in steps:
        mean, spread = law(make(Multistep, n, Karras(0.01, 40.0, 3.0), eta=eta, **options), schedule, data)
        assert abs(mean - data.m) < 0.02
        spreads.append(spread)
    errors = [abs(v - data.s**2) for v in spreads]
    if options["order"] == 1:
        assert 0.7 < order_of(steps, errors) < 1.2
        assert abs(2 * spreads[-1] - spreads[-2] - data.s**2) < 3e-3  # Richardson's: the error of order 1 taken away
    else:  # a hundredth of that of order 1, and what is left of the noise at the grid's last time, 0.01^2
        assert errors[-1] < 2e-3 and errors[0] > 2 * errors[-1]


@pytest.mark.parametrize("option, steps", [("dpmpp_2m_sde", 80), ("dpmpp_3m_sde", 80), ("sa_solver", 60)])
def test_the_presets_with_fresh_noise_draw_the_mixture(option, steps):
    """Not linear, and with the counted noise itself: 4000 samples against the distribution function of the data."""
    schedule = Betas()
    x = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = last(replace(preset(option), steps=steps).walk(DATA.denoise(schedule), schedule, x, fresh(x))).x.flatten()
    assert distance_from_uniform(DATA.cdf(schedule, end, ZERO)) < 1.95 / math.sqrt(4000)


def test_fresh_noise_forgives_what_is_amiss_and_less_of_it_is_less():
    """eta 0 draws none, and a small eta tends to it."""
    schedule, x, ends = VP(), pictures(2), []
    for eta in (0.0, 1e-6):
        sampler = make(Multistep, 12, Trailing(), order=2, eta=eta)
        ends.append(last(sampler.walk(DATA.denoise(schedule), schedule, x, fresh(x) if eta else no_noise)).x)
    close(ends[1], ends[0], 1e-2)
