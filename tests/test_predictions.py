"""Every prediction on every schedule is one row of the 2 x 2 system, and its rows are those of the papers. float64."""

import pytest
import torch
from closed_form import SCHEDULES, Mixture, close, concrete, f64, name, pictures, preserves_variance
from torch import nn

from diffusion_cli.denoiser import Denoiser
from diffusion_cli.predictions import X0, Eps, NextStep, Preconditioned, Prediction, Score, UnitScore, V, Velocity
from diffusion_cli.samplers import Ancestral, Uniform
from diffusion_cli.schedules import EDM, VE, VP, Betas, Flow

NEEDS_SIGNAL = (Eps, Score, UnitScore)
PAIRS = [
    pytest.param(schedule, kind, id=f"{name(kind)}-{name(schedule)}")
    for kind in concrete(Prediction)
    for schedule in SCHEDULES
    if not (schedule.reaches_zero and kind in NEEDS_SIGNAL)
]
every_pair = pytest.mark.parametrize("schedule, kind", PAIRS)
every = pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
T = f64(0.2, 0.31, 0.5, 0.75, 0.98, 1.0)  # sigma of EDM, the smallest, is 1e-3 at 0.2: less leaves no digits of the noise in x


@every_pair
def test_decode_undoes_target(schedule, kind):
    prediction = kind(schedule)
    x0, noise = pictures(len(T), 1), pictures(len(T), 2)
    got_x0, got_noise = prediction.decode(prediction.target(x0, noise, T), schedule.mix(x0, noise, T), T)
    close(got_x0, x0, 1e-8)
    close(got_noise, noise, 1e-8)


@every_pair
def test_the_picture_comes_back_at_small_times_too(schedule, kind):
    prediction, t = kind(schedule), f64(1e-3, 0.01, 0.05, 0.1)
    x0, noise = pictures(4, 1), pictures(4, 2)
    close(prediction.decode(prediction.target(x0, noise, t), schedule.mix(x0, noise, t), t)[0], x0, 1e-8)


@pytest.mark.parametrize("schedule", [Flow(), Betas("linear", zero_terminal_snr=True)], ids=name)
def test_the_time_of_pure_noise_is_told_as_one_that_is_trained(schedule):
    before, last = Preconditioned(schedule, 0.5).c_noise(f64(0.999, 1.0))
    assert 0 <= float(last - before) < 0.3


@every_pair
def test_one_time_serves_the_batch(schedule, kind):
    prediction, t = kind(schedule), f64(0.6)
    x0, noise = pictures(3, 1), pictures(3, 2)
    assert torch.equal(prediction.target(x0, noise, t[0]), prediction.target(x0, noise, t.expand(3)))
    for one, many in zip(prediction.decode(x0, noise, t[0]), prediction.decode(x0, noise, t.expand(3))):
        assert torch.equal(one, many)
    assert prediction.c_noise(t).shape == prediction.c_in(t).shape == t.shape


@every_pair
def test_the_determinant_says_what_an_error_of_F_does(schedule, kind):
    prediction = kind(schedule)
    a, b = prediction.row(T)
    det = prediction.determinant(T)
    close(det, schedule.alpha(T) * b - schedule.sigma(T) * a, 1e-12)
    assert det.isfinite().all() and (det != 0).all()
    x, F, dF = pictures(len(T), 1), pictures(len(T), 2), pictures(len(T), 3)
    (x0, noise), (x0_off, noise_off) = prediction.decode(F, x, T), prediction.decode(F + dF, x, T)
    by = (-schedule.sigma(T) / det).view(-1, 1, 1, 1)
    close((x0_off - x0) / by, dF, 1e-8)
    close(noise_off - noise, (schedule.alpha(T) / det).view(-1, 1, 1, 1) * dF, 1e-8 * float((1 / det).abs().max().clamp(min=1)))


@every_pair
def test_everything_is_finite_in_float32_up_to_pure_noise(schedule, kind):
    prediction, t = kind(schedule), torch.tensor([1e-3, 0.05, 0.5, 0.999, 1.0])
    x0, noise = pictures(5, 1).float(), pictures(5, 2).float()
    F = prediction.target(x0, noise, t)
    assert F.dtype == torch.float32 and F.isfinite().all()
    assert prediction.decode(F, schedule.mix(x0, noise, t), t)[0].isfinite().all()
    assert prediction.c_in(t).isfinite().all() and prediction.c_noise(t).isfinite().all()


# ---------------------------------------------------------------------------- the rows of the papers


@every
def test_the_table_of_rows(schedule):
    alpha, sigma, (d_alpha, d_sigma) = schedule.alpha(T), schedule.sigma(T), schedule.velocity(T)
    S = torch.sqrt(sigma**2 + 0.25 * alpha**2)
    table = {
        X0: (1, 0),
        V: (-sigma, alpha),
        Velocity: (d_alpha, d_sigma),
        Preconditioned: (2 * sigma / S, -alpha / 2 / S),
        NextStep: (schedule.alpha(T - 1 / 16), schedule.sigma(T - 1 / 16)),
    }
    if not schedule.reaches_zero:
        table |= {Eps: (0, 1), Score: (0, -1 / sigma), UnitScore: (0, -2 / sigma)}
    for kind, row in table.items():
        for got, wanted in zip(kind(schedule).row(T), row):
            wanted = torch.as_tensor(wanted, dtype=torch.float64)
            close(got, wanted, 1e-12 * float(wanted.abs().max().clamp(min=1)))


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if preserves_variance(s)], ids=name)
def test_v_on_a_variance_preserving_schedule_has_determinant_1(schedule):
    close(V(schedule).determinant(T), torch.ones_like(T), 1e-12)


def test_velocity_on_the_straight_line_is_noise_minus_picture():
    x0, noise = pictures(len(T), 1), pictures(len(T), 2)
    close(Velocity(Flow()).target(x0, noise, T), noise - x0, 0)


def test_velocity_is_the_derivative_of_the_path():
    x0, noise, h, t = pictures(3, 1), pictures(3, 2), 1e-6, f64(0.2003, 0.5003, 0.9003)
    for schedule in (Betas("cosine"), VP(), EDM(), VE()):
        slope = (schedule.mix(x0, noise, t + h) - schedule.mix(x0, noise, t - h)) / (2 * h)
        close(Velocity(schedule).target(x0, noise, t) / slope, torch.ones_like(slope), 1e-5)


@pytest.mark.parametrize("schedule", [EDM(), VE()], ids=name)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.26])
def test_preconditioned_is_table_1_of_karras(schedule, sigma_data):
    prediction, sigma = Preconditioned(schedule, sigma_data), schedule.sigma(T)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / torch.sqrt(sigma_data**2 + sigma**2)
    close(prediction.c_in(T), 1 / torch.sqrt(sigma**2 + sigma_data**2), 1e-12)
    close(prediction.c_noise(T), torch.log(sigma) / 4, 1e-12)
    F, x = pictures(len(T), 1), pictures(len(T), 2)
    theirs = c_skip.view(-1, 1, 1, 1) * x + c_out.view(-1, 1, 1, 1) * F
    close(prediction.decode(F, x, T)[0], theirs, 1e-12)


@every
def test_preconditioned_input_and_target_have_unit_variance(schedule):
    prediction = Preconditioned(schedule, 0.5)
    a, b = prediction.row(T)
    close((a * 0.5) ** 2 + b**2, torch.ones_like(T), 1e-12)
    close(prediction.c_in(T) ** 2 * (schedule.alpha(T) ** 2 / 4 + schedule.sigma(T) ** 2), torch.ones_like(T), 1e-12)


def test_score_is_the_gradient_of_the_log_density():
    schedule, t, data = VP(), f64(0.4)[0], Mixture()
    x = pictures(8).flatten().requires_grad_()
    mean, spread = data._parts(schedule, t)
    density = (f64(*data.weights) / spread * torch.exp(-(((x[:, None] - mean) / spread) ** 2) / 2)).sum(-1)
    score = torch.autograd.grad(torch.log(density).sum(), x)[0]
    x = x.detach()
    close(Score(schedule).decode(score, x, t)[0], data.denoise(schedule)(x, t), 1e-10)  # Tweedie's formula


@pytest.mark.parametrize("kind", NEEDS_SIGNAL)
@every
def test_a_schedule_that_ends_in_pure_noise_refuses_what_needs_signal(schedule, kind):
    if not schedule.reaches_zero:
        kind(schedule)
        return
    with pytest.raises(ValueError, match=rf"prediction={kind.__name__.lower()}.*choose prediction=v, x0, flow or edm"):
        kind(schedule)


@pytest.mark.parametrize("kind", [Eps, X0, V, Velocity])
def test_a_table_tells_its_index(kind):
    for schedule in (Betas(), Betas(steps=50, last=0.3)):
        k = torch.arange(schedule.steps)
        close(kind(schedule).c_noise((k + 1).double() / schedule.steps), k.double(), 1e-9)
        close(kind(schedule).c_noise((k + 1).float() / schedule.steps), k.float(), 1e-3)


def test_without_a_table_the_network_is_told_1000_t():
    close(Velocity(Flow()).c_noise(T), 1000 * T, 0)


@every
@pytest.mark.parametrize("steps", [4, 16])
def test_next_step_walked_on_its_own_grid_gives_exactly_what_the_network_says(schedule, steps):
    prediction, told = NextStep(schedule, steps), []

    def network(x, t):
        told.append(torch.sin(3 * x) + t)
        return told[-1]

    sampler = Ancestral(steps=steps, grid=Uniform(), clip=False)
    states = list(sampler.walk(lambda x, t: prediction.decode(network(x, t), x, t)[0], schedule, pictures(2), lambda i: None))
    for state, F in zip(states[1:], told, strict=True):
        close(state.x, F, 1e-9)
    close(prediction.c_noise(torch.stack([s.t for s in states[:-1]])), torch.arange(steps).double(), 1e-9)


# ---------------------------------------------------------------------------- the denoiser


class Told(nn.Module):
    """A network that knows the answer, and remembers what it was asked."""

    hint_channels, text_width, variance_channels, two_times = 0, 0, 0, False

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []

    def forward(self, x, time, cond=None):
        self.asked.append((x, time, cond))
        return self.answer


@every_pair
def test_a_denoiser_whose_network_is_right_gives_the_picture(schedule, kind):
    prediction, x0, noise = kind(schedule), pictures(3, 1).float(), pictures(3, 2).float()
    for t in (torch.tensor([0.4, 0.7, 0.95]), f64(0.7)[0]):  # a training batch and a sampler's step
        x = schedule.mix(x0, noise, t)
        network = Told(prediction.target(x0, noise, t))
        labels = torch.tensor([1, 2, 3])
        got = Denoiser(network, prediction)(x, t, labels)
        error_of_F = 1e-6 * network.answer.abs().max()
        # float32: what the network says is rounded, and read through 1 / det
        gain = float((schedule.sigma(t) / prediction.determinant(t)).abs().max())
        close(got, x0, max(2e-5, 3 * gain * float(error_of_F)))
        seen, time, cond = network.asked[-1]
        assert time.shape == (3,) and time.dtype == torch.float32 and cond is labels
        close(time, prediction.c_noise(t).float().expand(3), 1e-6)
        close(seen, prediction.c_in(t).float().view(-1, 1, 1, 1) * x, 1e-6 * float(x.abs().max()))
