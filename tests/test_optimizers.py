"""The rate is a pure function of the step; the average keeps what its half-life says."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffusion_cli import ema
from diffusion_cli.ema import HalfLife, Latest, update
from diffusion_cli.errors import ConfigError
from diffusion_cli.optimizers import AdamW, Constant, Cosine, Decay, InverseSqrt, Late, Linear, Muon, Steps
from diffusion_cli.pace import Pace

DECAYS: list[Decay] = [Constant(), Linear(), Cosine(), Late(0.3), Late(0.0), Late(1.0), Steps(7, 0.5, 0.1), InverseSqrt(9)]


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
    assert [round(1 / InverseSqrt(1200).factor(s, 10, Pace(12)), 12) for s in (0, 99, 100, 400, 900)] == [1, 1, 1, 2, 3]
    assert [Steps(5, 0.5, 0.2).factor(s, 99) for s in (0, 4, 5, 9, 10, 14, 15, 1000)] == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2]


def test_warmup_rises_from_the_first_step_and_ends() -> None:
    assert [round(recipe(warmup=4).rate(s, 100) / 1e-3, 12) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert recipe(warmup=0).rate(0, 100) == 1e-3
    assert recipe(Linear(), warmup=2).rate(1, 10) == pytest.approx(1e-3 * 0.9, abs=1e-15)


def test_a_ramp_counted_in_pictures_is_the_same_at_any_batch() -> None:
    """EDM2's rule: lr min(n / ramp, 1) / sqrt(max(n / reference, 1)) of n pictures; a ramp counts the step's own."""
    made = AdamW(1e-3, (0.9, 0.999), 1e-8, 0.0, 0, None, InverseSqrt(6400), warmup_images=3200)
    for batch in (1, 32, 128):
        for seen in (128, 1280, 3200, 6400, 12800):
            wanted = 1e-3 * min(seen / 3200, 1) / math.sqrt(max((seen - batch) / 6400, 1))
            assert made.rate(seen // batch - 1, 2**62, Pace(batch)) == pytest.approx(wanted, rel=1e-12)
    both = AdamW(1e-3, (0.9, 0.999), 1e-8, 0.0, 50, None, Constant(), warmup_images=3200)
    assert both.rate(9, 100, Pace(32)) == pytest.approx(1e-4) and both.rate(9, 100, Pace(128)) == pytest.approx(2e-4)


def test_after_a_round_of_the_tutorial_the_rate_is_nine_tenths() -> None:
    decay = recipe(Steps(5000, 0.9, 0.00125), lr=8e-4)
    assert decay.rate(4999, 50_000) == 8e-4 and decay.rate(5000, 50_000) == pytest.approx(7.2e-4, abs=1e-12)
    assert decay.rate(10**7, 10**8) == pytest.approx(1e-6, abs=1e-15)


def test_weight_decay_0_is_adam() -> None:
    torch.manual_seed(0)
    start, pulls = torch.randn(50), [torch.randn(50) for _ in range(20)]
    ends = []
    for make in (recipe().make, lambda m: torch.optim.Adam(m.parameters(), lr=1e-3), recipe(weight_decay=0.5).make):
        parameter = nn.Parameter(start.clone())
        optimizer = make(nn.ParameterList([parameter]))
        for pull in pulls:
            parameter.grad = pull.clone()
            optimizer.step()
        ends.append(parameter.detach())
    assert float((ends[0] - ends[1]).abs().max()) < 1e-6
    assert float((ends[0] - ends[2]).abs().max()) > 1e-3


def muon(lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.95, apart: tuple[str, ...] = ("conv_in",)) -> Muon:
    return Muon(lr, (0.9, 0.999), 1e-8, weight_decay, 0, None, Constant(), momentum=momentum, apart=apart)


@pytest.mark.parametrize("layer", [nn.Linear(48, 20), nn.Linear(20, 48), nn.Conv2d(6, 32, 3)], ids=str)
def test_muon_moves_a_matrix_by_the_orthogonal_factor_of_its_gradient(layer: nn.Linear | nn.Conv2d) -> None:
    """U V^T by the SVD. The five steps leave singular values between 0.65 and 1.2, as Jordan's polynomial does, so each of
    them, and the direction as a whole, is compared within that; the bias goes as AdamW says."""
    torch.manual_seed(0)
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    G = torch.randn_like(layer.weight)
    layer.weight.grad, layer.bias.grad = G.clone(), torch.ones_like(layer.bias)
    muon(weight_decay=0.5).make(layer).step()
    moved = (layer.weight.detach() - before * (1 - 1e-3 * 0.5)).flatten(1) / -1e-3
    U, _, V = torch.linalg.svd(G.flatten(1), full_matrices=False)
    O = moved / (0.2 * math.sqrt(max(moved.shape)))
    seen = torch.diag(U.T @ O @ V.T)  # singular values, if O shares U and V with the gradient
    assert float(seen.min()) > 0.65 and float(seen.max()) < 1.2
    cosine = (O * (U @ V)).sum() / (O.norm() * (U @ V).norm())
    assert float(cosine) > 0.98
    assert float((layer.bias.detach() - (bias * (1 - 1e-3 * 0.5) - 1e-3)).abs().max()) < 1e-6


def test_muon_goes_where_torchs_goes() -> None:
    """Five steps of a kernel, which is a matrix, and of two matrices of one shape; torch's counts in bf16."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 12, 3, bias=False), nn.Linear(9, 20, bias=False), nn.Linear(9, 20, bias=False))
    matrices = [nn.Parameter(p.detach().flatten(1).clone()) for p in module.parameters()]
    begun = [p.detach().clone() for p in matrices]
    theirs = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    ours = muon(lr=0.02, weight_decay=0.1, momentum=0.9, apart=()).make(module)
    for step in range(5):
        for p, matrix in zip(module.parameters(), matrices, strict=True):
            matrix.grad = torch.randn_like(matrix)
            p.grad = matrix.grad.view_as(p).clone() if step or p is not module[2].weight else None  # one comes late
            matrix.grad = None if p.grad is None else matrix.grad
        ours.step()
        theirs.step()
    for p, matrix, before in zip(module.parameters(), matrices, begun, strict=True):
        assert float((p.detach().flatten(1) - matrix.detach()).norm() / (matrix.detach() - before).norm()) < 0.02


def test_muon_takes_matrices_alone() -> None:
    """Not the first layer, tables, vectors, rows and what is frozen: those are AdamW's or nobody's."""
    parts = {"conv_in": nn.Conv2d(3, 4, 3), "inside": nn.Conv2d(4, 4, 3), "table": nn.Embedding(5, 4), "row": nn.Linear(9, 1)}
    module = nn.ModuleDict({**parts, "norm": nn.GroupNorm(2, 4), "frozen": nn.Linear(4, 4).requires_grad_(False)})
    optimizer = muon().make(module)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    frozen = module["frozen"].weight.detach().clone()
    optimizer.step()
    taken = {name for name, p in module.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    assert taken == {"inside.weight"}
    adams = {name for name, p in module.named_parameters() if "exp_avg" in optimizer.state[p]}
    assert adams == {name for name, p in module.named_parameters() if p.requires_grad} - taken
    assert torch.equal(module["frozen"].weight, frozen)


def test_muon_says_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="apart names convin, and no layer"):
        muon(apart=("convin",)).make(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="finds no matrix"):
        muon().make(nn.LayerNorm(4))


def test_muon_alone_moves_a_network_of_matrices() -> None:
    layer = nn.Linear(4, 4, bias=False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.eye(4)
    optimizer = muon().make(layer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert torch.equal(layer.weight, before), "the rate is that of the group"


def test_muon_is_quicker_on_an_ill_conditioned_problem() -> None:
    """min ||(W - W*) A||^2 with singular values of A from 1 to 1/100: the best rate of each, out of five, in 100 steps."""
    torch.manual_seed(0)
    A = torch.linalg.qr(torch.randn(32, 32))[0] * torch.logspace(0, -2, 32)
    goal = torch.randn(32, 32) / 4

    def end(make: Callable[[float], AdamW], lr: float) -> float:
        layer = nn.Linear(32, 32, bias=False)
        nn.init.zeros_(layer.weight)
        recipe = make(lr)
        optimizer = recipe.make(layer)
        for step in range(100):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step, 100)
            loss = ((layer.weight - goal) @ A).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    def linear(kind: type[AdamW], **more: Any) -> Callable[[float], AdamW]:
        return lambda lr: kind(lr, (0.9, 0.999), 1e-8, 0.0, 0, None, Linear(), **more)

    rates = (0.003, 0.01, 0.03, 0.1, 0.3)
    adamw = min(end(linear(AdamW), lr) for lr in rates)
    assert min(end(linear(Muon, momentum=0.95, apart=()), lr) for lr in rates) < adamw / 3


def averaged(beta: float, values: list[float], first: float = 0.0) -> float:
    shadow, module = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(shadow.weight, first)
    for value in values:
        nn.init.constant_(module.weight, value)
        update(shadow, module, beta)
    return shadow.weight.item()


def test_half_of_the_average_is_older_than_the_half_life() -> None:
    """1000 images in batches of 50: after 20 updates the first value weighs a half."""
    beta = HalfLife(1000, 0.0).beta(10**6, Pace(50))
    assert beta == pytest.approx(0.5 ** (50 / 1000), abs=1e-15)
    assert averaged(beta, [0.0] * 20, first=1.0) == pytest.approx(0.5, abs=1e-5)
    assert averaged(beta, [0.0] * 40, first=1.0) == pytest.approx(0.25, abs=1e-5)


def test_half_life_is_in_images_whatever_the_batch() -> None:
    for batch in (1, 8, 200):
        assert HalfLife(1000, 0.0).beta(10**6, Pace(batch)) ** (1000 / batch) == pytest.approx(0.5, abs=1e-12)


def test_rampup_shortens_the_average_at_the_start() -> None:
    average = HalfLife(500_000, 0.05)
    assert average.beta(0, Pace(100)) == pytest.approx(0.5**20, abs=1e-12), "half-life 5 images: the start is forgotten"
    assert average.beta(10**4 - 1, Pace(100)) == pytest.approx(0.5 ** (100 / 50_000), abs=1e-12)
    assert average.beta(10**7, Pace(100)) == pytest.approx(0.5 ** (100 / 500_000), abs=1e-12)
    betas = [average.beta(n, Pace(100)) for n in range(0, 10**4, 50)]
    assert betas == sorted(betas)


def test_decay_and_its_warmup() -> None:
    assert ema.Decay(0.99, False).beta(0, Pace(8)) == 0.99
    assert ema.Decay(0.9999, True).beta(4, Pace(8)) == pytest.approx(6 / 15, abs=1e-12)
    assert ema.Decay(0.9999, True).beta(10**7, Pace(8)) == 0.9999


def test_latest_is_the_newest_to_the_bit() -> None:
    shadow, module = nn.Linear(9, 9), nn.Linear(9, 9)
    update(shadow, module, Latest().beta(0, Pace(8)))
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
