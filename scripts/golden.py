#!/usr/bin/env python3
"""Writes tests/golden/k_diffusion.npz: what k-diffusion's samplers return, in float64, for a denoiser in closed form.

    pip install k-diffusion && python scripts/golden.py

k-diffusion is not needed to run the tests (it pulls in a dozen packages): they compare ours with these arrays. Both sides see
the same mixture of two Gaussians (tests/closed_form.py), the same sigmas and the same noise, all of which the file holds:

    sigmas [11]                     Karras' grid from 20 to 0.05, then 0
    start [2, 2, 3, 2]              x at sigmas[0]
    noise [10, 2, 2, 2, 3, 2]       at each step, in the order in which a sampler draws within it
    NAME/end                        what the sampler returns
    NAME/x, NAME/x0                 at each step: the state it asked with (after churn), and the picture it was told
    dpm_adaptive_ORDER/PICTURE/...  picture by picture, because its step size depends on the batch; sigma: where it stood

Written with k-diffusion 0.1.1.post1 (Katherine Crowson, MIT licence).
"""

import inspect
import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))
from closed_form import Mixture, pictures  # noqa: E402

from diffusion_cli.samplers import Karras  # noqa: E402
from diffusion_cli.schedules import EDM  # noqa: E402

STEPS = 10
CHURN = {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.003}

# name -> (function of k_diffusion.sampling, its options, draws in one step)
ON_SIGMAS = {
    "euler": ("sample_euler", {}, 1),
    "euler_churn": ("sample_euler", CHURN, 1),
    "euler_ancestral": ("sample_euler_ancestral", {"eta": 1.0}, 1),
    "euler_ancestral_06": ("sample_euler_ancestral", {"eta": 0.6}, 1),
    "heun": ("sample_heun", {}, 1),
    "heun_churn": ("sample_heun", CHURN, 1),
    "dpm_2": ("sample_dpm_2", {}, 1),
    "dpm_2_churn": ("sample_dpm_2", CHURN, 1),
    "dpm_2_ancestral": ("sample_dpm_2_ancestral", {"eta": 1.0}, 1),
    "dpm_2_ancestral_06": ("sample_dpm_2_ancestral", {"eta": 0.6}, 1),
    "lms": ("sample_lms", {"order": 4}, 1),
    "lms_3": ("sample_lms", {"order": 3}, 1),
    "lms_2": ("sample_lms", {"order": 2}, 1),
    "dpmpp_2s_ancestral": ("sample_dpmpp_2s_ancestral", {"eta": 1.0}, 1),
    "dpmpp_2s_ancestral_06": ("sample_dpmpp_2s_ancestral", {"eta": 0.6}, 1),
    "dpmpp_sde": ("sample_dpmpp_sde", {"eta": 1.0}, 2),
    "dpmpp_sde_06": ("sample_dpmpp_sde", {"eta": 0.6}, 2),
    "dpmpp_2m": ("sample_dpmpp_2m", {}, 1),
    "dpmpp_2m_sde_midpoint": ("sample_dpmpp_2m_sde", {"eta": 1.0, "solver_type": "midpoint"}, 1),
    "dpmpp_2m_sde_heun": ("sample_dpmpp_2m_sde", {"eta": 1.0, "solver_type": "heun"}, 1),
    "dpmpp_2m_sde_06": ("sample_dpmpp_2m_sde", {"eta": 0.6, "solver_type": "midpoint"}, 1),
    "dpmpp_3m_sde": ("sample_dpmpp_3m_sde", {"eta": 1.0}, 1),
    "dpmpp_3m_sde_06": ("sample_dpmpp_3m_sde", {"eta": 0.6}, 1),
    "dpmpp_3m_sde_0": ("sample_dpmpp_3m_sde", {"eta": 0.0}, 1),
}
FAST = {"dpm_fast_10": 10, "dpm_fast_11": 11}  # calls of the network
ADAPTIVE = {"dpm_adaptive_2": 2, "dpm_adaptive_3": 3}  # order


def main() -> None:
    try:
        import k_diffusion.sampling as k
    except ImportError as error:
        sys.exit(f"{error}: this script compares with k-diffusion; install it with: pip install k-diffusion")
    torch.set_default_dtype(torch.float64)  # linspace and tensor() in k-diffusion
    plain = EDM(sigma_min=1e-3, sigma_max=1.0, rho=1.0)  # sigma(t) = t: the closed form asked by sigma itself
    model = Mixture().denoise(plain)
    karras = EDM()
    sigmas = karras.sigma(Karras(0.05, 20.0).times(STEPS, karras))
    start = sigmas[0] * pictures(2, 1)
    noise = torch.stack([torch.stack([pictures(2, 100 + 2 * i + which) for which in range(2)]) for i in range(STEPS)])
    arrays: dict[str, Tensor] = {"sigmas": sigmas, "start": start, "noise": noise}
    for name, (function, options, draws) in ON_SIGMAS.items():
        arrays |= recorded(
            name, k, partial(getattr(k, function), model, start, sigmas, **options), noise[:, :draws].flatten(0, 1)
        )
    low, high = sigmas[-2], sigmas[0]
    for name, calls in FAST.items():
        arrays |= recorded(name, k, partial(k.sample_dpm_fast, model, start, low, high, calls), 0 * noise[:, 0])
    for name, order in ADAPTIVE.items():
        for i in range(len(start)):
            move = partial(k.sample_dpm_adaptive, model, start[i : i + 1], low, high, order=order)
            arrays |= recorded(f"{name}/{i}", k, move, torch.zeros(500, 1, *start.shape[1:]))
    file = io.BytesIO()
    np.savez_compressed(file, **{name: array.numpy() for name, array in arrays.items()})
    (TESTS / "golden").mkdir(exist_ok=True)
    (TESTS / "golden" / "k_diffusion.npz").write_bytes(file.getvalue())
    print(f"{len(arrays)} arrays, {len(file.getvalue()) / 1000:.0f} kB")


def recorded(name: str, k, sample: Callable[..., Tensor], draws: Tensor) -> dict[str, Tensor]:
    """Runs a sampler with these draws [n, B, C, H, W] as its noise, however it asks for some."""
    left = iter(draws)
    states: list[dict] = []
    real = torch.randn_like  # euler, heun and dpm_2 draw at every step, whether they churn there or not
    torch.randn_like = lambda x: next(left)
    if "noise_sampler" in inspect.signature(sample).parameters:  # else the others would grow a Brownian tree
        sample = partial(sample, noise_sampler=lambda sigma, sigma_next: next(left))
    try:
        end = sample(callback=lambda info: states.append(dict(info)), disable=True)
    finally:
        torch.randn_like = real
    arrays = {"end": end, "x": torch.stack([s["x"] for s in states]), "x0": torch.stack([s["denoised"] for s in states])}
    if "adaptive" in name:
        arrays["sigma"] = torch.stack([s["sigma"] for s in states])
    return {f"{name}/{key}": value for key, value in arrays.items()}


if __name__ == "__main__":
    main()
