"""The rate is a pure function of the step; the average keeps what its half-life says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffusion_cli import ema
from diffusion_cli.ema import HalfLife, Latest, update
from diffusion_cli.optimizers import AdamW, Constant, Cosine, Decay, Late, Linear, Steps

DECAYS: list[Decay] = [Constant(), Linear(), Cosine(), Late(0.3), Late(0.0), Late(1.0), Steps(7, 0.5, 0.1)]


def recipe(decay: Decay = Constant(), warmup: int = 0, lr: float = 1e-3, weight_decay: float = 0.0) -> AdamW:  # noqa: B008
    return AdamW(lr, (0.9, 0.999), 1e-8, weight_decay, warmup, None, decay)


@pytest.mark.parametrize("decay", DECAYS, ids=str)
@given(step=st.integers(0, 10**7), total=st.one_of(st.integers(1, 10**6), st.just(2**62)))
def test_factor_stays_between_0_and_1(decay: Decay, step: int, total: int) -> None:
    assert 0 <= decay.factor(step, total) <= 1
    assert decay.factor(step + 1, total) <= decay.factor(step, total), "it never rises"
    assert decay.factor(0, total) == 1


def test_factors_at_known_places() -> None:
    assert [Linear().factor(s, 10) for s in (0, 5, 10, 99)] == [1, 0.5, 0, 0]
    assert [round(Cosine().factor(s, 8), 12) for s in (0, 4, 8, 99)] == [1, 0.5, 0, 0]
    assert math.isclose(Cosine().factor(2, 8), (1 + math.cos(math.pi / 4)) / 2)
    assert [round(Late(0.25).factor(s, 100), 12) for s in (0, 75, 80, 90, 100, 101)] == [1, 1, 0.8, 0.4, 0, 0]
    assert [Steps(5, 0.5, 0.2).factor(s, 99) for s in (0, 4, 5, 9, 10, 14, 15, 1000)] == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2]


def test_warmup_rises_from_the_first_step_and_ends() -> None:
    assert [round(recipe(warmup=4).rate(s, 100) / 1e-3, 12) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert recipe(warmup=0).rate(0, 100) == 1e-3
    assert recipe(Linear(), warmup=2).rate(1, 10) == pytest.approx(1e-3 * 0.9, abs=1e-15)


def test_after_a_round_of_the_tutorial_the_rate_is_nine_tenths() -> None:
    decay = recipe(Steps(5000, 0.9, 0.00125), lr=8e-4)
    assert decay.rate(4999, 50_000) == 8e-4 and decay.rate(5000, 50_000) == pytest.approx(7.2e-4, abs=1e-12)
    assert decay.rate(10**7, 10**8) == pytest.approx(1e-6, abs=1e-15)


def test_weight_decay_0_is_adam() -> None:
    torch.manual_seed(0)
    start, pulls = torch.randn(50), [torch.randn(50) for _ in range(20)]
    ends = []
    for make in (recipe().make, lambda p: torch.optim.Adam(p, lr=1e-3), recipe(weight_decay=0.5).make):
        parameter = nn.Parameter(start.clone())
        optimizer = make([parameter])
        for pull in pulls:
            parameter.grad = pull.clone()
            optimizer.step()
        ends.append(parameter.detach())
    assert float((ends[0] - ends[1]).abs().max()) < 1e-6
    assert float((ends[0] - ends[2]).abs().max()) > 1e-3


def averaged(beta: float, values: list[float], first: float = 0.0) -> float:
    shadow, module = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(shadow.weight, first)
    for value in values:
        nn.init.constant_(module.weight, value)
        update(shadow, module, beta)
    return shadow.weight.item()


def test_half_of_the_average_is_older_than_the_half_life() -> None:
    """1000 images in batches of 50: after 20 updates the first value weighs a half."""
    beta = HalfLife(1000, 0.0).beta(10**6, 50)
    assert beta == pytest.approx(0.5 ** (50 / 1000), abs=1e-15)
    assert averaged(beta, [0.0] * 20, first=1.0) == pytest.approx(0.5, abs=1e-5)
    assert averaged(beta, [0.0] * 40, first=1.0) == pytest.approx(0.25, abs=1e-5)


def test_half_life_is_in_images_whatever_the_batch() -> None:
    for batch in (1, 8, 200):
        assert HalfLife(1000, 0.0).beta(10**6, batch) ** (1000 / batch) == pytest.approx(0.5, abs=1e-12)


def test_rampup_shortens_the_average_at_the_start() -> None:
    average = HalfLife(500_000, 0.05)
    assert average.beta(100, 100) == pytest.approx(0.5**20, abs=1e-12), "half-life 5 images: the start is forgotten"
    assert average.beta(10**6, 100) == pytest.approx(0.5 ** (100 / 50_000), abs=1e-12)
    assert average.beta(10**9, 100) == pytest.approx(0.5 ** (100 / 500_000), abs=1e-12)
    betas = [average.beta(n, 100) for n in range(100, 10**6, 5000)]
    assert betas == sorted(betas)


def test_decay_and_its_warmup() -> None:
    assert ema.Decay(0.99, False).beta(1, 8) == 0.99
    assert ema.Decay(0.9999, True).beta(8 * 5, 8) == pytest.approx(6 / 15, abs=1e-12)
    assert ema.Decay(0.9999, True).beta(8 * 10**7, 8) == 0.9999


def test_latest_is_the_newest_to_the_bit() -> None:
    shadow, module = nn.Linear(9, 9), nn.Linear(9, 9)
    update(shadow, module, Latest().beta(8, 8))
    assert torch.equal(shadow.weight, module.weight) and torch.equal(shadow.bias, module.bias)


def test_update_is_the_formula_and_copies_buffers() -> None:
    torch.manual_seed(0)
    shadow, module = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
    nn.init.normal_(module.weight)
    module(torch.randn(8, 5))
    old, trained = shadow.weight.detach().clone(), module.weight.detach().clone()
    update(shadow, module, 0.75)
    assert float((shadow.weight.detach() - (0.75 * old + 0.25 * trained)).abs().max()) < 1e-6
    assert torch.equal(shadow.running_mean, module.running_mean) and int(shadow.num_batches_tracked) == 1
    assert torch.equal(module.weight, trained), "the trained weights are not touched"
