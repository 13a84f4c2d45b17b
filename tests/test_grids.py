"""Grids: the published steps, diffusers' and k-diffusion's, and what is refused. float64."""

import math
import re

import pytest
import torch
from closed_form import FAMILIES, SCHEDULES, close, f64, name, pictures
from walks import DATA, make, no_noise

from diffusion_cli.errors import ConfigError
from diffusion_cli.samplers import (
    Ancestral,
    Beta,
    Exponential,
    Grid,
    Karras,
    Leading,
    Linspace,
    Listed,
    LogSNR,
    Own,
    Quadratic,
    ShiftedGrid,
    Tail,
    Trailing,
    Uniform,
)
from diffusion_cli.schedules import EDM, VE, VP, Betas, Flow, Shifted

every = pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
ONE = f64(1.0)[0]


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


@pytest.mark.parametrize("a, b", [(0.6, 0.6), (0.5, 0.9), (2.5, 0.7), (0.3, 0.3), (0.1, 0.2)])
def test_beta_steps_are_quantiles(a, b):
    times = Beta(a, b).times(20, VP()).tolist()
    assert times[0] == 1 and times[-1] == 0
    # each by its distance from the nearer end: quantiles of a small a or b lie within the rounding of 1
    for t, wanted in zip(times[1:-1], torch.linspace(1, 0, 21, dtype=torch.float64)[1:-1].tolist()):
        if t < 1 - 1e-9:
            assert share_below(t, a, b) == pytest.approx(wanted, abs=1e-8)


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
    close(Beta(a, b).times(16, VP()), quantile(1 - torch.arange(17, dtype=torch.float64) / 16), 1e-12)


# ---------------------------------------------------------------------------- diffusers' and k-diffusion's


def line(n: int) -> torch.Tensor:
    return torch.linspace(1, 0, n, dtype=torch.float64)


@pytest.mark.parametrize("rho", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("schedule", FAMILIES, ids=name)
def test_exponential_is_k_diffusions_exponential_and_polyexponential(schedule, rho):
    low, high = 0.05, min(20.0, float(schedule.sigma(ONE) / schedule.alpha(ONE)))
    wanted = torch.exp(line(10) ** rho * math.log(high / low)) * low  # get_sigmas_polyexponential
    times = Exponential(0.05, 20.0, rho).times(10, schedule)[:-1]
    close(schedule.sigma(times) / schedule.alpha(times) / wanted, torch.ones(10), 1e-9)
    if rho == 1.0:
        close(LogSNR(-2 * math.log(20), -2 * math.log(0.05)).times(10, schedule)[:-1], times, 1e-12)


def test_equal_log_snr_between_a_tables_ends_is_lu_in_diffusers():
    from diffusers import DPMSolverMultistepScheduler

    schedule = Betas()
    peer = DPMSolverMultistepScheduler(use_lu_lambdas=True, final_sigmas_type="zero")
    peer.set_timesteps(12)
    times = LogSNR(-20.0, float(schedule.knots[0])).times(12, schedule)
    # theirs is a float32 table
    close(torch.log(peer.sigmas[:-1].double()), -schedule.log_snr(times[:-1]) / 2, 2e-3)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 25])
def test_a_shifted_grid_is_the_shift_of_flow_models(steps, factor):
    from diffusers import FlowMatchEulerDiscreteScheduler

    flow, grid = Flow(), ShiftedGrid(Uniform(), factor)
    times = grid.times(steps, flow)
    peer = FlowMatchEulerDiscreteScheduler(shift=factor)
    peer.set_timesteps(sigmas=Uniform().times(steps, flow)[:-1].tolist())
    close(times, peer.sigmas.double(), 2e-7)  # theirs is float32
    stronger = Shifted(flow, factor)
    close(flow.sigma(times), stronger.sigma(Uniform().times(steps, flow)), 1e-12)  # a schedule's shift and a grid's are one


@pytest.mark.parametrize("base", [Uniform(), Karras(), Trailing(), LogSNR()], ids=name)
@every
def test_a_shifted_grid_keeps_the_ends(schedule, base):
    plain, shifted = base.times(9, schedule), ShiftedGrid(base, 4.0).times(9, schedule)
    assert (shifted.diff() < 0).all() and shifted[0] >= plain[0] and shifted[-1] == 0
    assert (shifted[1:-1] > plain[1:-1]).all()
    assert shifted[0] == 1 or plain[0] < 1


# ---------------------------------------------------------------------------- lists, and what is refused


@pytest.mark.parametrize("at", [(1.0, 0.7, 0.3), (1, 0.7, 0.3, 0), (0.7, 0.3, 0.1)])
def test_a_list_is_its_times(at):
    close(Listed(at).times(3, VP()), f64(*[float(a) for a in at if a], 0.0), 1e-15)


def test_a_list_may_be_of_sigma_over_alpha():
    """The ten steps of Sabour et al. 2024, "Align your steps", for Stable Diffusion 1.5."""
    sigmas = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0)
    for schedule in (Betas("scaled_linear", first=0.00085, last=0.012), EDM(), VE(), Flow()):
        times = Listed(sigmas, of="sigma").times(10, schedule)
        close(schedule.sigma(times) / schedule.alpha(times), f64(*sigmas), 2e-3)  # the table ends at 14.6146
        assert times[-1] == 0


@pytest.mark.parametrize("at", [(), (0.0,), (0.5, 0.5), (0.3, 0.7), (1.5, 0.2), (0.5, -0.1), (0.5, 0.0, 0.0)])
def test_a_list_that_does_not_fall_is_refused(at):
    with pytest.raises(ValueError, match=re.escape(f"at is {list(at)}: a list of numbers that fall from 1 or below to 0")):
        Listed(at)


def said_of(grid: Grid, schedule, steps: int = 20) -> str:
    """What a sampler says of its grid before anything is drawn."""
    sampler, asked = make(Ancestral, steps, grid), []
    said = []
    for question in (
        sampler.length,
        lambda s: sampler.start(s, pictures(1)),
        lambda s: next(sampler.walk(asked.append, s, pictures(1), no_noise)),
    ):
        with pytest.raises(ConfigError) as error:
            question(schedule)
        said.append(str(error.value))
    assert not asked and len(set(said)) == 1
    return said[0]


def test_a_grid_is_checked_before_anything_is_asked():
    assert said_of(Listed((1.0, 0.5)), VP()) == "sampler.steps is 20, but sampler.grid.at lists 2: write sampler.steps=2"
    assert "sampler.steps is 51" in said_of(Leading(50), VP(), 51)
    assert said_of(Karras(sigma_min=90.0, sigma_max=100.0), EDM()) == (
        "sampler.grid.sigma_min is 90.0, but this schedule ends at 80: it must be below"
    )
    assert (
        said_of(Karras(2.0, 1.0), VP())
        == "sampler.grid.sigma_min is 2.0 and sampler.grid.sigma_max 1.0: sigma_min must be below"
    )
    assert "sampler.grid.high is -9.0, but this schedule's log_snr ends at -8.764" in said_of(LogSNR(-12.0, -9.0), EDM())
    beyond = said_of(Listed((100.0, 90.0, 1.0), of="sigma"), EDM(), 3)
    assert "sampler.grid: 3 steps of Listed do not fall from 1 or below to 0 on this schedule (t = 1, 1, " in beyond


def test_a_grid_that_is_fine_says_nothing():
    sampler = make(Ancestral, 3, Listed((1.0, 0.7, 0.3)))
    assert sampler.length(VP()) == 3
    states = list(sampler.walk(DATA.denoise(VP()), VP(), pictures(1), no_noise))
    assert [float(s.t) for s in states] == [1.0, 0.7, 0.3, 0.0]
