"""Pictures are moved as they are said to be moved: against closed forms, and not at all where nothing is drawn."""

import math
from pathlib import Path

import pytest
import torch
from tiny import compose, words
from torch import Tensor

from diffusion_cli import config
from diffusion_cli.assembly import Facts, objective_of, rehearse
from diffusion_cli.data import Augment, Batch
from diffusion_cli.data.augment import WIDTH, _matrix, _scaled, _shifted, _turned, warped
from diffusion_cli.errors import ConfigError
from diffusion_cli.objectives import Denoising
from diffusion_cli.randomness import Source

SIDE = 12


def pictures(count: int = 400) -> Tensor:
    return torch.rand(count, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def number(value: float) -> Tensor:
    return torch.tensor([value])


def source(count: int = 400) -> Source:
    return Source(5, torch.arange(count), 3)


def test_without_probability_it_is_the_identity_to_the_bit() -> None:
    x, told = Augment(0.0)(pictures(), source())
    assert torch.equal(x, pictures()) and told.shape == (400, WIDTH) and not told.any()


def test_what_is_told_to_be_unmoved_is_unmoved_to_the_bit() -> None:
    x, told = Augment(0.12)(pictures(), source())
    still = ~told.any(1)
    assert 0.15 < float(still.float().mean()) < 0.45  # (1 - 0.12)^4 (1 - 0.06) / 2 = 0.28
    assert torch.equal(x[still], pictures()[still]) and not torch.equal(x[~still], pictures()[~still])


def test_flips_are_exact_and_told() -> None:
    """Of pictures that nothing else moved: each of the four, by its two numbers."""
    x, told = Augment(0.3)(pictures(2000), source(2000))
    alone = ~told[:, 2:].any(1)
    for mirrored in (0, 1):
        for upside in (0, 1):
            here = alone & (told[:, 0] == mirrored) & (told[:, 1] == upside)
            sides = [-1] * mirrored + [-2] * upside
            assert here.sum() > 10 and torch.equal(x[here], pictures(2000)[here].flip(sides))


def test_how_often_each_move_is_made() -> None:
    _, told = Augment(0.12)(torch.zeros(20000, 1, 2, 2), source(20000))
    shares = (told != 0).float().mean(0)
    wanted = torch.tensor([0.5, 0.06, *[0.12] * 7])
    assert float((shares - wanted).abs().max()) < 0.011  # three standard deviations of the largest
    assert float(told[:, 7][told[:, 7] != 0].std()) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_those_of_rot90(quarters: int) -> None:
    """A positive angle is from the right to below, as rows count: the inverse of rot90's."""
    turned = warped(pictures(1), _turned(number(-quarters * math.pi / 2)))
    assert float((turned - torch.rot90(pictures(1), -quarters, (2, 3))).abs().max()) < 1e-5


@pytest.mark.parametrize(("right", "down"), [(1, 0), (0, 2), (-3, 1)])
def test_whole_pixels_are_shifted_exactly_and_the_edge_is_mirrored(right: int, down: int) -> None:
    x = pictures(1)
    moved = warped(x, _shifted(number(-2 * right / SIDE), number(-2 * down / SIDE)))
    reach = 3
    mirror = [*range(reach - 1, -1, -1), *range(SIDE), *range(SIDE - 1, SIDE - 1 - reach, -1)]
    padded = x[:, :, mirror][:, :, :, mirror]
    wanted = padded[:, :, reach - down : reach - down + SIDE, reach - right : reach - right + SIDE]
    assert float((moved - wanted).abs().max()) < 1e-5


def test_a_scale_spreads_a_wave() -> None:
    """Twice as large along a row: the wave there has half the number, the rows stay; within torch's cubic (a = -0.75)."""
    place = (torch.arange(64) + 0.5) / 32 - 1
    wave = torch.sin(4 * math.pi * place).expand(1, 1, 64, 64)
    moved = warped(wave, _scaled(number(0.5), number(1.0)))
    assert float((moved - torch.sin(2 * math.pi * place)).abs().max()) < 0.02


def test_the_numbers_that_are_told_say_the_move() -> None:
    """Each picture again, from its nine numbers alone: the one affine map that they describe, of the picture flipped."""
    x, told = Augment(0.6)(pictures(), source())
    for one, y, numbers in zip(pictures(), x, told, strict=True):
        mirrored, upside, scale, cos1, sin, along, across, right, down = numbers.tolist()
        stretch, axis = math.hypot(along, across), math.atan2(across, along) / 2
        forward = [_shifted(number(right / 4), number(down / 4)), _turned(number(axis)),
                   _scaled(number(2 ** (0.2 * stretch)), number(2 ** (-0.2 * stretch))), _turned(number(-axis)),
                   _turned(number(math.atan2(sin, cos1 + 1))), _scaled(*[number(2 ** (0.2 * scale))] * 2)]  # fmt: skip
        flipped = one[None].flip([-1] * int(mirrored) + [-2] * int(upside))
        again = warped(flipped, torch.linalg.inv(torch.linalg.multi_dot([m[0] for m in forward]))[None])
        assert float((again[0] - y).abs().max()) < 2e-4


def test_a_matrix_is_of_the_batch() -> None:
    assert _matrix((number(2.0), 0.0), (1.0, 3.0)).tolist() == [[[2.0, 0.0], [1.0, 3.0]]]


def objective(*more: str) -> Denoising:
    node = config.check_train(compose(*words(Path("unused"), *more))).node
    facts = Facts(channels=1, image_size=8, classes=list("0123456789"), taught=[], fingerprint="")
    made = objective_of(node, facts)
    assert isinstance(made, Denoising)
    return made


NETWORKS = {
    "unet": (),
    "dit": ("model=dit", "model.width=16", "model.depth=1", *(f"model.{k}=DEFAULT" for k in ("groups", "multipliers"))),
    "ddpmpp": ("model=ddpmpp", "model.blocks=1", "model.attention_levels=[0]"),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_network_is_told_and_told_nothing_is_as_none(network: str) -> None:
    made = objective("objective/augment=edm", "objective.augment.p=0.5", *NETWORKS[network]).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5)
        plain = made.denoiser.output(x, t)[0]
        assert torch.equal(plain, made.denoiser.output(x, t, augment=torch.zeros(4, WIDTH))[0])
        assert not torch.equal(plain, made.denoiser.output(x, t, augment=torch.ones(4, WIDTH))[0])
    losses, _ = made.loss(Batch(torch.rand(4, 1, 8, 8), None, torch.arange(4)), source(4))
    losses.sum().backward()
    assert made.denoiser.network.augment_embedding.weight.grad.abs().sum() > 0


def test_who_takes_none_is_refused() -> None:
    gone = [f"model.{key}=DEFAULT" for key in ("width", "groups", "multipliers")]
    node = config.check_train(compose(*words(Path("unused"), "objective/augment=edm", "model=unet_basic", *gone))).node
    with pytest.raises(ConfigError, match="objective/augment needs a network that takes a picture's moves, and UNetBasic"):
        rehearse(node)
