"""Identities of every schedule, and agreement with the published tables. float64 unless said otherwise."""

import dataclasses
import math

import pytest
import torch
from closed_form import SCHEDULES, close, distance_from_uniform, f64, name, pictures, preserves_variance

from diffusion_cli.randomness import Source
from diffusion_cli.schedules import EDM, VE, VP, Betas, Flow, Mix, Schedule, Shifted

every = pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
T = torch.cat([torch.linspace(0.002, 1, 97, dtype=torch.float64), f64(1e-3, 1 - 1e-4)]).sort().values  # inside and at t = 1
ZERO, ONE = f64(0.0)[0], f64(1.0)[0]


@every
def test_the_ends_are_exact(schedule):
    assert schedule.sigma(ZERO) == 0 and schedule.alpha(ZERO) == 1
    assert bool(schedule.alpha(ONE) == 0) == schedule.reaches_zero
    assert schedule.log_snr(ZERO) == math.inf
    assert (schedule.log_snr(ONE) == -math.inf) == schedule.reaches_zero


@every
def test_log_snr_falls_and_is_that_of_alpha_and_sigma(schedule):
    log_snr = schedule.log_snr(T)
    assert (log_snr.diff() < 0).all()
    inside = T < 1
    alpha, sigma = schedule.alpha(T[inside]), schedule.sigma(T[inside])
    close(log_snr[inside], 2 * torch.log(alpha / sigma), 1e-9)
    assert (schedule.alpha(T).diff() <= 0).all() and (schedule.sigma(T).diff() >= 0).all()


@every
def test_time_of_log_snr_is_the_inverse(schedule):
    close(schedule.t_of_log_snr(schedule.log_snr(T)), T, 1e-9)
    # by bisection as well; 1e-7 because 1 - t, and with it log_snr, is rounded at the noise end
    close(Schedule.t_of_log_snr(schedule, schedule.log_snr(T)), T, 1e-7)


@every
def test_time_of_any_log_snr_is_a_time(schedule):
    t = schedule.t_of_log_snr(f64(-1e3, -60, 60, 1e3, math.inf, -math.inf))
    assert ((t >= 0) & (t <= 1)).all()
    assert t[4] == 0 and t[5] == 1


@every
def test_alpha_and_sigma_of_log_snr_are_those_at_its_time(schedule):
    log_snr = schedule.log_snr(T[:-1])
    alpha, sigma = schedule.of_log_snr(log_snr)
    close(alpha, schedule.alpha(T[:-1]), 1e-9)
    close(sigma, schedule.sigma(T[:-1]), 1e-7)  # sigma up to 160
    close(2 * torch.log(alpha / sigma), log_snr, 1e-8)


@pytest.mark.parametrize("schedule", [Betas(), VP(), VE(), EDM()], ids=name)
def test_a_family_in_closed_form_goes_on_past_its_ends(schedule):
    alpha, sigma = schedule.of_log_snr(f64(-30, 30))
    close(2 * torch.log(alpha / sigma), f64(-30, 30), 1e-9)


@every
def test_variance_preserving_preserves_variance(schedule):
    sum_of_squares = schedule.alpha(T) ** 2 + schedule.sigma(T) ** 2
    if preserves_variance(schedule):
        close(sum_of_squares, torch.ones_like(T), 1e-12)
    else:
        assert (sum_of_squares - 1).abs().max() > 0.01


@every
def test_velocity_is_the_derivative(schedule):
    t, h = f64(0.05017, 0.1234567, 0.3303, 0.5005, 0.77777, 0.95041, 0.9997), 1e-6  # between the knots of every table
    for got, curve in zip(schedule.velocity(t), (schedule.alpha, schedule.sigma)):
        slope = (curve(t + h) - curve(t - h)) / (2 * h)
        assert ((got - slope).abs() <= 1e-5 * slope.abs().clamp(min=1e-3)).all()


@every
def test_velocity_at_pure_noise_is_its_limit_from_inside(schedule):
    h = 1e-7
    for got, curve in zip(schedule.velocity(ONE), (schedule.alpha, schedule.sigma)):
        slope = (curve(ONE) - curve(ONE - h)) / h
        assert abs(got - slope) <= 1e-4 * abs(slope).clamp(min=1)


@every
def test_velocity_in_float32_is_as_good_as_float32(schedule):
    t = torch.tensor([0.1, 0.5, 0.9, 0.9999, 1.0])
    for got, exact in zip(schedule.velocity(t), schedule.velocity(t.double())):
        assert got.dtype == torch.float32
        assert ((got.double() - exact).abs() <= 1e-5 * exact.abs().clamp(min=1)).all()


@every
def test_two_transfers_are_one(schedule):
    x, x0 = pictures(4, 1), pictures(4, 2)
    t, r, s = (f64(*v) for v in [(1, 1, 0.7, 0.05), (0.9, 0.31, 0.3, 0.03), (0.5, 0, 0.2, 0.01)])
    twice = schedule.transfer(schedule.transfer(x, x0, t, r), x0, r.clamp(min=1e-3), s)
    keep = r > 0
    close(twice[keep], schedule.transfer(x, x0, t, s)[keep], 1e-10)


@every
def test_transfer_follows_the_path_of_its_own_picture_and_noise(schedule):
    x0, noise = pictures(6, 1), pictures(6, 2)
    t, s = f64(1, 1, 0.9, 0.5, 0.02, 1), f64(0.5, 0, 0.89, 0, 0.01, 0.999)
    moved = schedule.transfer(schedule.mix(x0, noise, t), x0, t, s)
    scale = float(schedule.sigma(ONE).clamp(min=1))
    close(moved, schedule.mix(x0, noise, s), 1e-12 * scale)
    close(moved[1], x0[1], 1e-12 * scale)  # s = 0 gives the picture


@every
def test_mix_and_transfer_take_one_time_for_the_batch(schedule):
    x0, noise, t, s = pictures(3, 1), pictures(3, 2), f64(0.6), f64(0.2)
    assert torch.equal(schedule.mix(x0, noise, t[0]), schedule.mix(x0, noise, t.expand(3)))
    assert torch.equal(schedule.transfer(x0, noise, t[0], s[0]), schedule.transfer(x0, noise, t.expand(3), s.expand(3)))


@every
def test_float32_times_at_knots_are_as_good_as_float64(schedule):
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    for curve, slope in zip((schedule.alpha, schedule.sigma), schedule.velocity(t)):
        exact = curve(t)
        got = curve(t.float())
        assert got.dtype == torch.float32
        # relative to the largest value, which is 1 unless alpha = 1 and sigma goes up to 160; and t itself is rounded by
        # up to 6e-8, which is seen where a curve is steep (the last betas of laplace and cosine)
        assert ((got.double() - exact).abs() <= 1e-6 * exact.max().clamp(min=1) + 6e-8 * slope.abs()).all()


@every
def test_own_times_fall_from_noise_to_data(schedule):
    times = schedule.times(10)
    assert len(times) == 11 and times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()


# ---------------------------------------------------------------------------- published tables and formulas


def test_the_defaults_are_the_published_ones():
    def defaults(cls):
        return {f.name: f.default for f in dataclasses.fields(cls)}

    assert defaults(Betas) == dict(curve="linear", steps=1000, first=1e-4, last=0.02, zero_terminal_snr=False)
    assert defaults(VP) == dict(beta_min=0.1, beta_max=20.0)
    assert defaults(VE) == dict(sigma_min=0.01, sigma_max=50.0)
    assert defaults(EDM) == dict(sigma_min=0.002, sigma_max=80.0, rho=7.0)


@pytest.mark.parametrize("steps", [50, 100, 1000])
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero"])
@pytest.mark.parametrize("curve", ["linear", "scaled_linear", "sigmoid", "cosine", "laplace"])
def test_alpha_bar_is_that_of_diffusers(curve, steps, zero):
    from diffusers import DDPMScheduler

    theirs = {"cosine": "squaredcos_cap_v2"}.get(curve, curve)
    peer = DDPMScheduler(steps, beta_schedule=theirs, rescale_betas_zero_snr=zero)
    ours = Betas(curve, steps, zero_terminal_snr=zero)
    # their table is a float32 product of up to 1000 factors: 2e-6 is what that leaves
    close(ours.alpha_bar, peer.alphas_cumprod.double(), 2e-6)
    knots = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    close(ours.alpha(knots) ** 2, ours.alpha_bar, 1e-12)
    close(ours.timestep(knots), torch.arange(steps, dtype=torch.float64), 1e-9)


def test_the_tutorials_own_numbers_are_settings_of_betas():
    betas = torch.linspace(1e-3, 0.3, 50, dtype=torch.float64)
    close(Betas(steps=50, first=1e-3, last=0.3).alpha_bar, torch.cumprod(1 - betas, 0), 1e-14)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if isinstance(s, Betas)], ids=name)
def test_between_knots_a_table_is_linear_in_log_snr(schedule):
    k = torch.arange(schedule.steps - 2, dtype=torch.float64)  # all but the last step, which may fall to -inf
    between = schedule.log_snr((k + 1.25) / schedule.steps)
    close(between, 0.75 * schedule.knots[:-2] + 0.25 * schedule.knots[1:-1], 1e-9)
    first = schedule.sigma(f64(0.25, 0.5, 1) / schedule.steps) / schedule.alpha(f64(0.25, 0.5, 1) / schedule.steps)
    close(first / first[2], f64(0.25, 0.5, 1), 1e-12)  # sigma / alpha proportional to t before the first


def test_the_last_step_to_pure_noise_falls_linearly():
    schedule = Betas(zero_terminal_snr=True)
    t = 1 - f64(1, 0.75, 0.5, 0.25, 0) / 1000
    ratio = schedule.alpha(t) / schedule.sigma(t)
    close(ratio / ratio[0], f64(1, 0.75, 0.5, 0.25, 0), 1e-9)


@pytest.mark.parametrize(
    "bad, names",
    [(dict(steps=1), "steps"), (dict(first=0.5, last=0.1), "first"), (dict(first=0.0), "first")],
)
def test_a_table_that_cannot_be_is_refused(bad, names):
    with pytest.raises(ValueError, match=names):
        Betas(**bad)


@pytest.mark.parametrize("make", [lambda: VP(2, 1), lambda: VE(1, 1), lambda: EDM(3, 2)])
def test_ends_in_the_wrong_order_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()


def test_vp_is_the_integral_of_beta():
    t = T
    integral = 0.1 * t + 19.9 * t**2 / 2  # Song et al. 2021, eq. 33: the mean is x0 exp(-integral / 2)
    close(VP().alpha(t), torch.exp(-integral / 2), 1e-12)
    close(VP().sigma(t), torch.sqrt(1 - torch.exp(-integral)), 1e-10)


def test_betas_of_a_fine_linear_table_tend_to_vp():
    n = 20_000  # beta(t) dt = (0.1 + 19.9 t) / n
    table = Betas(steps=n, first=0.1 / n, last=20 / n)
    close(table.alpha(T), VP().alpha(T), 1e-3)


def test_ve_is_the_published_geometric_growth():
    published = 0.01 * (50 / 0.01) ** T  # Song et al. 2021, eq. 30; the marginal of eq. 31 takes sigma(0)^2 away
    close(VE().sigma(T), torch.sqrt(published**2 - 0.01**2), 1e-10)
    assert (VE().alpha(T) == 1).all()


@pytest.mark.parametrize("steps", [1, 2, 18, 40])
def test_edm_walks_the_published_grid(steps):
    i = torch.arange(steps, dtype=torch.float64)
    rise = i / (steps - 1) if steps > 1 else i
    published = (80 ** (1 / 7) + rise * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7  # Karras et al. 2022, eq. 5
    sigma = EDM().sigma(EDM().times(steps))
    assert len(sigma) == steps + 1 and sigma[-1] == 0
    close(sigma[:-1], published, 1e-12 * 80)


def test_flow_is_the_straight_line_and_mix_is_flow():
    for schedule in (Flow(), Mix()):
        close(schedule.alpha(T), 1 - T, 0)
        close(schedule.sigma(T), T, 0)
        assert [float(v) for v in schedule.velocity(ONE)] == [-1, 1]


@pytest.mark.parametrize("base", [s for s in SCHEDULES if not isinstance(s, Shifted)], ids=name)
@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_shifting_makes_the_noise_that_much_stronger(base, factor):
    shifted = Shifted(base, factor)
    inside = T[:-1]
    close(shifted.log_snr(inside), base.log_snr(inside) - 2 * math.log(factor), 1e-9)
    ratio, before = (s.sigma(inside) / s.alpha(inside) for s in (shifted, base))
    close(ratio / before / factor, torch.ones_like(inside), 1e-9)
    assert shifted.reaches_zero == base.reaches_zero
    close(shifted.timestep(T), base.timestep(T), 0)  # the network is told the base's time
    close(shifted.times(7), base.times(7), 0)  # and the base's walk is kept


def test_flow_shifted_by_3_is_the_published_time():
    moved = 3 * T / (1 + 2 * T)  # Esser et al. 2024, eq. 23
    close(Shifted(Flow(), 3.0).sigma(T), moved, 1e-12)
    close(Shifted(Flow(), 3.0).alpha(T), 1 - moved, 1e-12)


# ---------------------------------------------------------------------------- noise


@every
def test_noise_is_counted_and_of_its_kind(schedule):
    slots = torch.arange(2000)
    noise = schedule.noise(Source(0, slots), "noise", (1, 4, 4))
    assert noise.shape == (2000, 1, 4, 4)
    assert torch.equal(schedule.noise(Source(0, slots[7:8]), "noise", (1, 4, 4))[0], noise[7])
    uniform = isinstance(schedule, Mix)
    law = (noise + 1) / 2 if uniform else torch.special.ndtr(noise.double())
    assert distance_from_uniform(law) < 1.95 / math.sqrt(noise.numel())
