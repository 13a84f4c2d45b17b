"""diffusers' schedulers, number for number: the same denoiser, times and noise on both sides.

The peer's table is replaced by ours in float64 (test_schedules.py compares the tables), so that what is compared is the rule.
Peers that round their state to float32 are held to what float32 leaves, the others to 1e-7 and less. Where a peer's last move
gives not-a-number, or leaves noise in the picture, they are compared up to there.
"""

from itertools import pairwise

import pytest
import torch
from closed_form import close, f64, name, pictures
from walks import fresh, in_sigma, make, ours, same_states, told_by

from diffusion_cli.samplers import Ancestral, Heun, Karras, Leading, Linspace, Multistep, Trailing, Uniform
from diffusion_cli.schedules import EDM, VE, Betas, Flow, Shifted

ONE = f64(1.0)[0]


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
    same_states(
        ours(make(Multistep, steps, slope="midpoint"), schedule, x), states, 5e-4
    )  # sigmas and state are float32, x is up to 300


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
