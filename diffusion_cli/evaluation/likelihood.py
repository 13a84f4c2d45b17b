"""How many bits a pixel costs: the negative log-likelihood of 8-bit pictures under the model, per dimension, in three ways.

Exact, by the probability flow (Song et al. 2021, "Score-based generative modeling", section 4.3 and appendix D.2):

    log p(x) = log p_1(x_1) + integral of div(dx/dlam) along the flow from x to x_1,    div f = E[e^T (df/dx) e], e = +-1

The divergence is Hutchinson's estimate (1989), unbiased; pictures are made continuous by uniform noise of one grey level,
which makes it a bound of the discrete likelihood (Theis et al. 2016); the width of a level, 2 / 255, is added as -log2.

Bound, by the evidence (Kingma et al. 2021, "Variational diffusion models", eq. 11-17), in continuous time:

    -log p(x) <= KL(q(x_1 | x) || N(0, sigma_1^2)) + 1/2 integral of e^l E|x - x0(x_l)|^2 dl - E[log p(x | x_near)]

over l = log_snr: it does not depend on the schedule but for its ends. The last term is a softmax over 256 grey levels.

Bound of an ancestral walk (Ho et al. 2020, eq. 5), in its own steps and with the variances that it has, fixed or learned:

    -log p(x) <= KL(q(x_1 | x) || N(0, sigma_1^2)) + sum over its steps t -> s of KL(q(x_s | x_t, x) || p(x_s | x_t))

with the last step as losses/hybrid.py has it. All are only defined for Gaussian noise. Units: bits per dimension (pixel and
channel); lower is better.
"""

import math

import torch
from torch import Tensor

from diffusion_cli.data.pixels import to_float
from diffusion_cli.losses.hybrid import bits
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Ancestral, Denoise, Varied
from diffusion_cli.schedules import Schedule

LEVEL = 2 / 255  # between two grey levels, of pictures within [-1, 1]
NEAR, FAR = 14.0, -14.0  # log_snr at both ends of the flow: noise of a tenth of a grey level; a signal of a thousandth
# of the bound: noise of one grey level. Below it a network that does not know of levels pays for each unit of log_snr, and
# from there the softmax finds the level for the price of the density
NEAR_BOUND = -2 * math.log(LEVEL)


def _sum(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


def _bits(nats: Tensor, x: Tensor) -> Tensor:
    """Nats of a picture [B] -> bits per dimension [B]."""
    return nats / math.log(2) / x[0].numel()


def near_end(schedule: Schedule, wanted: float) -> float:
    """The wanted log_snr, or that of the earliest time that training asks about, if that holds more noise."""
    return min(wanted, float(schedule.log_snr(torch.tensor(schedule.earliest, dtype=torch.float64))))


def far_end(schedule: Schedule) -> float:
    """log_snr where the flow ends and the prior takes over: the schedule's own end, if that holds more signal."""
    return max(FAR, float(schedule.log_snr(torch.ones((), dtype=torch.float64))))


def of_flow(
    denoise: Denoise,
    schedule: Schedule,
    images: Tensor,
    source: Source,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    method: str = "dopri5",
) -> Tensor:
    """Bits per dimension [B] of images uint8 [B, C, H, W], by the probability flow.

    rtol, atol, method: torchdiffeq's. The error is controlled over the batch, so a picture's figure depends on its company
    within them.
    """
    shape = images.shape[1:]
    x = to_float(images.to(source.slots.device)) + LEVEL * (source.uniform("dequantise", shape) - 0.5)
    e = torch.sign(source.uniform("hutchinson", shape) - 0.5)
    return _bits(-log_density(denoise, schedule, x, e, rtol, atol, method), x) - math.log2(LEVEL)


def log_density(
    denoise: Denoise, schedule: Schedule, x: Tensor, e: Tensor, rtol: float, atol: float, method: str = "dopri5"
) -> Tensor:
    """Natural log-density [B] of x [B, C, H, W] at t = 0, with one Hutchinson probe e of the shape of x."""
    from torchdiffeq import odeint  # scipy comes with it: half a second to import

    near, far = near_end(schedule, NEAR), far_end(schedule)

    def flow(log_snr: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        t = schedule.t_of_log_snr(log_snr)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        d_alpha, d_sigma = schedule.velocity(t)
        pace = 2 * (d_alpha / alpha - d_sigma / sigma)  # d log_snr / dt
        stretch = d_sigma / sigma / pace
        share = float(d_alpha / pace - stretch * alpha)  # dx / d log_snr = share x0 + stretch x
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            x0 = denoise(x, t)
            (along,) = torch.autograd.grad((x0 * e).sum(), x)
        slope = share * x0.detach() + float(stretch) * x.detach()
        return slope, share * _sum(along * e) + float(stretch) * x[0].numel()

    clocks = torch.tensor([near, far], dtype=torch.float64, device=x.device)
    alpha = float(schedule.of_log_snr(clocks[0])[0])  # the picture is x / alpha at the near end: for the noise there is no mend
    variance = float(schedule.of_log_snr(clocks[1])[1]) ** 2
    ends, gained = odeint(flow, (alpha * x, torch.zeros(len(x)).to(x)), clocks, rtol=rtol, atol=atol, method=method)
    prior = -_sum(ends[-1] ** 2) / (2 * variance) - x[0].numel() / 2 * math.log(2 * math.pi * variance)
    return prior + gained[-1] + x[0].numel() * math.log(alpha)


def of_bound(denoise: Denoise, schedule: Schedule, images: Tensor, source: Source, levels: int = 32) -> Tensor:
    """Bits per dimension [B], at most, of images uint8 [B, C, H, W]: unbiased at any number of levels of noise.

    levels: questions for each picture, stratified over log_snr with one counted offset; more make the estimate steadier.
    """
    shape = images.shape[1:]
    x0 = to_float(images.to(source.slots.device))
    near, far = near_end(schedule, NEAR_BOUND), far_end(schedule)
    offset, width = source.uniform("offset"), (near - far) / levels  # [B]
    nats = _prior(schedule, x0, far) + _reconstruction(x0, near, source.normal("reconstruct", shape))
    for k in range(levels):
        l = far + (k + offset) * width  # [B]
        t = schedule.t_of_log_snr(l.double())
        x = schedule.mix(x0, source.at(k).normal("bound", shape), t)
        nats = nats + width / 2 * torch.exp(l) * _sum((x0 - denoise(x, t)) ** 2)
    return _bits(nats, x0)


def of_walk(ask: Denoise, schedule: Schedule, images: Tensor, source: Source, sampler: Ancestral, levels: int = 32) -> Tensor:
    """Bits per dimension [B], at most, of images uint8 [B, C, H, W] under the steps of a sampler with eta 1.

    ask: a Varied one where the variance is learned. levels: questions for each picture, stratified over the steps with one
    counted offset; as many as there are steps, or more: each step once.
    """
    shape, times = images.shape[1:], sampler.times(schedule).to(source.slots.device)
    x0, steps = to_float(images.to(source.slots.device)), len(times) - 1
    count, offset, fixed = min(levels, steps), source.uniform("offset"), float(sampler.variance == "large")
    found = _bits(_prior(schedule, x0, float(schedule.log_snr(times[0]))), x0)
    for k in range(count):
        step = ((k + offset) * steps / count).long().clamp(max=steps - 1)  # [B]
        t, s = times[step], times[step + 1]
        foreseen = ask(schedule.mix(x0, source.at(k).normal("vlb", shape), t), t)
        foreseen = foreseen.clamp(-1, 1) if sampler.clip else foreseen
        v = ask.v() if sampler.varied and isinstance(ask, Varied) else torch.full_like(x0, fixed)
        found = found + steps / count * bits(schedule, x0, foreseen, v, t, s)
    return found


def _prior(schedule: Schedule, x0: Tensor, far: float) -> Tensor:
    """KL [B] of x at the far end from pure noise of its sigma: alpha^2 x0^2 / (2 sigma^2)."""
    return math.exp(far) / 2 * _sum(x0**2)


def _reconstruction(x0: Tensor, near: float, noise: Tensor) -> Tensor:
    """-log p(x | x_near) [B]: each pixel is one of 256 levels, told by its nearest noisy value alone (Kingma et al., eq. 4)."""
    rho = math.exp(-near / 2)
    seen = x0 + rho * noise  # x_near / alpha
    nats = torch.zeros(len(x0), device=x0.device)
    for one in range(len(x0)):  # 256 values for each pixel: picture by picture, for memory
        grey = torch.arange(256, device=x0.device) * LEVEL - 1
        logits = -((seen[one][..., None] - grey) ** 2) / (2 * rho**2)  # [C, H, W, 256]
        true = -((seen[one] - x0[one]) ** 2) / (2 * rho**2)
        nats[one] = (torch.logsumexp(logits, -1) - true).sum()
    return nats
