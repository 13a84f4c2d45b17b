"""Terms of the loss are their formulas, reach the weights that they should, and are refused where they mean nothing."""

import math
from pathlib import Path

import pytest
import torch
from closed_form import close
from tiny import changed, compose, words
from torch import Tensor, nn

from diffusion_cli import config
from diffusion_cli.assembly import Facts, objective_of, rehearse
from diffusion_cli.data import Batch
from diffusion_cli.errors import ConfigError
from diffusion_cli.losses import MSE, Contrastive, Dispersive, Learned, Loss, MinSNR, One, Told, Uniform
from diffusion_cli.objectives import Denoising
from diffusion_cli.predictions import V, Velocity
from diffusion_cli.randomness import Source
from diffusion_cli.schedules import VP, Flow


def told(z: Tensor | None = None, count: int = 6) -> Told:
    source = Source(0, torch.arange(count))
    x0, noise, F = (source.normal(word, (2, 3, 3)) for word in ("x0", "noise", "F"))
    return Told(x0, noise, source.uniform("t"), source.uniform("correction"), F, [] if z is None else [z])


def loss(weight: nn.Module | None = None) -> Loss:
    return Loss(Uniform(), MSE(), weight or One()).eval()


def test_dispersive_is_the_log_of_the_mean_over_all_pairs() -> None:
    z = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    pairs = [math.exp(-float((a - b).square().mean()) / 0.3) for a in z for b in z]
    found = Dispersive("mid.0", 0.7, 0.3)(told(z), Velocity(Flow()), loss())
    assert found.shape == (6,)
    close(found.double(), torch.full((6,), 0.7 * math.log(sum(pairs) / 36), dtype=torch.float64), 1e-5)


def test_dispersive_drives_features_apart_and_ends_at_log_n() -> None:
    """Of equal features 0, of features far apart the 1 / n of each with itself; a step down moves them apart."""
    term = Dispersive("mid.0", 1.0, 0.5)
    same = term(told(torch.ones(4, 9), 4), Velocity(Flow()), loss())
    far = term(told(100 * torch.eye(4, 9), 4), Velocity(Flow()), loss())
    close(torch.stack([same[0], far[0]]), torch.tensor([0.0, -math.log(4)]), 1e-6)
    z = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    term(told(z, 4), Velocity(Flow()), loss()).mean().backward()
    assert z.grad is not None
    assert float(torch.pdist((z - 0.1 * z.grad).detach()).sum()) > float(torch.pdist(z.detach()).sum())


@pytest.mark.parametrize("weight", [One(), MinSNR()], ids=["one", "min_snr"])
@pytest.mark.parametrize("prediction", [Velocity(Flow()), V(VP())], ids=["flow", "v"])
def test_contrastive_is_the_loss_of_the_neighbour_turned_round(weight: nn.Module, prediction) -> None:
    one = told()
    found = Contrastive(0.2)(one, prediction, loss(weight))
    for i in range(6):
        j = i - 1
        other = prediction.target(one.x0[j : j + 1 or None], one.noise[j : j + 1 or None], one.t[i : i + 1])
        error = MSE()(one.F[i : i + 1], other)
        close(found[i : i + 1], -0.2 * one.correction[i] * weight(error, prediction, one.t[i : i + 1]), 1e-6)


def objective(*more: str) -> Denoising:
    node = config.check_train(compose(*words(Path("unused"), *more))).node
    facts = Facts(channels=1, image_size=8, classes=list("0123456789"), taught=[], fingerprint="")
    made = objective_of(node, facts)
    assert isinstance(made, Denoising)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("term", ["dispersive", "contrastive"])
def test_it_is_added_to_the_loss(term: str) -> None:
    """The loss with the term less the loss without it is the term; both its gradients reach the layer."""
    batch = Batch(torch.rand(8, 1, 8, 8) * 2 - 1, None, torch.arange(8))
    source = Source(0, torch.arange(8), 3)
    plain, more = objective(), objective(f"objective/term={term}")
    assert not plain.coupled and more.coupled
    (without, plainly), (with_, tallies) = plain.loss(batch, source), more.loss(batch, source)
    added = (with_ - without).detach()
    close(tallies["term"].sums / tallies["term"].counts, added.mean(), 1e-6)
    assert torch.equal(tallies["loss_by_noise"].sums, plainly["loss_by_noise"].sums), "told apart"
    assert float(added.max()) < 0
    if term == "dispersive":
        close(added, added[:1].expand(8), 1e-6)
    with_.mean().backward()
    without.mean().backward()
    one, two = (made.denoiser.network.conv_in.weight.grad for made in (plain, more))
    assert float((one - two).abs().max()) > 1e-5


def test_nothing_stays_in_the_network() -> None:
    made = objective("objective/term=dispersive")
    made.loss(Batch(torch.rand(4, 1, 8, 8), None, torch.arange(4)), Source(0, torch.arange(4)))
    assert not any(part._forward_hooks for part in made.modules())


def test_what_cannot_be_is_refused_before_any_data_is_read() -> None:
    node = config.check_train(compose(*words(Path("unused"), "objective/term=dispersive"))).node
    with pytest.raises(ConfigError, match=r"layer=mid\.9 is no part of UNet: it has .*mid\.0"):
        rehearse(changed(node, "objective.term.layer=mid.9"))
    with pytest.raises(ValueError, match="learned weight of noise levels grows without end"):
        Contrastive().check(objective().denoiser, loss(Learned()))
    with pytest.raises(RuntimeError, match="compile=false"):
        Dispersive("mid.0")(told(), Velocity(Flow()), loss())
