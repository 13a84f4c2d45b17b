"""Coloured noise has the covariance that its formula says, everywhere where noise is drawn."""

from pathlib import Path

import pytest
import torch
from closed_form import close
from tiny import compose, train, words
from torch import Tensor

from diffusion_cli import config
from diffusion_cli.coloured import Coloured, Offset, Pyramid
from diffusion_cli.devices import choose
from diffusion_cli.editing import PureNoise
from diffusion_cli.errors import ConfigError
from diffusion_cli.evaluation.parts import of_pictures
from diffusion_cli.exporting import export
from diffusion_cli.finding import dataset_of, find
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Heun, Uniform
from diffusion_cli.schedules import VP, Flow, Mix, Shifted

SIDE, DRAWS = 5, 40_000  # five pixels: blocks at the edge are smaller


def pixels(k: int) -> Tensor:
    """[25] the block of level k that each pixel is in, by the size of the level and torch's nearest neighbour."""
    size = SIDE
    for _ in range(k):
        size = -(-size // 2)
    block = torch.arange(SIDE) * size // SIDE
    return (block[:, None] * size + block).flatten()


def expected(schedule: Coloured) -> Tensor:
    """[25, 25], of the formula in the module's text."""
    if isinstance(schedule, Offset):
        total, scale = torch.eye(25) + schedule.strength**2, 1 + schedule.strength**2
    else:
        assert isinstance(schedule, Pyramid)
        d = schedule.discount
        total = sum(d ** (2 * k) * (pixels(k)[:, None] == pixels(k)).float() for k in range(4))  # 5, 3, 2, 1 pixels
        scale = sum(d ** (2 * k) for k in range(4))
    return total / scale if schedule.unit else total


CASES = [Offset(Flow()), Offset(Flow(), 0.7), Offset(VP(), 0.7, True), Pyramid(Flow()), Pyramid(VP(), 0.5, False)]


@pytest.mark.parametrize("schedule", CASES, ids=lambda s: f"{type(s).__name__}-{s.unit}")
def test_covariance_is_the_formula(schedule: Coloured) -> None:
    """Within five standard errors of a product of two normals; channels are apart; a pixel's variance is 1 where it is to."""
    noise = schedule.noise(Source(0, torch.arange(DRAWS)), "noise", (2, SIDE, SIDE)).flatten(2)  # [N, 2, 25]
    found, wanted = noise[:, 0].T @ noise[:, 0] / DRAWS, expected(schedule)
    spread = (wanted.diag()[:, None] * wanted.diag() + wanted**2).sqrt() / DRAWS**0.5
    assert float(((found - wanted) / spread).abs().max()) < 5
    across = noise[:, 0].T @ noise[:, 1] / DRAWS
    assert float(across.abs().max()) < 5 * float(wanted.diag().max()) / DRAWS**0.5
    assert not schedule.unit or float((wanted.diag() - 1).abs().max()) < 1e-6


def test_a_walk_starts_and_goes_on_with_it() -> None:
    schedule = Offset(Flow(), 3.0)
    source = Source(0, torch.arange(4000))
    x = PureNoise().x(schedule, Heun(4, Uniform(), False), source, (1, 4, 4))
    assert float(x.mean((1, 2, 3)).var()) == pytest.approx(9 + 1 / 16, rel=0.1)
    close(x, schedule.noise(source, "start", (1, 4, 4)), 1e-6)


def test_it_is_its_base_but_for_the_noise() -> None:
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    for base in (Flow(), VP(), Shifted(VP(), 2.0)):
        one = Pyramid(base)
        for ask in ("alpha", "sigma", "log_snr", "timestep"):
            assert torch.equal(getattr(one, ask)(t), getattr(base, ask)(t)), ask
        assert torch.equal(one.t_of_log_snr(base.log_snr(t)), base.t_of_log_snr(base.log_snr(t)))
        assert (one.reaches_zero, one.gaussian, one.white, base.white) == (base.reaches_zero, True, False, True)
    assert not Shifted(Pyramid(Flow())).white


def test_noise_of_another_kind_is_refused() -> None:
    for base in (Mix(), Offset(Flow())):
        with pytest.raises(ValueError, match="another kind already"):
            Offset(base)


def test_what_needs_white_noise_says_so(tmp_path: Path) -> None:
    """A run with it trains and samples; its bits, its graphs and its pipeline are refused."""
    run = train(tmp_path, "schedule=offset", "trainer.steps=2")
    for to in ("diffusers", "onnx"):
        with pytest.raises(ConfigError, match="coloured"):
            export(config.check_export(compose(f"ckpt={run}", f"to={to}", primary="export")))
    wanted = config.check_evaluate(compose(f"ckpt={run}", "metrics=[bits]", primary="evaluate"))
    with pytest.raises(ConfigError, match="white Gaussian noise"):
        of_pictures(find(run), dataset_of(find(run), None), wanted, choose("cpu", "fp32", False, print))


def test_eps_is_refused_where_the_base_ends_in_noise() -> None:
    with pytest.raises(ConfigError, match="prediction=eps is impossible"):
        config.check_train(compose(*words(Path("unused"), "schedule=offset", "prediction=eps")))
    config.check_train(compose(*words(Path("unused"), "schedule=offset", "schedule@schedule.base=cosine", "prediction=eps")))
