"""Which times are trained, by which norm, and how much each noise level counts. Draws are float32, formulas float64."""

import math

import pytest
import torch
from closed_form import SCHEDULES, close, concrete, distance_from_uniform, f64, name, pictures

from diffusion_cli.losses import (
    MAE,
    MSE,
    P2,
    Discrete,
    EDMWeight,
    Huber,
    Importance,
    Learned,
    LogitNormal,
    LogNormal,
    Loss,
    LowDiscrepancy,
    MinSNR,
    Norm,
    One,
    Sigmoid,
    Times,
    Uniform,
    Weight,
)
from diffusion_cli.predictions import X0, Eps, Preconditioned, Prediction, Score, UnitScore, V, Velocity
from diffusion_cli.randomness import Source
from diffusion_cli.schedules import EDM, VE, VP, Betas, Flow

every = pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
every_times = pytest.mark.parametrize("times", concrete(Times), ids=name)
N = 100_000
T = f64(0.05, 0.2, 0.4, 0.6, 0.8, 0.97)


def source(count: int = N, step: int = 0, first: int = 0) -> Source:
    return Source(1, torch.arange(first, first + count), step)


def distance_bound(n: int = N) -> float:
    return 1.95 / math.sqrt(n)


# ---------------------------------------------------------------------------- times


@every_times
@every
def test_every_time_is_above_0_and_at_most_1(times, schedule):
    t, correction = times()(schedule, source(5000))
    assert t.shape == correction.shape == (5000,) and t.dtype == torch.float32
    assert ((t >= 1e-6) & (t <= 1)).all()
    assert correction.isfinite().all()


@every_times
def test_a_time_depends_on_its_slot_and_step_alone(times):
    draw = times()
    whole = draw.sample(VP(), source(64))
    parts = [draw.sample(VP(), source(n, first=first)) for first, n in ((0, 5), (5, 27), (32, 32))]
    close(torch.cat(parts), whole, 2e-7)  # not to the bit: torch's sigmoid, softplus and pow round by their place in a vector
    assert (draw.sample(VP(), source(64, step=1)) != whole).float().mean() > 0.9


@every_times
def test_a_distribution_that_is_meant_needs_no_correction(times):
    _, correction = times()(VP(), source(500))
    assert (correction == 1).all()  # Importance too, until it has seen something


@every_times
def test_no_time_is_so_small_that_edms_sigma_is_0(times, monkeypatch):
    """80 t^7 is 0 in float32 from t = 1e-7 on, and a weight on the picture 0 / 0: one draw in ten million would end a run."""
    monkeypatch.setattr(Source, "uniform", lambda self, stream, shape=(): torch.full((len(self.slots), *shape), 2.0**-24))
    monkeypatch.setattr(Source, "normal", lambda self, stream, shape=(): torch.full((len(self.slots), *shape), -6.7))
    assert (times().sample(EDM(), source(3)) >= 1e-6).all()


def test_uniform_times_are_uniform():
    assert distance_from_uniform(Uniform().sample(VP(), source())) < distance_bound()


@pytest.mark.parametrize("steps", [50, 1000])
def test_discrete_times_are_the_knots_equally_often(steps):
    schedule = Betas(steps=steps)
    t = Discrete(steps).sample(schedule, source())
    k = schedule.timestep(t.double())
    close(k, k.round(), 1e-4)  # t is float32
    count = torch.bincount(k.round().long(), minlength=steps)
    assert len(count) == steps
    chi2 = float(((count - N / steps) ** 2 / (N / steps)).sum())
    assert abs(chi2 - (steps - 1)) < 4.5 * math.sqrt(2 * (steps - 1))


@pytest.mark.parametrize("schedule", [EDM(), VP(), Flow(), Betas("cosine"), VE()], ids=name)
@pytest.mark.parametrize("mean, std", [(-1.2, 1.2), (-0.4, 1.0)])
def test_log_normal_makes_log_sigma_normal(schedule, mean, std):
    times = LogNormal(mean, std)
    assert (LogNormal().mean, LogNormal().std) == (-1.2, 1.2)  # Karras et al. 2022, table 1
    log_sigma = -schedule.log_snr(times.sample(schedule, source()).double()) / 2
    assert distance_from_uniform(torch.special.ndtr((log_sigma - mean) / std)) < distance_bound()
    if isinstance(schedule, EDM):  # whose ends are 4.6 deviations away
        assert abs(float(log_sigma.mean()) - mean) < 4.5 * std / math.sqrt(N)
        assert abs(float(log_sigma.std()) - std) < 4.5 * std / math.sqrt(2 * N)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.5, 0.8)])
def test_logit_normal_makes_the_logit_normal(mean, std):
    t = LogitNormal(mean, std).sample(Flow(), source()).double()
    assert distance_from_uniform(torch.special.ndtr((torch.logit(t) - mean) / std)) < distance_bound()


def test_low_discrepancy_is_uniform_over_steps_and_more_even_within_a_batch():
    even, plain = LowDiscrepancy(), Uniform()
    over_steps = torch.cat([even.sample(VP(), source(1, step)) for step in range(2000)])
    assert distance_from_uniform(over_steps) < distance_bound(2000)
    for first, size in ((0, 64), (0, 16), (37, 64), (1_000_000, 128)):  # any part of any batch
        gaps = [[distance_from_uniform(d.sample(VP(), source(size, step, first))) for step in range(50)] for d in (even, plain)]
        assert max(gaps[0]) < 3 / size * math.log(size)
        assert sum(gaps[0]) < 0.5 * sum(gaps[1])


# ---------------------------------------------------------------------------- importance


def hard(t: torch.Tensor) -> torch.Tensor:
    """An error that is ten times larger for small t."""
    return 0.1 + torch.exp(-8 * t)


def test_importance_remembers_the_last_losses_of_each_bucket() -> None:
    """Beside a loop over the pictures; batches with more pictures of a bucket than it remembers, and with none."""
    times, made = Importance(buckets=4, memory=3), torch.Generator().manual_seed(0)
    history, seen = torch.zeros(4, 3), [0] * 4
    for size in (1, 2, 7, 40, 3):
        t, error = torch.rand(size, generator=made).clamp(min=0.01), torch.rand(size, generator=made)
        times.observe(t, error)
        for bucket, value in zip((torch.ceil(t * 4) - 1).long().tolist(), error, strict=True):
            history[bucket, seen[bucket] % 3] = value
            seen[bucket] += 1
        assert torch.equal(times.history, history) and times.seen.tolist() == seen


def learned(buckets: int = 20, memory: int = 5, floor: float = 0.001) -> Importance:
    times = Importance(buckets, memory, floor)
    for _ in range(memory):
        t = (torch.arange(buckets) + 0.5) / buckets
        times.observe(t, hard(t))
    return times


def test_importance_is_uniform_until_every_bucket_is_full():
    times, t = Importance(10, 3), (torch.arange(10) + 0.5) / 10
    for _ in range(2):
        times.observe(t, hard(t))
    times.observe(t[:9], hard(t[:9]))
    assert distance_from_uniform(times.sample(VP(), source())) < distance_bound()
    times.observe(t[9:], hard(t[9:]))
    assert distance_from_uniform(times.sample(VP(), source())) > 0.1


def test_importance_draws_in_proportion_to_the_root_mean_square():
    times, buckets = learned(), 20
    middle = (torch.arange(buckets) + 0.5) / buckets
    published = hard(middle).double() / hard(middle).double().sum()  # Nichol and Dhariwal 2021, eq. 18
    expected = 0.999 * published + 0.001 / buckets
    t = times.sample(VP(), source()).double()
    share = torch.bincount(torch.ceil(t * buckets).long() - 1, minlength=buckets) / N
    close(share.double(), expected, 4.5 * math.sqrt(float(expected.max()) / N))
    within = (t * buckets).frac()
    assert distance_from_uniform(within) < distance_bound()  # and evenly inside a bucket
    times.observe(middle[:1].expand(5), torch.tensor([1.0, -1, 1, 1, 7]))
    rms = math.sqrt((4 + 49) / 5)
    others = float(hard(middle[1:]).sum())
    close(times.correction(middle[:1]), torch.tensor([1 / (20 * 0.999 * rms / (rms + others) + 0.001)]), 1e-5)


@pytest.mark.parametrize("floor", [0.001, 0.3])
def test_importance_corrected_has_the_mean_of_uniform_times(floor):
    times = learned(floor=floor)
    t, correction = times(VP(), source())
    for f in (hard, lambda t: t, torch.ones_like, lambda t: torch.cos(9 * t)):
        truth = float(f((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000).mean())
        value = f(t.double()) * correction
        assert abs(float(value.mean()) - truth) < 4.5 * float(value.std()) / math.sqrt(N)
    plain = hard(source().uniform("time"))
    assert (hard(t) * correction).std() < 0.6 * plain.std()  # which is what it is for


def test_importance_carries_its_history_in_its_state():
    times, other = learned(), Importance(20, 5)
    other.load_state_dict(times.state_dict())
    for a, b in zip(times(VP(), source(1000)), other(VP(), source(1000))):
        assert torch.equal(a, b)
    t = torch.tensor([0.31, 0.02])
    for one in (times, other):
        one.observe(t, hard(t))
    assert all(torch.equal(a, b) for a, b in zip(times.state_dict().values(), other.state_dict().values()))


# ---------------------------------------------------------------------------- norms


@pytest.mark.parametrize("norm", concrete(Norm), ids=name)
def test_a_norm_is_for_each_picture_0_at_the_target_and_larger_away(norm):
    F, target = pictures(5, 1), pictures(5, 2)
    whole = norm()(F, target)
    assert whole.shape == (5,) and (whole > 0).all()
    for i in range(5):
        assert torch.equal(norm()(F[i : i + 1], target[i : i + 1])[0], whole[i])
    assert (norm()(F, F) == 0).all()
    assert (norm()(target + 2 * (F - target), target) > whole).all()


def test_mse_and_mae_are_means_over_the_pixels():
    F, target = pictures(5, 1), pictures(5, 2)
    close(MSE()(F, target), torch.stack([((f - y) ** 2).mean() for f, y in zip(F, target)]), 1e-14)
    close(MAE()(F, target), torch.stack([(f - y).abs().mean() for f, y in zip(F, target)]), 1e-14)


@pytest.mark.parametrize("c", [0.03, 1.0])
def test_huber_is_squared_near_and_absolute_far(c):
    F, zero, huber = pictures(4), torch.zeros_like(pictures(4)), Huber(c)
    close(huber(1e-4 * c * F, zero) / (MSE()(1e-4 * c * F, zero) / (2 * c)), torch.ones(4), 1e-5)
    far = 1e6 * c * F.sign()
    close(huber(far, zero) / MAE()(far, zero), torch.ones(4), 2e-6)


# ---------------------------------------------------------------------------- weights


def factor(weight: Weight, prediction: Prediction, t: torch.Tensor) -> torch.Tensor:
    """What the weight makes of an error of 1."""
    return weight(torch.ones_like(t), prediction, t).detach()


def snr(schedule, t: torch.Tensor = T) -> torch.Tensor:
    return (schedule.alpha(t) / schedule.sigma(t)) ** 2


def relative(got: torch.Tensor, wanted: torch.Tensor) -> None:
    close(got / wanted, torch.ones_like(got), 1e-9)


OF_SNR = [w for w in concrete(Weight) if w not in (One, Learned)]  # One is on F by definition, Learned on what it has seen


@pytest.mark.parametrize("weight", OF_SNR, ids=name)
@every
def test_a_weight_means_the_same_objective_for_every_prediction(weight, schedule):
    t = f64(0.3, 0.5, 0.8, 0.97)
    x, F, dF = pictures(4, 1), pictures(4, 2), pictures(4, 3)
    on_x0 = []
    for kind in concrete(Prediction):
        if schedule.reaches_zero and kind in (Eps, Score, UnitScore):
            continue
        prediction = kind(schedule)
        dx0 = prediction.decode(F + dF, x, t)[0] - prediction.decode(F, x, t)[0]
        loss = weight()(MSE()(F + dF, F), prediction, t)
        on_x0.append(loss / dx0.square().flatten(1).mean(1))
    for other in on_x0[1:]:
        close(other / on_x0[0], torch.ones_like(other), 1e-6)  # dx0 is a difference of decoded pictures


@pytest.mark.parametrize("weight", concrete(Weight), ids=name)
@every
def test_weights_are_finite_and_not_negative_at_every_time_in_float32(weight, schedule):
    t = torch.cat([torch.tensor([1e-6, 1e-3, 1.0]), source(100).uniform("time")])  # 1e-6 is the smallest that is drawn
    for kind in (V, X0, Velocity, Preconditioned):
        w = factor(weight(), kind(schedule), t)
        assert w.shape == t.shape and w.isfinite().all() and (w >= 0).all()


@pytest.mark.parametrize("schedule", [VP(), Betas(), Betas("cosine"), Betas(zero_terminal_snr=True)], ids=name)
@pytest.mark.parametrize("gamma", [5.0, 1.0])
def test_min_snr_is_the_papers_formula_for_each_prediction(schedule, gamma):
    ratio, weight = snr(schedule), MinSNR(gamma)
    least = ratio.clamp(max=gamma)  # Hang et al. 2023, section 3.4
    relative(factor(weight, X0(schedule), T), least)
    relative(factor(weight, V(schedule), T), least / (ratio + 1))
    if not schedule.reaches_zero:
        relative(factor(weight, Eps(schedule), T), least / ratio)


def test_the_default_weights_are_the_papers():
    assert MinSNR().gamma == 5 and (P2().k, P2().gamma) == (1, 1) and EDMWeight().sigma_data == 0.5 and Sigmoid().bias == 2


@pytest.mark.parametrize("schedule", [VP(), EDM(), Betas("cosine")], ids=name)
def test_p2_and_sigmoid_are_the_papers_formulas_on_the_noise(schedule):
    ratio, eps = snr(schedule), Eps(schedule)
    relative(factor(P2(1.0, 0.5), eps, T), 1 / (1 + ratio) ** 0.5)  # Choi et al. 2022, eq. 8, over DDPM's 1
    relative(factor(P2(2.0, 1.0), eps, T), 1 / (2 + ratio))
    relative(factor(Sigmoid(-1.0), eps, T), torch.sigmoid(-1 - torch.log(ratio)))


@pytest.mark.parametrize("schedule", [EDM(), VE(), VP(), Betas(), Flow()], ids=name)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_edm_weight_on_the_edm_prediction_is_1(schedule, sigma_data):
    relative(factor(EDMWeight(sigma_data), Preconditioned(schedule, sigma_data), T), torch.ones_like(T))


def test_the_edm_weight_on_the_picture_is_lambda_of_karras():
    sigma = EDM().sigma(T)
    relative(factor(EDMWeight(), X0(EDM()), T), (sigma**2 + 0.25) / (sigma * 0.5) ** 2)


def test_weight_1_leaves_the_error_of_F():
    error = torch.rand(6, dtype=torch.float64)
    assert torch.equal(One()(error, V(VP()), T), error)


# ---------------------------------------------------------------------------- the learned weight


def test_the_learned_weight_starts_as_1():
    error = torch.rand(6)
    close(Learned()(error, V(VP()), T.float()), error, 0)


def test_the_learned_weight_is_at_its_best_where_u_is_the_log_of_the_expected_error():
    torch.manual_seed(0)
    weight, error, t = Learned(16).double(), torch.rand(400).double() * 3, f64(0.4).expand(400)

    def objective(shift: float) -> torch.Tensor:
        with torch.no_grad():
            weight.linear.bias.fill_(math.log(float(error.mean())) + shift)
        return weight(error, V(VP()), t).mean()

    best = objective(0.0)
    best.backward()
    assert all(p.grad.abs().max() < 1e-12 for p in weight.parameters())
    close(best.detach(), 1 + torch.log(error.mean()), 1e-12)
    assert objective(0.1) > best and objective(-0.1) > best


def test_the_learned_weight_finds_the_error_of_each_noise_level():
    torch.manual_seed(0)
    weight, schedule, t = Learned(64), VP(), torch.linspace(0.05, 1, 200)
    truth = 0.5 + schedule.log_snr(t) / 8
    adam = torch.optim.Adam(weight.parameters(), lr=0.02)
    for _ in range(300):
        adam.zero_grad()
        weight(truth.exp(), V(schedule), t).mean().backward()
        adam.step()
    u = -torch.log(factor_of_error(weight, schedule, t))
    assert (u - truth).abs().mean() < 0.02


def factor_of_error(weight: Weight, schedule, t: torch.Tensor) -> torch.Tensor:
    """exp(-u): the slope of the loss in the error."""
    error = torch.ones_like(t, requires_grad=True)
    return torch.autograd.grad(weight(error, V(schedule), t).sum(), error)[0]


# ---------------------------------------------------------------------------- the loss


def test_a_loss_is_correction_times_weight_of_norm():
    loss, prediction = Loss(Uniform(), MSE(), MinSNR()), V(VP())
    F, target, correction = pictures(6, 1), pictures(6, 2), f64(1, 2, 3, 4, 5, 6)
    wanted = correction * MinSNR()(MSE()(F, target), prediction, T)
    close(loss(F, target, T, correction, prediction), wanted, 1e-14)


def test_a_loss_tells_its_times_of_the_error_of_F_while_training_alone():
    loss = Loss(Importance(4, 2), MSE(), MinSNR())
    F, target, t = pictures(3, 1).float(), pictures(3, 2).float(), torch.tensor([0.1, 0.4, 0.9])
    loss.eval()(F, target, t, torch.ones(3), V(VP()))
    assert loss.times.seen.tolist() == [0, 0, 0, 0]
    loss.train()(F, target, t, torch.ones(3), V(VP()))
    assert loss.times.seen.tolist() == [1, 1, 0, 1]
    close(loss.times.history[[0, 1, 3], 0], MSE()(F, target), 0)


def test_a_loss_draws_by_its_times():
    t, correction = Loss(learned(), MSE(), One()).draw(VP(), source(100))
    wanted = learned()(VP(), source(100))
    assert torch.equal(t, wanted[0]) and torch.equal(correction, wanted[1])
