"""Bits per dimension against what they must be: densities and entropies known in closed form, on every kind of schedule."""

import math
from dataclasses import replace

import pytest
import torch
from closed_form import FAMILIES, Gaussian, Mixture, close, f64, name, pictures
from test_hybrid import true_share
from walks import make

from diffusion_cli.data.pixels import to_float
from diffusion_cli.evaluation import likelihood
from diffusion_cli.evaluation.likelihood import LEVEL, log_density, of_bound, of_flow, of_walk
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Ancestral, Varied
from diffusion_cli.schedules import EDM, VP, Betas, Flow

every_family = pytest.mark.parametrize("schedule", [*FAMILIES, Betas(zero_terminal_snr=True)], ids=name)
LN2 = math.log(2)


def log_mixture(data: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Sum over the pixels of log p, [B]."""
    away = (x[..., None] - f64(*data.means)) / f64(*data.scales)
    parts = torch.log(f64(*data.weights)) - torch.log(f64(*data.scales) * math.sqrt(2 * math.pi)) - away**2 / 2
    return torch.logsumexp(parts, -1).flatten(1).sum(1)


@every_family
def test_the_flow_gives_the_density(schedule, monkeypatch):
    """Pixels are independent, so the Jacobian is diagonal and Hutchinson's estimate is exact."""
    monkeypatch.setattr(likelihood, "NEAR", 16.0)
    monkeypatch.setattr(type(schedule), "earliest", 1e-6)
    data, x = Mixture(), pictures(3) / 2
    e = torch.sign(pictures(3, 7))
    got = log_density(data.denoise(schedule), schedule, x, e, 1e-8, 1e-8)
    end = likelihood.far_end(schedule)
    # the signal that is left at the far end is not in the prior: of first order through the mean of the data, 0.1, in 12 pixels
    close(got, log_mixture(data, x), 1e-4 + 1.2 * math.exp(end / 2))


def test_hutchinsons_estimate_is_unbiased_and_not_exact_on_pixels_that_depend_on_each_other():
    """Two pixels N(0, S) with correlation 0.8: the mean of many probes is the density, one probe is not."""
    schedule, S = Flow(), f64(1.0, 0.8, 0.8, 1.0).view(2, 2) / 4

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        gain = alpha * S @ torch.linalg.inv(alpha**2 * S + sigma**2 * torch.eye(2, dtype=torch.float64))
        return (x.flatten(1) @ gain.T).view_as(x)

    x = f64(0.3, -0.2).view(1, 2, 1, 1)
    probes = f64(1, 1, 1, -1, -1, 1, -1, -1).view(4, 2, 1, 1)
    found = log_density(denoise, schedule, x.expand(4, 2, 1, 1), probes, 1e-7, 1e-7)
    exact = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), S).log_prob(x.flatten())
    close(found.mean(), exact, 1e-3)
    assert (found - exact).abs().max() > 0.1


def quantised(data: Gaussian, count: int, size: int = 4) -> torch.Tensor:
    x = data.m + data.s * torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(1))
    return ((x.clamp(-1, 1) + 1) / LEVEL).round().to(torch.uint8)


def discrete_bits(data: Gaussian, images: torch.Tensor) -> torch.Tensor:
    """-log2 of the Gaussian's mass in each pixel's level, mean over the pixels: [B]."""
    law = torch.distributions.Normal(f64(data.m)[0], f64(data.s)[0])
    x = to_float(images).double()
    return -torch.log2(law.cdf(x + LEVEL / 2) - law.cdf(x - LEVEL / 2)).flatten(1).mean(1)


@pytest.mark.parametrize("schedule", [Betas(), Flow(), EDM()], ids=name)
def test_bits_of_the_flow_are_those_of_the_gaussian(schedule):
    data = Gaussian(0.1, 0.15)
    images = quantised(data, 6)
    ask = data.denoise(schedule)
    got = of_flow(lambda x, t: ask(x.double(), t).to(x), schedule, images, Source(0, torch.arange(6)))
    close(got.double(), discrete_bits(data, images), 0.03)  # dequantisation's own noise, 16 pixels each


@pytest.mark.parametrize("schedule", [Betas(), Betas("cosine"), Flow(), EDM()], ids=name)
def test_the_bound_is_tight_for_the_exact_denoiser(schedule):
    """-log p(x) = bound + KL(q || p), and the exact denoiser of a Gaussian leaves no gap but the schedule's far end."""
    data = Gaussian(0.1, 0.15)
    images = quantised(data, 400)
    ask = data.denoise(schedule)
    got = of_bound(lambda x, t: ask(x.double(), t).to(x), schedule, images, Source(0, torch.arange(400)), levels=32)
    wanted = discrete_bits(data, images)
    spread = float((got.double() - wanted).std()) / 20
    assert abs(float(got.double().mean() - wanted.mean())) < 4 * spread + 0.002
    assert spread < 0.04  # of 400 pictures


def test_the_bound_is_unbiased_in_the_number_of_levels():
    data, schedule = Gaussian(0.1, 0.15), Flow()
    images = quantised(data, 1500, size=2)
    ask = data.denoise(schedule)
    few, many = (
        of_bound(lambda x, t: ask(x.double(), t).to(x), schedule, images, Source(0, torch.arange(1500)), levels=k).double()
        for k in (4, 64)
    )
    assert abs(float(few.mean() - many.mean())) < 4 * float((few - many).std()) / math.sqrt(1500)


def test_a_worse_denoiser_costs_more_bits():
    data, schedule = Gaussian(0.1, 0.15), Flow()
    images, source = quantised(data, 50), Source(0, torch.arange(50))
    bits = []
    for wrong in (0.0, 0.1, 0.3):
        ask = Gaussian(data.m + wrong, data.s).denoise(schedule)
        bits.append(float(of_bound(lambda x, t, ask=ask: ask(x.double(), t).to(x), schedule, images, source).mean()))
    # KL of two Gaussians of the same width: wrong^2 / (2 s^2) nats
    assert bits[1] - bits[0] == pytest.approx(0.1**2 / 2 / 0.15**2 / LN2, rel=0.15)
    assert bits[2] - bits[0] == pytest.approx(0.3**2 / 2 / 0.15**2 / LN2, rel=0.15)


def test_a_picture_costs_the_same_in_any_company():
    data, schedule = Gaussian(), Flow()
    images = quantised(data, 4)
    ask = lambda x, t: data.denoise(schedule)(x.double(), t).to(x)  # noqa: E731
    for of in (of_bound, of_flow):
        whole = of(ask, schedule, images, Source(0, torch.arange(4)))
        alone = of(ask, schedule, images[2:3], Source(0, torch.arange(2, 3)))
        close(alone[0], whole[2], 1e-5 if of is of_bound else 2e-3)


@pytest.mark.parametrize("schedule", [Betas(), VP()], ids=name)
def test_the_bound_of_a_walk_is_tight_at_the_true_variance(schedule):
    """Gaussian data, 40 steps: with the variance of x_s given x_t what is left over the true cost is that of the last step and
    of a walk that begins a little off; the posterior's variance costs more. Any number of questions has the same mean."""
    data, sampler = Gaussian(0.1, 0.15), make(Ancestral, 40, eta=1.0, variance="learned")
    images, asked = quantised(data, 300), []

    def ask(x, t):
        asked.append(t)
        return data.denoise(schedule)(x.double(), t).to(x)

    def v():
        times = sampler.times(schedule)
        s = times[(times[None, :] >= asked[-1][:, None]).sum(1)]
        return true_share(schedule, asked[-1], s, data.s)[:, None, None, None].float()

    source = Source(0, torch.arange(300))
    found = of_walk(Varied(ask, v), schedule, images, source, sampler, levels=99).double()
    small = of_walk(ask, schedule, images, source, replace(sampler, variance="small"), levels=99).double()
    part = of_walk(Varied(ask, v), schedule, images, source, sampler, levels=10).double()
    wanted = discrete_bits(data, images)
    assert -0.01 < float((found - wanted).mean()) < 0.1 < float((small - found).mean())
    assert abs(float((part - found).mean())) < 4 * float((part - found).std()) / math.sqrt(300)
