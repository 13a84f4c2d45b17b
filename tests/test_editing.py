"""Edits against closed forms: for correlated Gaussian pixels the law of what is not known, given what is, is known exactly.

Every binding method makes a walk that is affine in its start and in each of its noises, so its law is computed, not sampled
(`law`). Particles are drawn: their figures have errors of chance, which the tolerances state.
"""

import itertools
import math
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from closed_form import FAMILIES, SCHEDULES, Gaussian, Mixture, close, concrete, distance_from_uniform, f64, name, pictures
from often import some
from torch import Tensor

from diffusion_cli.editing import (
    Between,
    Blocks,
    FromPicture,
    Grey,
    Guided,
    Known,
    Method,
    Moments,
    Operator,
    Particles,
    Projection,
    PureNoise,
    Seen,
    Varied,
    adds_noise,
    invert,
)
from diffusion_cli.editing.edit import inside
from diffusion_cli.editing.gradients import conjugate_gradients
from diffusion_cli.editing.method import Binding, noised_up
from diffusion_cli.editing.particles import chosen, resampled, uniform
from diffusion_cli.editing.starts import slerp
from diffusion_cli.errors import ConfigError
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Ancestral, Karras, Leading, Own, Sampler, Tail, Trailing, Uniform, last
from diffusion_cli.schedules import EDM, VE, VP, Betas, Flow, Mix, Schedule, Shifted

ZERO, ONE = f64(0.0)[0], f64(1.0)[0]
every = pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
PARTS = [  # an operator for pictures [B, 2, 4, 4]
    Seen(torch.arange(16).view(4, 4) % 3 > 0),
    Seen((torch.arange(32).view(2, 4, 4) % 5) > 1),
    Grey(2),
    Blocks(2),
    Blocks(4),
]
METHODS = [Projection(), Projection(3, 2), Guided(), Moments()]


def square(batch: int, seed: int = 0) -> Tensor:
    """[batch, 2, 4, 4] float64 standard normal."""
    return torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def always(ask):
    """As a question that is new each time; these remember nothing."""
    return lambda: ask


def fresh(like: Tensor, seed: int = 0, first: int = 0):
    slots = torch.arange(first, first + len(like))
    return lambda step, which=0: Source(seed, slots, step).normal(f"noise {which}", like.shape[1:]).to(like)


def silent(step: int, which: int = 0) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def walked(method: Method, known: Known, ask, schedule: Schedule, sampler: Sampler, x: Tensor, noise) -> Tensor:
    return last(method.walk(known, always(ask), schedule, sampler, x, noise)).x


# ---------------------------------------------------------------------------- operators


@pytest.mark.parametrize("operator", PARTS, ids=lambda o: f"{name(o)}{getattr(o, 'factor', '')}")
def test_operators_have_orthogonal_rows_and_their_pseudo_inverse(operator: Operator) -> None:
    x = square(3)
    y = operator.measure(square(3, 1))
    close(operator.measure(operator.back(operator.measure(x))), operator.measure(x), 1e-14)  # A A^+ A = A
    dot = lambda a, b: float((a * b).sum())  # noqa: E731
    assert abs(dot(operator.measure(x), y) - operator.unit * dot(x, operator.back(y))) < 1e-12  # A^T = unit A^+
    agreed = operator.agree(x, y)
    close(operator.measure(agreed), y, 1e-14)
    close(operator.agree(agreed, y), agreed, 1e-14)
    null = square(3, 2) - operator.back(operator.measure(square(3, 2)))
    assert abs(dot(agreed - x, null)) < 1e-12, "the nearest: the move is orthogonal to all that A does not see"


def test_known_pixels_are_put_in_to_the_bit() -> None:
    x, y = square(2).float() * 1e3, torch.rand(1, 2, 4, 4)
    seen = Seen(torch.arange(16).view(4, 4) % 2 == 0)
    assert torch.equal(seen.agree(x, seen.measure(y))[..., seen.mask], y[..., seen.mask].expand(2, -1, -1))


@pytest.mark.parametrize(("box", "size", "rows", "columns"), [
    ((0, 0.5, 1, 1), 8, range(4, 8), range(8)),
    ((2, 0, 5, 8), 8, range(8), range(2, 5)),
    ((0.25, 0.25, 0.75, 0.75), 8, range(2, 6), range(2, 6)),
    ((0, 0, 1, 1), 5, range(5), range(5)),
])  # fmt: skip
def test_boxes_in_pixels_and_in_shares(box, size, rows, columns) -> None:
    got = inside(box, size).nonzero().tolist()
    assert got == [[r, c] for r in rows for c in columns]


@pytest.mark.parametrize("box", [(0.5, 0, 0.5, 1), (4, 0, 2, 8), (0, 0, 9, 8), (0, 0.9, 1, 0.92)])
def test_boxes_that_are_none(box) -> None:
    with pytest.raises(ValueError, match="must rise"):
        inside(box, 8)


# ---------------------------------------------------------------------------- the conditional law

MEAN = f64(0.2, -0.3, 0.1, 0.4)
ROOT = f64(0.5, 0, 0, 0, 0.4, 0.25, 0, 0, 0.3, 0.2, 0.2, 0, -0.3, 0.1, 0.1, 0.25).view(4, 4)
SPREAD = ROOT @ ROOT.T  # correlations up to 0.85


class Correlated:
    """Pictures [B, 1, 2, 2] of N(MEAN, SPREAD): the denoiser, and the law of a picture given y = A x0 + noise."""

    def denoise(self, schedule: Schedule):
        def ask(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
            gain = alpha * SPREAD @ torch.linalg.inv(alpha**2 * SPREAD + sigma**2 * torch.eye(4, dtype=torch.float64))
            return (MEAN + (x.flatten(1) - alpha * MEAN) @ gain.T).view_as(x)

        return ask

    def given(self, known: Known) -> tuple[Tensor, Tensor]:
        """Mean [4] and covariance [4, 4]."""
        A = known.operator.measure(torch.eye(4, dtype=torch.float64).view(4, 1, 2, 2)).flatten(1).T
        seen = A.abs().sum(1) > 0
        A, y = A[seen], known.y.flatten()[seen]
        gain = SPREAD @ A.T @ torch.linalg.inv(A @ SPREAD @ A.T + known.noise**2 * torch.eye(len(A), dtype=torch.float64))
        return MEAN + gain @ (y - A @ MEAN), SPREAD - gain @ A @ SPREAD


UPPER = Seen(torch.tensor([[True, True], [False, False]]))
HALF = Known(UPPER, f64(0.9, 0.1, 0, 0).view(1, 1, 2, 2))  # one of the known pixels is 1.4 deviations off
COARSE = Known(Blocks(2), f64(0.5).view(1, 1, 1, 1))
NOISY = Known(UPPER, f64(0.9, 0.1, 0, 0).view(1, 1, 2, 2), noise=0.3)
DATA = Correlated()


def law(method: Method, known: Known, schedule: Schedule, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Mean [4] and covariance [4, 4] of the result, exactly: the rows of a batch are the directions of start and noises."""
    asked: list[tuple[int, int]] = []

    def listing(step: int, which: int = 0) -> Tensor:
        assert (step, which) not in asked, "a noise was drawn twice"
        asked.append((step, which))
        return torch.zeros(1, 1, 2, 2, dtype=torch.float64)

    ask = DATA.denoise(schedule)
    walked(method, known, ask, schedule, sampler, torch.zeros(1, 1, 2, 2, dtype=torch.float64), listing)
    eye = torch.eye(1 + 4 * (1 + len(asked)), dtype=torch.float64)[:, 1:]  # row 0 has no noise at all
    at = {key: eye[:, 4 * (k + 1) : 4 * (k + 2)].reshape(-1, 1, 2, 2) for k, key in enumerate(asked)}
    x = sampler.start(schedule, eye[:, :4].reshape(-1, 1, 2, 2))
    end = walked(method, known, ask, schedule, sampler, x, lambda step, which=0: at[step, which]).flatten(1)
    ways = end[1:] - end[0]
    return end[0], ways.T @ ways


def errors(method: Method, known: Known, schedule: Schedule, sampler: Sampler) -> tuple[float, float]:
    """Largest errors of mean and covariance against the conditional law."""
    (mean, spread), (true_mean, true_spread) = law(method, known, schedule, sampler), DATA.given(known)
    return float((mean - true_mean).abs().max()), float((spread - true_spread).abs().max())


def walker(steps: int, eta: float = 0.0) -> Ancestral:
    return Ancestral(steps, Karras(0.01, 60.0, 3.0), clip=False, eta=eta)


OFTEN = [(Flow(), 0.0, "mask"), (Flow(), 1.0, "blocks"), (VP(), 1.0, "mask"),
         (VP(), 0.0, "noisy"), (EDM(), 0.0, "blocks"), (EDM(), 1.0, "noisy")]  # fmt: skip
KNOWN = {"mask": HALF, "blocks": COARSE, "noisy": NOISY}
said = lambda part: name(part) if isinstance(part, Schedule) else str(part)  # noqa: E731
LONG = [schedule for schedule in FAMILIES if schedule != VE()]  # which ends before the grid of walker() begins


@pytest.mark.parametrize(("schedule", "eta", "known"), some(list(product(LONG, [0.0, 1.0], KNOWN)), OFTEN), ids=said)
def test_moments_are_exact_for_gaussian_data(schedule, eta, known) -> None:
    """Both moments tend to the conditional ones: of the covariance, the error of a free walk's steps is left, of order 1."""
    found = [errors(Moments(iterations=2), KNOWN[known], schedule, walker(steps, eta)) for steps in (50, 100, 200)]
    assert found[-1][0] < 3e-3 and found[-1][1] < 0.015
    assert all(b < 0.7 * a for (_, a), (_, b) in pairwise(found)), found


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_projection_is_biased_and_going_back_in_time_mends_it(eta) -> None:
    """What each method reaches for the means of the unknown pixels, whose deviations are 0.2 and 0.27."""
    means = [errors(Projection(turns), HALF, Flow(), walker(50, eta))[0] for turns in (1, 2, 4, 8, 16)]
    assert means[0] > 0.15, "alone it is wrong by most of a deviation, and more steps do not help"
    assert errors(Projection(), HALF, Flow(), walker(200, eta))[0] > 0.15
    assert all(b < 0.85 * a for a, b in pairwise(means)) and means[-1] < 0.25 * means[0], means


def test_a_gradient_is_better_than_a_projection_and_moments_than_a_gradient() -> None:
    reached = [errors(method, HALF, Flow(), walker(100, 0.0))[0] for method in (Projection(), Guided(), Moments(iterations=2))]
    assert reached[0] > 0.2 and 0.05 < reached[1] < 0.15 and reached[2] < 2e-3, reached


@pytest.mark.parametrize("method", [Projection(), Projection(3), Guided(), Moments(iterations=2)], ids=str)
def test_the_law_is_that_of_the_noise_levels_and_not_of_the_schedule(method) -> None:
    """The same sigma / alpha on another schedule: the same pictures."""
    (mean, spread), other = law(method, HALF, Flow(), walker(20, 1.0)), law(method, HALF, EDM(), walker(20, 1.0))
    close(other[0], mean, 1e-8)
    close(other[1], spread, 1e-8)


def drawn(method: Method, known: Known, sampler: Sampler, n: int, schedule: Schedule | None = None) -> Tensor:
    """[n, 4] pictures."""
    schedule = schedule or Flow()
    like = torch.zeros(n, 1, 2, 2, dtype=torch.float64)
    x = sampler.start(schedule, fresh(like, seed=1)(0))
    return walked(method, known, DATA.denoise(schedule), schedule, sampler, x, fresh(like)).flatten(1)


def test_particles_approach_the_conditional_law() -> None:
    """4000 pictures: means are known to 0.005 (one deviation). One particle is the projection; more have a smaller error."""
    true, _ = DATA.given(HALF)
    off = {k: float((drawn(Particles(k), HALF, walker(50, 1.0), 4000).mean(0) - true).abs().max()) for k in (1, 4, 16, 64)}
    assert off[1] > 0.17 and off[4] < 0.65 * off[1] and off[16] < 0.3 * off[1] and off[64] < 0.025, off


def test_one_particle_is_the_projection() -> None:
    close(drawn(Particles(1), HALF, walker(20, 1.0), 50), drawn(Projection(), HALF, walker(20, 1.0), 50), 1e-12)


def test_particles_leave_the_free_law_where_nothing_is_known() -> None:
    """A y that says nothing (its noise is immense): the moments of a walk that goes freely, within 3.5 deviations of chance."""
    nothing, sampler = Known(HALF.operator, HALF.y, noise=1e4), walker(30, 1.0)
    mean, spread = law(Projection(), nothing, Flow(), sampler)
    got = drawn(Particles(8), nothing, sampler, 4000)
    assert ((got.mean(0) - mean).abs() < 3.5 * (spread.diagonal() / 4000).sqrt()).all()
    assert (got.var(0) / spread.diagonal() - 1).abs().max() < 3.5 * math.sqrt(2 / 4000)


def test_particles_need_noise_on_the_way() -> None:
    with pytest.raises(ConfigError, match="sampler=ddpm"):
        drawn(Particles(4), HALF, walker(5, 0.0), 2)


def test_systematic_resampling_keeps_the_expected_number_of_children() -> None:
    """Particle k has floor or ceil of K w_k children, and K w_k in the mean over u; equal weights are left alone."""
    weight = torch.log(f64(0.5, 0.3, 0.15, 0.03, 0.02, 0.0))[:, None].expand(6, 1000)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    parent, drew = resampled(weight, u)
    assert drew.all()
    counts = torch.stack([(parent == k).sum(0) for k in range(6)]).double()  # [6, 1000]
    wanted = 6 * f64(0.5, 0.3, 0.15, 0.03, 0.02, 0.0)
    assert (counts >= wanted.floor()[:, None]).all() and (counts <= wanted.ceil()[:, None]).all()
    close(counts.mean(1), wanted, 2e-3)
    parent, drew = resampled(torch.zeros(6, 3), f64(0.1, 0.5, 0.9))
    assert not drew.any() and torch.equal(parent, torch.arange(6)[:, None].expand(6, 3))
    one = chosen(weight, u)
    close(torch.stack([(one[0] == k).double().mean() for k in range(6)]), wanted / 6, 2e-3)


def test_a_uniform_number_from_counted_noise() -> None:
    u = uniform(fresh(torch.zeros(4000, 1, 2, 2))(0))
    assert distance_from_uniform(u) < 1.95 / math.sqrt(4000)


# ---------------------------------------------------------------------------- what every method promises

ALL = [*METHODS, Particles(3)]


def bound(method: Method, known: Known, schedule: Schedule, sampler: Sampler, x: Tensor, first: int = 0, ask=None) -> Tensor:
    return walked(method, known, ask or Mixture().denoise(schedule), schedule, sampler, x, fresh(x, first=first))


def agrees(method: Method, operator: Operator, schedule: Schedule) -> None:
    known = Known(operator, operator.measure(square(1, 7).clamp(-1, 1)))
    sampler = Ancestral(4, Own(), clip=True, eta=1.0)
    x = bound(method, known, schedule, sampler, sampler.start(schedule, square(2)))
    assert x.isfinite().all()
    close(operator.measure(x), known.y, 1e-14)


@pytest.mark.parametrize("method", ALL, ids=str)
@every
def test_every_method_is_finite_and_agrees_on_every_schedule(schedule, method) -> None:
    agrees(method, PARTS[0], schedule)


@pytest.mark.parametrize("operator", PARTS, ids=lambda o: f"{name(o)}{getattr(o, 'factor', '')}")
@pytest.mark.parametrize("method", ALL, ids=str)
def test_every_method_agrees_with_every_operator(method, operator) -> None:
    agrees(method, operator, Flow())


@pytest.mark.parametrize("kind", concrete(Sampler), ids=name)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_sampler_is_bound(method, kind) -> None:
    """On known pixels, to the bit, wherever the pieces of the walk end; the states are those of a walk."""
    known = Known(PARTS[0], PARTS[0].measure(square(1, 7).clamp(-1, 1)))
    for schedule in (EDM(), Flow()):
        sampler = kind(steps=5, grid=Own(), clip=False)
        if sampler.length(schedule) is None:
            sampler = replace(sampler, steps=400)
        x = sampler.start(schedule, square(2))
        ask = Mixture().denoise(schedule)
        states = list(method.walk(known, always(ask), schedule, sampler, x, fresh(x)))
        assert states[-1].x.isfinite().all() and torch.equal(PARTS[0].measure(states[-1].x), known.y.expand(2, -1, -1, -1))
        assert torch.equal(states[0].x[0], x[0]) or (isinstance(method, Binding) and method.resample > 1)
        if sampler.length(schedule) == 5:
            assert [s.step for s in states] == list(range(6))
            assert torch.equal(torch.stack([s.t for s in states]), sampler.times(schedule))


@pytest.mark.parametrize("method", ALL, ids=str)
def test_a_picture_does_not_depend_on_the_batch_it_is_edited_in(method) -> None:
    schedule, known = VP(), Known(PARTS[0], PARTS[0].measure(square(1, 7).clamp(-1, 1)))
    sampler, x = Ancestral(6, Own(), clip=False, eta=1.0), square(5)
    whole = bound(method, known, schedule, sampler, x)
    for i in range(5):
        close(bound(method, known, schedule, sampler, x[i : i + 1], first=i)[0], whole[i], 1e-10)


@pytest.mark.parametrize("method", ALL, ids=str)
def test_edits_go_where_gradients_are_off(method) -> None:
    schedule, known = VP(), Known(PARTS[3], PARTS[3].measure(square(1, 7)))
    sampler = Ancestral(4, Own(), clip=False, eta=1.0)
    outside = bound(method, known, schedule, sampler, square(2))
    with torch.inference_mode():
        close(bound(method, known, schedule, sampler, square(2)), outside, 0)
    with torch.no_grad():
        close(bound(method, known, schedule, sampler, square(2)), outside, 0)


def test_noise_in_what_is_known_is_not_put_in() -> None:
    """With noise as large as what is not known of x0, the result keeps part of its own."""
    schedule, sampler = Flow(), walker(50)
    noisy = Known(PARTS[0], PARTS[0].measure(square(1, 7)), noise=0.5)
    x = sampler.start(schedule, square(3))
    ask = Gaussian(0.0, 0.5).denoise(schedule)
    free, half = (last(sampler.walk(ask, schedule, x, silent)).x, bound(Projection(), noisy, schedule, sampler, x, ask=ask))
    gone = (PARTS[0].measure(half) - PARTS[0].measure(free)).norm() / (noisy.y - PARTS[0].measure(free)).norm()
    assert 0.2 < gone < 0.9


@every
def test_noising_up_has_the_law_of_the_schedule(schedule) -> None:
    """x_s of variance alpha_s^2 v + sigma_s^2 goes to alpha_t^2 v + sigma_t^2, and its mean by alpha_t / alpha_s."""
    for s, t in itertools.combinations(f64(0.0, 0.2, 0.7, 1.0), 2):
        alpha, sigma = ((float(f(s)), float(f(t))) for f in (schedule.alpha, schedule.sigma))
        one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        ratio, added = float(noised_up(schedule, one, s, t, zero)), float(noised_up(schedule, zero, s, t, one))
        assert abs(ratio * alpha[0] - alpha[1]) < 1e-12
        assert abs((ratio * sigma[0]) ** 2 + added**2 - sigma[1] ** 2) < 1e-9 * max(1, sigma[1] ** 2)


def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_unknowns() -> None:
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    matrix = root @ root.T + 0.1 * torch.eye(4, dtype=torch.float64)
    b = square(3)[:, 0, 0]
    close(conjugate_gradients(lambda u: u @ matrix, b, 4) @ matrix, b, 1e-9)
    assert conjugate_gradients(lambda u: -u, b, 3).abs().max() == 0, "where the operator is not positive nothing is done"


# ---------------------------------------------------------------------------- inversion


def round_trip(sampler: Sampler, schedule: Schedule, x0: Tensor, turns: int, ask=None) -> float:
    """Largest error of the picture that the found noise gives."""
    ask = ask or Mixture().denoise(schedule)
    start = sampler.start(schedule, invert(always(ask), schedule, sampler, x0, turns))
    return float((last(sampler.walk(ask, schedule, start, silent)).x - x0).abs().max())


PLACES = torch.linspace(-0.9, 0.9, 8, dtype=torch.float64).view(1, 1, 2, 4)
ONE_STEP = [kind for kind in concrete(Sampler) if name(kind) in ("Ancestral", "Heun")]


@pytest.mark.parametrize("kind", ONE_STEP, ids=name)
@pytest.mark.parametrize("schedule", some(FAMILIES, [VP(), EDM(), Flow(), VE()]), ids=name)
def test_the_round_trip_is_exact_when_it_is_mended(schedule, kind) -> None:
    """Each turn takes a share of the error away; DDIM's inversion alone is of order 1."""
    sampler = kind(40, Uniform(), clip=False)
    coarse, fine = (round_trip(kind(n, Uniform(), clip=False), schedule, PLACES, 0) for n in (40, 160))
    assert 0 < fine < 0.6 * coarse
    trips = [round_trip(sampler, schedule, PLACES, turns) for turns in (0, 4, 40)]
    assert trips[1] < 0.05 * trips[0] and trips[2] < 1e-9, trips


@pytest.mark.parametrize("kind", concrete(Sampler), ids=name)
@pytest.mark.parametrize("schedule", some([VP(), EDM(), Flow(), Betas("cosine")], [EDM(), Flow()]), ids=name)
def test_inversion_of_every_sampler_is_finite_and_near(schedule, kind) -> None:
    """Those with a memory are inverted without it, to the order of their single moves: near, and nearer with more steps."""
    few, many = kind(15, Uniform(), clip=False), kind(60, Uniform(), clip=False)
    if few.length(schedule) is None or adds_noise(few, schedule):
        pytest.skip("has no way back")
    free = last(many.walk(Mixture().denoise(schedule), schedule, many.start(schedule, PLACES), silent)).x
    if free.abs().max() > 3:
        pytest.skip("this rule does not stand this grid: its own pictures are none")
    errors = [round_trip(sampler, schedule, PLACES, 4) for sampler in (few, many)]
    assert errors[1] < 0.05 and (errors[1] < errors[0] or errors[1] < 1e-6), errors


def test_the_noise_found_is_that_of_the_exact_flow() -> None:
    """With more steps it tends to the probability flow's: N(m, s^2) is carried onto N(0, 1)."""
    schedule, data, errors = Flow(), Gaussian(0.3, 0.5), []
    for steps in (50, 100, 200):
        sampler = Ancestral(steps, Uniform(), clip=False)
        got = invert(always(data.denoise(schedule)), schedule, sampler, PLACES, 10)
        errors.append(float((got - (PLACES - data.m) / data.s).abs().max()))
    assert errors[2] < 0.1 and all(b < 0.75 * a for a, b in pairwise(errors)), errors


@pytest.mark.parametrize("spacing, steps", [("leading", 25), ("leading", 10), ("trailing", 20)])
@pytest.mark.parametrize("curve, theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_inversion_is_that_of_diffusers(spacing, steps, curve, theirs) -> None:
    """Without mending it is DDIMInverseScheduler, number for number; their tables are in float32. With trailing steps theirs
    counts the indices that it comes from wrongly by one step ratio at the first of them; ours starts at the picture itself."""
    from diffusers import DDIMInverseScheduler

    schedule, ask = Betas(curve), Mixture().denoise(Betas(curve))
    grid = {"leading": Leading(), "trailing": Trailing()}[spacing]
    peer = DDIMInverseScheduler(beta_schedule=theirs, clip_sample=False, timestep_spacing=spacing)
    peer.alphas_cumprod, peer.initial_alpha_cumprod = schedule.alpha_bar, ONE
    peer.set_timesteps(steps)
    x = PLACES
    for k in peer.timesteps:
        t = (k.double() + 1) / 1000
        eps = (x - schedule.alpha(t) * ask(x, t)) / schedule.sigma(t)
        x = peer.step(eps, k, x).prev_sample
    sampler = Ancestral(steps, grid, clip=False)
    close(sampler.start(schedule, invert(always(ask), schedule, sampler, PLACES, 0)), x, 1e-9)


def test_what_adds_noise_is_found_out_before_any_walk() -> None:
    for schedule in (VP(), Flow(), EDM()):
        assert not adds_noise(Ancestral(9, Own(), clip=True), schedule)
        assert adds_noise(Ancestral(9, Own(), clip=True, eta=0.5), schedule)


# ---------------------------------------------------------------------------- great circles


def test_slerp_keeps_the_length_and_its_ends_are_exact() -> None:
    a, b = square(4).float(), square(4, 1).float()
    for share in (0.0, 1.0):
        assert torch.equal(slerp(a, b, torch.full((4,), share)), (a, b)[int(share)])
    a, b = (z / z.flatten(1).norm(dim=1)[:, None, None, None] * 5.6 for z in (a.double(), b.double()))
    line = torch.stack([slerp(a, b, torch.full((4,), share)) for share in torch.linspace(0, 1, 11).tolist()])
    close(line.flatten(2).norm(dim=2), 5.6, 1e-6)
    steps = (line[1:] - line[:-1]).flatten(2).norm(dim=2)
    assert (steps.max(0).values - steps.min(0).values).max() < 1e-6, "even steps"
    close(slerp(a, a, torch.full((4,), 0.4)), a, 1e-6)


def test_points_between_noises_are_noise() -> None:
    """4000 pairs, a third of the way: still N(0, 1)."""
    a, b = (torch.randn(4000, 1, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    third = slerp(a, b, torch.full((4000,), 1 / 3))
    assert distance_from_uniform(torch.special.ndtr(third.double())) < 1.95 / math.sqrt(third.numel())
    straight = a * 2 / 3 + b / 3
    assert distance_from_uniform(torch.special.ndtr(straight.double())) > 4 / math.sqrt(third.numel()), (
        "a straight line's are not"
    )


SAMPLER, SHAPE = Ancestral(6, Own(), clip=False), (1, 3, 3)


def test_between_numbers_the_ends_are_those_pictures() -> None:
    for schedule in (Flow(), VP(), EDM()):
        ends = schedule.noise(Source(5, torch.tensor([3, 17])), "start", SHAPE)
        got = Between(ends, 9).x(schedule, SAMPLER, Source(5, torch.arange(9)), SHAPE)
        wanted = PureNoise().x(schedule, SAMPLER, Source(5, torch.tensor([3, 17])), SHAPE)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[8], wanted[1])
        assert len(got.unique(dim=0)) == 9
        some = Between(ends, 9).x(schedule, SAMPLER, Source(5, torch.tensor([4, 2])), SHAPE)
        assert torch.equal(some, got[[4, 2]]), "whatever batch they are in"


def test_a_map_has_its_corners_and_is_walked_evenly() -> None:
    ends = Flow().noise(Source(5, torch.tensor([1, 2, 3, 4])), "start", SHAPE)
    start = Between(ends, 36)
    got = start.x(Flow(), SAMPLER, Source(5, torch.arange(36)), SHAPE)
    assert torch.equal(got[[0, 5, 30, 35]], ends)
    edge = Between(ends[[0, 2]], 6).x(Flow(), SAMPLER, Source(5, torch.arange(6)), SHAPE)
    close(got[::6], edge, 1e-6)
    shares = start.shares(torch.arange(36))
    close(shares.sum(1), 1.0, 1e-12)
    assert torch.equal(shares[[0, 5, 30, 35]], torch.eye(4, dtype=torch.float64)) and shares[7].min() > 0


def test_variations_go_from_the_picture_to_any_picture() -> None:
    schedule = Flow()
    noise = schedule.noise(Source(9, torch.tensor([0])), "picture", SHAPE)[0]
    source = Source(5, torch.arange(4))
    start = lambda share: Varied(noise, share).x(schedule, SAMPLER, source, SHAPE)  # noqa: E731
    assert torch.equal(start(0.0), noise.expand(4, *SHAPE))
    assert torch.equal(start(1.0), PureNoise().x(schedule, SAMPLER, source, SHAPE))
    away = [(start(share) - noise).flatten(1).norm(dim=1) for share in (0.1, 0.3, 0.6)]
    assert all((b > a).all() for a, b in pairwise(away)) and len(start(0.3).unique(dim=0)) == 4


@every
def test_a_picture_is_noised_as_the_schedule_does_it(schedule) -> None:
    sampler = Ancestral(8, Tail(Own(), 0.4), clip=False)
    picture, source = pictures(1)[0].float(), Source(1, torch.arange(3))
    x = FromPicture(picture).x(schedule, sampler, source, picture.shape)
    noise = schedule.noise(source, "start", picture.shape)
    close(x, schedule.mix(picture.expand_as(noise), noise, f64(0.4)[0]), 1e-6)


def test_uniform_noise_has_no_great_circle() -> None:
    assert not Mix().gaussian and not Shifted(Mix()).gaussian and Flow().gaussian and Shifted(Flow()).gaussian
