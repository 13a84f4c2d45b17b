"""diffusers' multistep schedulers, number for number: the same denoiser, times and noise on both sides.

Peers that round their state to float32 are held to what float32 leaves, the others to 1e-7 and less. Where a peer's last move
gives not-a-number, or leaves noise in the picture, they are compared up to there.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from closed_form import close, f64, name, pictures
from walks import DATA, fresh, in_sigma, make, ours, preset, same_states, told_by

from diffusion_cli.samplers import PNDM, Grid, Karras, Leading, LogSNR, Multistep, Trailing
from diffusion_cli.schedules import EDM, VE, VP, Betas, VariancePreserving

pytestmark = pytest.mark.filterwarnings(
    "ignore:.algorithm_types dpmsolver:FutureWarning", "ignore:divide by zero:RuntimeWarning"
)
ONE = f64(1.0)[0]
DOUBLE = 1e-8


def beside(peer, schedule, times, x, **rest) -> list[torch.Tensor]:
    """The states of a peer that counts in sigma / alpha and is told eps; rest: what else it is told at step i."""
    in_sigma(peer, schedule, times)
    states = [x]
    for i, t in enumerate(times[:-1]):
        _, eps = told_by(schedule, states[-1], t)
        said = {key: value(i) for key, value in rest.items()}
        states.append(peer.step(eps, peer.timesteps[i], states[-1], **said).prev_sample.double())
    return states


TYPES = {  # algorithm_type -> frame, eta
    "dpmsolver++": ("data", 0.0),
    "sde-dpmsolver++": ("data", 1.0),
    "dpmsolver": ("noise", 0.0),
    "sde-dpmsolver": ("noise", 1.0),
}


@pytest.mark.parametrize("steps", [5, 12, 30])
@pytest.mark.parametrize("solver_type, slope", [("midpoint", "midpoint"), ("heun", "exact")])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("schedule", [Betas(), Betas("cosine"), VP()], ids=name)
def test_dpm_solver_multistep_is_that_of_diffusers(schedule, kind, order, solver_type, slope, steps):
    """taper is their lower_order_final, which they heed below 15 steps. Third order: half the curvature."""
    from diffusers import DPMSolverMultistepScheduler

    if kind.startswith("sde") and order == 3:
        return  # the next test, and sde-dpmsolver has none
    (frame, eta), grid, x = TYPES[kind], LogSNR(-7.0, 7.0), pictures(2)
    times = grid.times(steps, schedule)
    last = {"final_sigmas_type": "zero"} if frame == "data" else {"final_sigmas_type": "sigma_min", "euler_at_final": True}
    peer = DPMSolverMultistepScheduler(solver_order=order, algorithm_type=kind, solver_type=solver_type, **last)
    peer.set_timesteps(steps)
    z = fresh(x)
    wanted = beside(peer, schedule, times, x, variance_noise=lambda i: z(i) if eta else None)
    options = {"frame": frame, "order": order, "slope": slope, "curvature": "half", "taper": steps < 15, "eta": eta}
    got = ours(make(Multistep, steps, grid, **options), schedule, x)
    size = max(1.0, *(float(w.abs().max()) for w in wanted if w.isfinite().all()))
    same_states(got[:-1], wanted[:-1], 2e-5 * size)  # their state is float32
    if frame == "data":  # with the noise theirs is infinite times 0 there
        close(got[-1], wanted[-1], 2e-5 * size)


def test_the_third_order_sde_of_diffusers_has_a_wrong_sign():
    """(1 - e^(-2h) - 2h) / (2h)^2 - 1/2 in place of + 1/2: its D2 has a weight of -1, not of h / 3, however small h is. Ours is
    k-diffusion's (test_peers_k.py); theirs is ours less D2 alpha_s."""
    from diffusers import DPMSolverMultistepScheduler

    schedule, grid, x = Betas(), LogSNR(-6.0, 6.0), pictures(2)
    times, z = grid.times(20, schedule), fresh(x)
    sampler = make(Multistep, 20, grid, order=3, curvature="half", eta=1.0)
    peer = DPMSolverMultistepScheduler(
        solver_order=3, algorithm_type="sde-dpmsolver++", solver_type="heun", final_sigmas_type="zero"
    )
    peer.set_timesteps(20)
    theirs = beside(peer, schedule, times, x, variance_noise=z)
    x0, lam = [told_by(schedule, a, t)[0] for a, t in zip(theirs, times[:3])], schedule.log_snr(times) / 2
    r0, r1 = (lam[2] - lam[1]) / (lam[3] - lam[2]), (lam[1] - lam[0]) / (lam[3] - lam[2])
    D2 = ((x0[2] - x0[1]) / r0 - (x0[1] - x0[0]) / r1) / (r0 + r1)
    mine = ours(sampler, schedule, x)
    same_states(mine[:3], theirs[:3], 2e-5)
    close(theirs[3], mine[3] - schedule.alpha(times[3]) * D2, 2e-5)
    assert D2.abs().max() > 1e-3


@pytest.mark.parametrize("steps", [5, 12, 30])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("schedule", [Betas(), VP()], ids=name)
def test_deis_is_that_of_diffusers(schedule, order, steps):
    """Interpolation in log rho: exactly DPM-Solver's, at order 3 with the whole curvature. The last move of theirs, beyond 14
    steps, takes the logarithm of 0."""
    from diffusers import DEISMultistepScheduler

    grid, x = LogSNR(-7.0, 7.0), pictures(2)
    peer = DEISMultistepScheduler(solver_order=order)
    peer.set_timesteps(steps)
    wanted = beside(peer, schedule, grid.times(steps, schedule), x)
    got = ours(replace(preset("deis"), steps=steps, grid=grid, order=order, taper=steps < 15), schedule, x)
    same_states(got[:-1], wanted[:-1], 1e-7 if order > 1 else DOUBLE)
    if steps < 15:
        close(got[-1], told_by(schedule, wanted[-2], grid.times(steps, schedule)[-2])[0], 1e-6)


@pytest.mark.parametrize("steps", [4, 9, 25])
@pytest.mark.parametrize("solver_type, slope", [("bh1", "bh1"), ("bh2", "midpoint")])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("frame", ["data", "noise"])
@pytest.mark.parametrize("schedule", [Betas(), VP()], ids=name)
def test_unipc_is_that_of_diffusers(schedule, frame, order, solver_type, slope, steps):
    """Their state is the prediction, ours is corrected; so what they start the next move from is compared, and the end."""
    from diffusers import UniPCMultistepScheduler

    grid, x = LogSNR(-7.0, 7.0), pictures(2)
    times = grid.times(steps, schedule)
    peer = UniPCMultistepScheduler(solver_order=order, solver_type=solver_type, predict_x0=frame == "data")
    peer.set_timesteps(steps)
    in_sigma(peer, schedule, times)
    y, wanted = x, []
    for i, t in enumerate(times[:-1]):
        y = peer.step(told_by(schedule, y, t)[1], peer.timesteps[i], y).prev_sample
        wanted.append(peer.last_sample)
    sampler = replace(preset("unipc"), steps=steps, grid=grid, frame=frame, order=order, corrector=order + 1, slope=slope)
    got = ours(sampler, schedule, x)
    same_states(got[:-1], wanted, 1e-7)
    if (frame, slope) == ("data", "midpoint"):  # theirs is infinite times 0 there with the noise, and with bh1
        close(got[-1], y, 1e-7)


def test_unipc_as_it_is_preset_is_diffusers_default():
    from diffusers import UniPCMultistepScheduler

    peer = UniPCMultistepScheduler()
    assert (peer.config.solver_order, peer.config.solver_type, peer.config.lower_order_final) == (2, "bh2", True)
    ours_ = preset("unipc")
    assert (ours_.order, ours_.corrector, ours_.slope, ours_.taper) == (2, 3, "midpoint", True)


@pytest.mark.parametrize("steps", [4, 12, 30])
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("predictor, corrector", [(1, 1), (2, 2), (3, 3), (3, 4), (2, 0)])
@pytest.mark.parametrize("frame, kind", [("data", "data_prediction"), ("noise", "noise_prediction")])
def test_sa_solver_is_that_of_diffusers(monkeypatch, frame, kind, predictor, corrector, tau, steps):
    """Two points: bh1 in the data frame, which they call a modification of no consequence for the order; exact in the other."""
    from diffusers.schedulers import scheduling_sasolver as module

    schedule, grid, x = Betas(), LogSNR(-6.0, 6.0), pictures(2)
    times, z = grid.times(steps, schedule), fresh(x)
    peer = module.SASolverScheduler(
        predictor_order=predictor, corrector_order=corrector or 1, algorithm_type=kind, tau_func=lambda t: torch.tensor(tau)
    )
    peer.set_timesteps(steps)
    if not corrector:
        monkeypatch.setattr(peer, "stochastic_adams_moulton_update", lambda **said: said["this_sample"])
    in_sigma(peer, schedule, times)
    y, wanted = x, []
    for i, t in enumerate(times[:-1]):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, i=i, **__: z(i))
        y = peer.step(told_by(schedule, y, t)[1], peer.timesteps[i], y).prev_sample
        wanted.append(peer.last_sample)
    options = {"frame": frame, "order": predictor, "corrector": corrector, "eta": tau**2, "taper": True}
    slope = "bh1" if frame == "data" else "exact"
    got = ours(make(Multistep, steps, grid, slope=slope, **options), schedule, x)
    size = max(1.0, *(float(w.abs().max()) for w in wanted))
    same_states(got[:-1], wanted, 1e-5 * size)  # their integrals are differences of exponentials of lambda, and tau is float32


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", [Betas(), EDM(), VE()], ids=name)
def test_lms_is_that_of_diffusers(schedule, order):
    """Up to the last move: theirs goes on with all points, and leaves noise in the picture."""
    from diffusers import LMSDiscreteScheduler

    grid = Karras(0.05, 20.0)
    times = grid.times(12, schedule)
    peer = LMSDiscreteScheduler()
    in_sigma(peer, schedule, times)
    x = float(schedule.sigma(times[0])) * pictures(2)
    y, wanted = x / schedule.alpha(times[0]), [x]
    for t, s in pairwise(times):
        peer.is_scale_input_called = True
        _, eps = told_by(schedule, y * schedule.alpha(t), t)
        y = peer.step(eps, t, y, order=order).prev_sample
        wanted.append(y * schedule.alpha(s))
    got = ours(replace(preset("lms"), steps=12, grid=grid, order=order), schedule, x)
    same_states(got[:-1], wanted[:-1], DOUBLE)


class Quarter(VariancePreserving):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): IPNDMScheduler's."""

    def log_snr(self, t):
        return -2 * torch.log(torch.tan(torch.pi / 2 * t))

    def t_of_log_snr(self, log_snr):
        return 2 / torch.pi * torch.atan(torch.exp(-log_snr / 2))


class Equal(Grid):
    def times(self, steps, schedule):
        return torch.linspace(0.98, 0, steps + 1, dtype=torch.float64)


@pytest.mark.parametrize("steps", [3, 12])
def test_ipndm_is_that_of_diffusers(steps):
    """From a little below pure noise, where theirs divides by alpha = 0; up to the last move, which leaves noise in theirs."""
    from diffusers import IPNDMScheduler

    schedule, x = Quarter(), pictures(2)
    times = Equal().times(steps, schedule)
    peer = IPNDMScheduler()
    peer.set_timesteps(steps)
    peer.alphas, peer.betas, peer.timesteps = schedule.alpha(times), schedule.sigma(times), times[:-1]
    peer.set_begin_index(0)
    wanted = [x]
    for t in times[:-1]:
        x0, eps = told_by(schedule, wanted[-1], t)
        v = schedule.alpha(t) * eps - schedule.sigma(t) * x0
        wanted.append(peer.step(v, t, wanted[-1]).prev_sample)
    same_states(ours(replace(preset("ipndm"), steps=steps, grid=Equal()), schedule, x)[:-1], wanted[:-1], DOUBLE)


@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize("warm_up", ["runge_kutta", "heun"])
@pytest.mark.parametrize("curve", ["linear", "scaled_linear"])
def test_pndm_is_that_of_diffusers(curve, warm_up, steps):
    """runge_kutta is theirs with skip_prk_steps off, heun with it on. Up to the last move, which leaves noise in theirs."""
    from diffusers import PNDMScheduler

    schedule, x, grid = Betas(curve), pictures(2), Leading()
    peer = PNDMScheduler(skip_prk_steps=warm_up == "heun", timestep_spacing="leading")
    peer.alphas_cumprod, peer.final_alpha_cumprod = schedule.alpha_bar, ONE
    peer.set_timesteps(steps)
    y, asked, states = x, [], []
    for k in peer.timesteps:
        t = (k.double() + 1) / 1000
        asked.append(t)
        states.append(y)
        y = peer.step(told_by(schedule, y, t)[1], k, y).prev_sample
    # of all their states those that our walk stops at: after 4 questions a move, or after the second of the first
    stops = [0, 4, 8, *range(12, len(asked))] if warm_up == "runge_kutta" else [0, *range(2, len(asked))]
    close(torch.stack([asked[i] for i in stops]), grid.times(steps, schedule)[:-1], 1e-12)
    got = ours(make(PNDM, steps, grid, warm_up=warm_up), schedule, x)
    same_states(got[:-1], [states[i] for i in stops], DOUBLE)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_lcm_is_that_of_diffusers(monkeypatch, steps):
    """With their timestep_scaling large, which takes their boundary condition, a matter of how the model was trained, away."""
    from diffusers.schedulers import scheduling_lcm as module

    schedule, x = Betas("scaled_linear", first=0.00085, last=0.012), pictures(2)
    peer = module.LCMScheduler(timestep_scaling=1e9, clip_sample=False)
    peer.alphas_cumprod, peer.final_alpha_cumprod = schedule.alpha_bar, ONE
    peer.set_timesteps(steps, timesteps=None)
    times = torch.cat([(peer.timesteps.double() + 1) / 1000, f64(0.0)])
    states, z = [x], fresh(x)
    for i, k in enumerate(peer.timesteps):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, i=i, **__: z(i))
        states.append(peer.step(told_by(schedule, states[-1], times[i])[1], k, states[-1]).prev_sample)
    got = [s.x for s in preset("lcm").moves(DATA.denoise(schedule), schedule, x, times, z)]
    same_states(got, states, DOUBLE)
    if steps != 8:
        close(times, Trailing().times(steps, schedule), 0.011)  # theirs are multiples of 20
