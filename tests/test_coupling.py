"""Noise is assigned to pictures at the least cost of all permutations, within labels, and stays what it was."""

from itertools import permutations
from pathlib import Path

import pytest
import torch
from test_distributed_training import equal, said, together
from tiny import changed, compose, train, words
from torch import Tensor

from diffusion_cli import config
from diffusion_cli.assembly import Facts, objective_of
from diffusion_cli.data import Batch
from diffusion_cli.objectives import Coupling, Denoising
from diffusion_cli.randomness import Source

SHAPE = (2, 3, 3)


def drawn(count: int) -> tuple[Tensor, Tensor]:
    source = Source(0, torch.arange(count))
    return source.normal("x0", SHAPE), source.normal("noise", SHAPE)


def cost(x0: Tensor, noise: Tensor, power: int) -> float:
    return float(((x0 - noise).flatten(1).norm(dim=1).double() ** power).sum())


@pytest.mark.parametrize("power", [1, 2])
def test_cost_is_the_least_of_all_permutations(power: int) -> None:
    x0, noise = drawn(6)
    found = Coupling(power)(x0, noise, None)
    least = min(cost(x0, noise[list(order)], power) for order in permutations(range(6)))
    assert cost(x0, found, power) == pytest.approx(least, rel=1e-6) and least < 0.99 * cost(x0, noise, power)


@pytest.mark.parametrize("power", [1, 2])
def test_noise_is_exchanged_within_labels_alone(power: int) -> None:
    """The least cost of each label's own permutations, its noises those that it had; no label is a group of all."""
    x0, noise = drawn(12)
    label = torch.tensor([0, 1, 2] * 4)
    found = Coupling(power)(x0, noise, label)
    for k in range(3):
        mine = label == k
        least = min(cost(x0[mine], noise[mine][list(order)], power) for order in permutations(range(4)))
        assert cost(x0[mine], found[mine], power) == pytest.approx(least, rel=1e-6)
        assert sorted(found[mine].flatten(1).tolist()) == sorted(noise[mine].flatten(1).tolist())
    whole = Coupling(power)(x0, noise, None)
    assert sorted(whole.flatten(1).tolist()) == sorted(noise.flatten(1).tolist())
    assert cost(x0, whole, power) < cost(x0, found, power)


def objective(*more: str) -> Denoising:
    node = config.check_train(compose(*words(Path("unused"), "dataset.labels=true", *more))).node
    facts = Facts(channels=1, image_size=8, classes=list("0123456789"), taught=list(range(10)), fingerprint="")
    made = objective_of(node, facts)
    assert isinstance(made, Denoising)
    return made


def test_the_loss_sees_coupled_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """x_t - alpha x0, over sigma, is the noise that went in: within labels no permutation of it is nearer."""
    batch = Batch(torch.rand(20, 1, 8, 8) * 2 - 1, torch.arange(20) % 2, torch.arange(20))
    source = Source(0, torch.arange(20), 3)
    for words_, least in (((), False), (("objective/coupling=optimal",), True)):
        made = objective(*words_)
        seen: list[Tensor] = []
        monkeypatch.setattr(type(made.denoiser.schedule), "mix", lambda s, x0, n, t, seen=seen: seen.append(n) or x0)
        made.loss(batch, source)
        monkeypatch.undo()
        again = Coupling(2)(batch.x, seen[0], batch.label)
        assert torch.equal(again, seen[0]) is least
        assert made.coupled is least


def test_texts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = objective()
    with pytest.raises(ValueError, match="those with texts have none"):
        Denoising(made.denoiser, made.criterion, made.sampler, [], 4, texts=object(), coupling=Coupling())  # type: ignore[arg-type]


def test_what_it_is_not_is_said() -> None:
    node = compose(*words(Path("unused"), "objective/coupling=optimal"))
    with pytest.raises(Exception, match=r"objective\.coupling\.power is 3: it must be one of 1, 2"):
        config.check_train(changed(node, "objective.coupling.power=3"))


def test_two_processes_couple_as_one(tmp_path: Path) -> None:
    """The whole batch is one problem, whoever has which part of it."""
    more = ("objective/coupling=optimal", "trainer.steps=2", "dataset.labels=true")
    one = train(tmp_path, *more, name="one")
    assert together(tmp_path, *more) == [0, 0], said(tmp_path)
    equal(one, tmp_path / "run", 2)
