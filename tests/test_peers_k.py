"""k-diffusion's samplers, number for number: the arrays of tests/golden, which scripts/golden.py wrote.

k-diffusion works in x / alpha and sigma / alpha. A schedule is another way of writing the same walk down, so what it returns
on alpha = 1 has to be returned on every schedule that reaches its sigmas.
"""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from closed_form import Mixture, close, name, pictures
from torch import Tensor
from walks import make, no_noise, preset

from diffusion_cli.samplers import Adaptive, Euler, HalfWay, Heun, Karras, Listed, NoisyHalfWay, Sampler, SingleStep, State
from diffusion_cli.schedules import EDM, VE, VP, Betas, Flow, Schedule

GOLDEN = {key: torch.tensor(array) for key, array in np.load(Path(__file__).parent / "golden" / "k_diffusion.npz").items()}
SIGMAS, STEPS = GOLDEN["sigmas"], 10
GRID = Karras(0.05, 20.0)
SCHEDULES = [EDM(), VP(), Betas(), Betas("cosine"), Flow(), VE()]
ATOL = 1e-9
CHURN = {"S_churn": 3.0, "S_min": 0.1, "S_max": 10.0, "S_noise": 1.003}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=name)


def drawn(step: int, which: int = 0) -> Tensor:
    """The noise of k-diffusion's first draw in a step, whatever ours is for."""
    return GOLDEN["noise"][step, 0]


def walked(sampler: Sampler, schedule: Schedule, noise=no_noise) -> list[State]:
    """Our states in k-diffusion's coordinates."""
    x = float(schedule.alpha(sampler.times(schedule)[0])) * GOLDEN["start"]
    states = sampler.walk(Mixture().denoise(schedule), schedule, x, noise)
    return [State(s.step, s.t, s.x / schedule.alpha(s.t), s.x0) for s in states]


def same(golden: str, states: list[State], atol: float = ATOL) -> None:
    """The picture foreseen at every step, and the end."""
    x0 = GOLDEN[f"{golden}/x0"]
    assert len(states) == len(x0) + 1
    close(torch.stack([s.x0 for s in states[:-1]]), x0, atol)
    close(states[-1].x, GOLDEN[f"{golden}/end"], atol)


def test_the_golden_file_is_what_its_script_says():
    karras = EDM()
    close(SIGMAS, karras.sigma(GRID.times(STEPS, karras)), 1e-14)
    close(GOLDEN["start"], SIGMAS[0] * pictures(2, 1), 0)


CASES = {
    "euler": (Euler, {}),
    "euler_churn": (Euler, CHURN),
    "euler_ancestral": (Euler, {"eta": 1.0}),
    "euler_ancestral_06": (Euler, {"eta": 0.6}),
    "heun": (Heun, {"frame": "noise"}),
    "heun_churn": (Heun, {"frame": "noise", **CHURN}),
    "dpm_2": (HalfWay, {"frame": "noise"}),
    "dpm_2_churn": (HalfWay, {"frame": "noise", **CHURN}),
    "dpm_2_ancestral": (HalfWay, {"frame": "noise", "eta": 1.0}),
    "dpm_2_ancestral_06": (HalfWay, {"frame": "noise", "eta": 0.6}),
    "dpmpp_2s_ancestral": (HalfWay, {"eta": 1.0}),
    "dpmpp_2s_ancestral_06": (HalfWay, {"eta": 0.6}),
}


@every_schedule
@pytest.mark.parametrize("golden", CASES)
def test_one_step_rules_are_those_of_k_diffusion(golden, schedule):
    kind, options = CASES[golden]
    silent = not {"eta", "S_churn"} & options.keys()
    same(golden, walked(make(kind, STEPS, GRID, **options), schedule, no_noise if silent else drawn))


MULTISTEP = {  # golden -> preset, and what the preset says otherwise
    "dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_2m_sde_midpoint": ("dpmpp_2m_sde", {}),
    "dpmpp_2m_sde_heun": ("dpmpp_2m_sde", {"slope": "exact"}),
    "dpmpp_2m_sde_06": ("dpmpp_2m_sde", {"eta": 0.6}),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}),
    "dpmpp_3m_sde_06": ("dpmpp_3m_sde", {"eta": 0.6}),
    "dpmpp_3m_sde_0": ("dpmpp_3m_sde", {"eta": 0.0}),
    "euler": ("euler", {}),
    "euler_ancestral": ("euler_ancestral", {}),
    "euler_ancestral_06": ("euler_ancestral", {"eta": 0.6}),
}


@every_schedule
@pytest.mark.parametrize("golden", MULTISTEP)
def test_multistep_and_ancestral_rules_are_those_of_k_diffusion(golden, schedule):
    option, rest = MULTISTEP[golden]
    same(golden, walked(replace(preset(option), steps=STEPS, grid=GRID, **rest), schedule, drawn))


@every_schedule
@pytest.mark.parametrize("order", [2, 3, 4])
def test_lms_is_that_of_k_diffusion(order, schedule):
    """But for the end: theirs goes to sigma = 0 by the polynomial too, ours to the picture foreseen."""
    golden = "lms" if order == 4 else f"lms_{order}"
    states = walked(replace(preset("lms"), steps=STEPS, grid=GRID, order=order), schedule)
    close(torch.stack([s.x0 for s in states[:-1]]), GOLDEN[f"{golden}/x0"], ATOL)
    close(torch.stack([s.x for s in states[:-1]]), GOLDEN[f"{golden}/x"], ATOL)


@pytest.mark.parametrize("schedule", [EDM(), VE()], ids=name)
def test_heun_in_its_own_frame_is_k_diffusions_where_alpha_is_1(schedule):
    same("heun", walked(make(Heun, STEPS, GRID), schedule))


@every_schedule
@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_dpmpp_sde_is_that_of_k_diffusion(eta, schedule):
    """Theirs takes any two noises of unit variance; ours makes the second go on from the first. Ours is given the fresh part
    that leads to theirs."""

    def kept(high: float, low: float) -> tuple[float, float]:
        """sigma_down, sigma_up of k-diffusion's get_ancestral_step."""
        up = min(low, eta * low * math.sqrt(1 - (low / high) ** 2))
        return math.sqrt(low**2 - up**2), up

    def noise(step: int, which: int = 0) -> Tensor:
        first, second = GOLDEN["noise"][step]
        if which == 2:
            return first
        t, s = SIGMAS[step].item(), SIGMAS[step + 1].item()
        m = math.sqrt(t * s)
        carried = kept(m, s)[0] / m * kept(t, m)[1]
        return (kept(t, s)[1] * second - carried * first) / math.sqrt(kept(t, s)[1] ** 2 - carried**2)

    golden = {1.0: "dpmpp_sde", 0.6: "dpmpp_sde_06"}[eta]
    same(golden, walked(make(NoisyHalfWay, STEPS, GRID, eta=eta), schedule, noise))


@every_schedule
@pytest.mark.parametrize("calls", [10, 11])
def test_dpm_fast_is_that_of_k_diffusion(calls, schedule):
    """Its groups are equal in log sigma, whatever their order; it stops at the last sigma above 0. (With a number of calls that
    3 divides, it ends in groups of 2 and 1 where ours ends in one of 3.)"""
    ends = torch.linspace(math.log(SIGMAS[0]), math.log(SIGMAS[-2]), calls // 3 + 2, dtype=torch.float64).tolist()
    orders = [3] * (calls // 3) + [calls % 3]
    logs = [a + (b - a) * k / order for (a, b), order in zip(pairwise(ends), orders) for k in range(order)]
    grid = Listed(tuple(math.exp(log) for log in [*logs, ends[-1]]), of="sigma")
    states = walked(make(SingleStep, calls + 1, grid, frame="noise", order=3, rule="paper"), schedule)
    first = [3 * k for k in range(calls // 3 + 1)]
    close(torch.stack([states[i].x for i in first]), GOLDEN[f"dpm_fast_{calls}/x"], ATOL)
    close(torch.stack([states[i].x0 for i in first]), GOLDEN[f"dpm_fast_{calls}/x0"], ATOL)
    close(states[-2].x, GOLDEN[f"dpm_fast_{calls}/end"], ATOL)
    close(states[-1].x, states[-2].x0, 1e-12)


@every_schedule
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_adaptive_is_that_of_k_diffusion(order, schedule):
    """Both pictures in one walk of ours; theirs were drawn one by one, and take different numbers of moves."""
    lengths = [len(GOLDEN[f"dpm_adaptive_{order}/{i}/sigma"]) for i in range(2)]
    states = walked(make(Adaptive, 40, GRID, order=order), schedule)
    assert len(states) == max(lengths) + 2
    for i in range(2):
        theirs = {key: GOLDEN[f"dpm_adaptive_{order}/{i}/{key}"] for key in ("end", "x0")}
        close(torch.stack([s.x0[i] for s in states[: lengths[i]]]), theirs["x0"][:, 0], ATOL)
        close(states[-2].x[i], theirs["end"][0], ATOL)
