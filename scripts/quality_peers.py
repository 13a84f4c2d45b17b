"""What bench_quality.py compares: a tool's network in its own recipe, trained by its own code, and judged by our contract.

`own` is the proof that the judge reads a peer's network rightly: x0 by the tool's own decoding, and by our denoiser around it.
"""

import copy
import importlib.util
import os
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_cli.denoiser import Denoiser
from diffusion_cli.models.network import Network
from diffusion_cli.predictions import Eps, Preconditioned, V
from diffusion_cli.schedules import EDM, Betas, Tabulated

SIZE = 28
Data = Callable[[int], Tensor]  # so many pictures -> float32 [B, 1, 28, 28] in [-1, 1]


@dataclass(frozen=True)
class Learner:
    """step: one update, which returns how many pictures it took; average: the averaged network, as it is now; own: x at some
    time -> x0 by the tool's own code, and by ours."""

    name: str
    step: Callable[[], int]
    average: Callable[[], Denoiser]
    own: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None


class Theirs(Network):
    """A peer's network under our contract. call: (network, x, time) -> F."""

    def __init__(self, network: nn.Module, call: Callable[[Any, Tensor, Tensor], Tensor]):
        super().__init__(1, SIZE, 0)
        self.network, self.call = network, call

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.call(self.network, x, time)


def diffusers(
    name: str, widths: tuple[int, ...], attends: bool, layers: int, groups: int, data: Data, budget: float
) -> Learner:
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    kinds = ["", *["Attn" if attends else ""] * (len(widths) - 1)]
    network = UNet2DModel(
        sample_size=SIZE, in_channels=1, out_channels=1, layers_per_block=layers, block_out_channels=widths,
        norm_num_groups=groups,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
    )  # fmt: skip
    scheduler, batch = DDPMScheduler(), 16

    def update(network: Any, optimizer: Any) -> None:
        clean = data(batch)
        noise, times = torch.randn_like(clean), torch.randint(0, 1000, (batch,))
        loss = nn.functional.mse_loss(network(scheduler.add_noise(clean, noise, times), times).sample, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    trial = copy.deepcopy(network)  # how many updates the budget allows
    plain = torch.optim.AdamW(trial.parameters(), lr=1e-4)
    update(trial, plain)
    began = time.process_time()
    for _ in range(3):
        update(trial, plain)
    total = round(3 * budget / (time.process_time() - began))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    rate = get_cosine_schedule_with_warmup(optimizer, round(0.16 * total), total)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    judged = copy.deepcopy(network).eval()

    def step() -> int:
        update(network, optimizer)
        rate.step()
        average.step(network.parameters())
        return batch

    def averaged() -> Denoiser:
        average.copy_to(judged.parameters())
        return Denoiser(Theirs(judged, lambda net, x, t: net(x, t).sample), Eps(Betas("linear", 1000, 1e-4, 0.02, False)))

    def own(x: Tensor) -> tuple[Tensor, Tensor]:
        scheduler.config.clip_sample = False
        k = torch.tensor(400)
        theirs = scheduler.step(averaged().network(x, k.float().expand(len(x))), k, x).pred_original_sample
        return theirs, averaged()(x, (k + 1) / 1000)

    return Learner(name, step, averaged, own)


def denoising_diffusion(name: str, width: int, data: Data) -> Learner:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA as Average

    diffusion = GaussianDiffusion(Unet(dim=width, dim_mults=(1, 2, 4), channels=1), image_size=SIZE)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = Average(diffusion, beta=0.995, update_every=10)
    schedule = Tabulated(tuple(diffusion.betas.tolist()))

    def step() -> int:
        loss = diffusion((data(16) + 1) / 2)
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        return 16

    def averaged() -> Denoiser:
        return Denoiser(Theirs(average.ema_model.model, lambda net, x, t: net(x, t)), V(schedule)).eval()

    def own(x: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.full((len(x),), 400)
        return average.ema_model.eval().model_predictions(x, k).pred_x_start, averaged()(x, (k + 1) / 1000)

    return Learner(name, step, averaged, own)


def k_diffusion(name: str, data: Data) -> Learner:
    os.environ["K_DIFFUSION_USE_COMPILE"] = "0"  # in its favour: compiling takes longer than some marks, in every judge again
    found = importlib.util.find_spec("k_diffusion")
    assert found is not None
    package = types.ModuleType("k_diffusion")  # without its __init__, which imports CLIP, clean-fid and wandb for nothing here
    package.__path__ = list(found.submodule_search_locations or [])
    sys.modules["k_diffusion"] = package
    from k_diffusion import layers, utils
    from k_diffusion.models import ImageTransformerDenoiserModelV1

    sigma_data = 0.6162
    inner = ImageTransformerDenoiserModelV1(8, 256, 704, 1, 1, (4, 4), dropout=0.05, sigma_data=sigma_data)
    network = layers.Denoiser(inner, sigma_data=sigma_data, weighting="soft-min-snr")
    averaged = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(inner.param_groups(5e-4), lr=5e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4)
    warmup = utils.EMAWarmup(power=0.6667, max_value=0.9999)
    settings = {"image_d": SIZE, "noise_d_low": 32, "noise_d_high": SIZE, "sigma_data": sigma_data}

    def step() -> int:
        clean = data(64)
        sigma = utils.rand_cosine_interpolated([64], **settings)
        network.loss(clean, torch.randn_like(clean), sigma).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        inner.proj_()
        utils.ema_update(network, averaged, warmup.get_value())
        warmup.step()
        return 64

    def average() -> Denoiser:
        theirs = Theirs(averaged.inner_model, lambda net, x, t: net(x, torch.exp(4 * t)))
        return Denoiser(theirs, Preconditioned(EDM(0.01, 80.0), sigma_data)).eval()

    def own(x: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.full((len(x),), 0.5)
        return averaged(x, EDM(0.01, 80.0).sigma(t)), average()(x, t)

    return Learner(name, step, average, own)
