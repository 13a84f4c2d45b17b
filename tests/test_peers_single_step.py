"""diffusers' schedulers that look at one step alone, number for number.

Both sides get the same denoiser, times and noise; the peer's table is replaced by ours in float64, so that what is compared is
the rule. Those that ask twice a move count both questions as steps.
"""

import math
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from closed_form import name, pictures
from torch import Tensor
from walks import DATA, fresh, make, no_noise, ours, same_states, told_by

from diffusion_cli.samplers import (
    HalfWay,
    Heun,
    Karras,
    LogSNR,
    NoisyHalfWay,
    PredictorCorrector,
    SingleStep,
    Uniform,
)
from diffusion_cli.schedules import EDM, VE, VP, Betas, Flow, Schedule

GRID = Karras(0.02, 40.0)
N = 12
every_schedule = pytest.mark.parametrize("schedule", [Betas(), Betas("cosine"), EDM()], ids=name)
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of numpy, in their constructors


def rho(schedule: Schedule, times: Tensor) -> Tensor:
    """sigma / alpha, the peers' sigma."""
    return torch.exp(-schedule.log_snr(times) / 2)


def half_way(schedule: Schedule, high: Tensor, low: Tensor) -> Tensor:
    """The time at the geometric mean of two of the peers' sigmas."""
    return schedule.t_of_log_snr(-torch.log(high) - torch.log(low))


def twice(of: Tensor) -> Tensor:
    """[first, second, second, third, third ... last]: a value for each question."""
    return torch.cat([of[:1], of[1:-1].repeat_interleave(2), of[-1:]])


def asked_twice(peer, schedule: Schedule, x: Tensor, sigmas: Tensor, at: list[Tensor], times: Tensor) -> list[Tensor]:
    """The peer's states at times, when its questions are answered at the times `at`."""
    peer.sigmas, peer.timesteps = twice(sigmas), torch.zeros(len(at))
    peer.set_begin_index(0)
    y, states = x / schedule.alpha(times[0]), [x]
    for i, t in enumerate(at):
        _, eps = told_by(schedule, y * schedule.alpha(t), t)
        y = peer.step(eps, t, y).prev_sample.double()
        if i % 2 == 1 or i == len(at) - 1:
            states.append(y * schedule.alpha(times[len(states)]))
    return states


def start(schedule: Schedule, times: Tensor) -> Tensor:
    return float(schedule.sigma(times[0])) * pictures(2)


@every_schedule
def test_heun_in_the_noise_frame_is_that_of_diffusers(schedule):
    from diffusers import HeunDiscreteScheduler

    times = GRID.times(N, schedule)
    peer, x = HeunDiscreteScheduler(), start(schedule, times)
    peer.prev_derivative = peer.dt = None
    states = asked_twice(peer, schedule, x, rho(schedule, times), list(twice(times))[:-1], times)
    same_states(ours(make(Heun, N, GRID, frame="noise"), schedule, x), states, 1e-9)


@every_schedule
def test_dpm_2_is_that_of_diffusers(schedule):
    from diffusers import KDPM2DiscreteScheduler

    times = GRID.times(N, schedule)
    sigmas = rho(schedule, times)
    peer, x = KDPM2DiscreteScheduler(), start(schedule, times)
    middle = torch.sqrt(sigmas[:-1] * sigmas[1:])  # [N]: of each move; 0 of the last
    peer.sigmas_interpol = torch.cat([middle[:1], middle.repeat_interleave(2)])
    at = [t for a, b in pairwise(times[:-1]) for t in (a, half_way(schedule, rho(schedule, a), rho(schedule, b)))]
    states = asked_twice(peer, schedule, x, sigmas, [*at, times[-2]], times)
    same_states(ours(make(HalfWay, N, GRID, frame="noise"), schedule, x), states, 1e-9)


@every_schedule
def test_dpm_2_ancestral_is_that_of_diffusers(monkeypatch, schedule):
    from diffusers.schedulers import scheduling_k_dpm_2_ancestral_discrete as module

    times = GRID.times(N, schedule)
    sigmas = rho(schedule, times)
    peer, x = module.KDPM2AncestralDiscreteScheduler(), start(schedule, times)
    up = torch.sqrt(sigmas[1:] ** 2 * (1 - (sigmas[1:] / sigmas[:-1]) ** 2))
    down = torch.sqrt(sigmas[1:] ** 2 - up**2)
    for key, value in {"up": up, "down": down, "interpol": torch.sqrt(sigmas[:-1] * down)}.items():
        setattr(peer, f"sigmas_{key}", value.repeat_interleave(2))
    steps = iter(range(N))
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: fresh(x)(next(steps)))
    at = [t for a, low in zip(times, down[:-1]) for t in (a, half_way(schedule, rho(schedule, a), low))]
    states = asked_twice(peer, schedule, x, sigmas, [*at, times[-2]], times)
    same_states(ours(make(HalfWay, N, GRID, frame="noise", eta=1.0), schedule, x), states, 1e-9)


@every_schedule
def test_dpmpp_sde_is_that_of_diffusers(monkeypatch, schedule):
    """Its Brownian tree (of torchsde, not needed here) gives way to the two noises of ours, the second one led on from the
    first."""
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler

    times = GRID.times(N, schedule)
    sigmas = rho(schedule, times)
    peer, x = DPMSolverSDEScheduler(), start(schedule, times)
    questions = iter(range(2 * N))

    def noise(_from: Tensor, _to: Tensor) -> Tensor:
        i, second = divmod(next(questions), 2)
        first, z = fresh(x)(i, 2), fresh(x)(i)
        q = float(torch.sqrt(sigmas[i + 1] / sigmas[i]))  # of rho over half a move
        share = q / math.sqrt(1 + q**2)  # correlation of the exact process at its middle and its end
        return share * first + math.sqrt(1 - share**2) * z if second else first

    peer.noise_sampler = noise
    at = [t for a, b in pairwise(times[:-1]) for t in (a, half_way(schedule, rho(schedule, a), rho(schedule, b)))]
    states = asked_twice(peer, schedule, x, sigmas, [*at, times[-2]], times)
    same_states(ours(make(NoisyHalfWay, N, GRID, eta=1.0), schedule, x), states, 1e-9)


@pytest.mark.parametrize("steps", [2, 9])
def test_flow_heun_is_that_of_diffusers(steps):
    from diffusers import FlowMatchHeunDiscreteScheduler

    schedule, times, x = Flow(), Uniform().times(steps, Flow()), pictures(2)
    peer = FlowMatchHeunDiscreteScheduler()
    peer.sigmas, peer.timesteps = twice(times), twice(times)[:-1]
    peer.prev_derivative = peer.dt = None
    peer.set_begin_index(0)
    y, states = x, [x]
    for i, t in enumerate(twice(times)[:-1]):
        x0, eps = told_by(schedule, y, t)
        y = peer.step(eps - x0, t, y).prev_sample
        if i % 2 == 1 or i == 2 * steps - 2:
            states.append(y)
    same_states(ours(make(Heun, steps, Uniform()), schedule, x), states, 5e-6)  # their state is float32


KINDS = {"dpmsolver": {"frame": "noise"}, "dpmsolver++": {}, "sde-dpmsolver++": {"eta": 1.0}}
RULES = [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun")]
# Their third-order SDE form in the heun manner has a sign wrong: the weight of the curvature tends to -1 for small moves
FAULTY = (3, "heun", "sde-dpmsolver++")


@pytest.mark.parametrize("steps", [7, 10, 12])
@pytest.mark.parametrize("order, rule, kind", [(*r, k) for r in RULES for k in KINDS if (*r, k) != FAULTY])
@pytest.mark.parametrize("schedule", [Betas(), Betas("cosine"), VP()], ids=name)
def test_single_step_is_that_of_diffusers(monkeypatch, schedule, order, rule, kind, steps):
    from diffusers.schedulers import scheduling_dpmsolver_singlestep as module

    grid = Karras(0.02, 40.0) if rule == "heun" else LogSNR(-4, 5)
    times = grid.times(steps, schedule)
    peer = module.DPMSolverSinglestepScheduler(solver_order=order, solver_type=rule, lower_order_final=True)
    peer.set_timesteps(steps)
    peer.register_to_config(algorithm_type=kind)  # they refuse dpmsolver a walk to 0; both sides stop before
    peer.sigmas, peer.order_list = rho(schedule, times), peer.get_order_list(steps)
    peer.set_begin_index(0)
    x = start(schedule, times)
    states, sampler = [x], make(SingleStep, steps, grid, order=order, rule=rule, **KINDS[kind])
    lam = schedule.log_snr(times) / 2
    first, path = 0, torch.zeros_like(x)
    for i, t in enumerate(times[:-2]):
        if peer.order_list[i] == 1:
            first, path = i, torch.zeros_like(x)
        # our noise along a group is one path, which theirs are taken from
        step = float(torch.exp(-(lam[i + 1] - lam[i])))
        path = schedule.sigma(times[i + 1]) * (step * path / schedule.sigma(t) + math.sqrt(1 - step**2) * fresh(x)(i))
        z = path / schedule.sigma(times[i + 1]) / torch.sqrt(1 - torch.exp(-2 * (lam[i + 1] - lam[first])))
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: z)  # noqa: B023
        _, eps = told_by(schedule, states[-1], t)
        states.append(peer.step(eps, t, states[-1]).prev_sample)
    same_states(ours(sampler, schedule, x)[:-1], states, 1e-9)


@pytest.mark.parametrize("corrections", [0, 1, 2])
def test_predictor_corrector_is_that_of_diffusers(monkeypatch, corrections):
    """A batch of one: theirs takes the mean of the norms over a batch."""
    from diffusers.schedulers import scheduling_sde_ve as module

    schedule, x = VE(), 50 * pictures(1)
    sampler = make(PredictorCorrector, N, Uniform(), corrections=corrections, snr=0.16)
    times = sampler.times(schedule)
    peer = module.ScoreSdeVeScheduler(snr=0.16)
    peer.timesteps, peer.discrete_sigmas = times[:-1], schedule.sigma(times[:-1]).flip(0)
    draws: list[Tensor] = []
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: draws.pop(0))

    def score(x: Tensor, t: Tensor) -> Tensor:
        return (DATA.denoise(schedule)(x, t) - x) / schedule.sigma(t) ** 2

    states = [x]
    for i, (t, s) in enumerate(pairwise(times)):
        draws += [fresh(x)(i, which) for which in range(corrections + 1)]
        # their place in the table is a float, cut off
        done = peer.step_pred(score(states[-1], t), (N - 1 - i + 1e-3) / (N - 1), states[-1])
        y = done.prev_sample if s > 0 else done.prev_sample_mean
        for _ in range(corrections if s > 0 else 0):
            y = peer.step_correct(score(y, s), y).prev_sample
        draws.clear()
        states.append(y)
    # some of their coefficients are float32, of a state up to 150
    same_states(ours(sampler, schedule, x), states, 1e-4)


def test_none_of_these_draws_noise_unasked():
    for kind in (Heun, HalfWay, NoisyHalfWay, SingleStep):
        assert len(list(make(kind, 5).walk(DATA.denoise(VP()), VP(), pictures(1), no_noise))) > 1
