"""The critic beside an autoencoder: two players in one loss, each with its own gradient; and nothing of it is handed on."""

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_autoencoding import KINDS, KL, NOT_OF_THE_UNET, normal, objective, pictures, run
from tiny import compose, figures, hashes, stopped
from torch import Tensor
from torch.nn.functional import relu

from diffusion_cli import config
from diffusion_cli.alone import alone
from diffusion_cli.assembly import rehearse
from diffusion_cli.data import Batch
from diffusion_cli.data.pixels import to_float
from diffusion_cli.errors import ConfigError
from diffusion_cli.finding import find, load_codec
from diffusion_cli.losses import PatchCritic
from diffusion_cli.randomness import Source

CRITIC = ("objective/critic=patch", "objective.critic.width=8", "objective.critic.start=2")


def weights(run: Path, step: int, part: str, group: str = "weights") -> dict[str, Tensor]:
    tensors = safetensors.torch.load_file(run / "checkpoints" / f"step_{step:08d}" / f"{group}.safetensors")
    return {name: value for name, value in tensors.items() if name.startswith(f"{part}.")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one and one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@KINDS
def test_one_loss_is_two_optimizers(words: tuple[str, ...]) -> None:
    """Against the textbook: a backward and an optimizer for each player, lambda by hand; one step of AdamW, too.

    Its eps is above the rounding of the gradients that are 0 (a bias in front of a softmax).
    """
    ours = objective(*words, *CRITIC, "objective.critic.start=0", "objective.critic.weight=0.7").eval()
    theirs = copy.deepcopy(ours)
    x, source = to_float(pictures(6).images), Source(0, torch.arange(6))
    one = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-3, eps=1e-5)
    loss, tallies = ours.loss(Batch(x, None, torch.arange(6)), source)
    loss.mean().backward()

    network, critic = theirs.autoencoder.network, theirs.critic
    passed = network(x, source.normal("latents", (3, 4, 4)))
    error = (passed.y - x).abs().mean()
    critic.requires_grad_(False)
    g = -critic(passed.y).mean()
    last = network.peer.decoder.conv_out.weight
    lengths = [torch.autograd.grad(part, last, retain_graph=True)[0].square().sum().sqrt() for part in (error, g)]
    balance = lengths[0] / (lengths[1] + 1e-6)
    (error + passed.penalty.mean() + 0.7 * balance * g).backward()
    critic.requires_grad_(True)
    (0.5 * (relu(1 - critic(x)).mean() + relu(1 + critic(passed.y.detach())).mean())).backward()
    two = [
        torch.optim.AdamW([p for p in player.parameters() if p.requires_grad], lr=1e-3, eps=1e-5)
        for player in (network, critic)
    ]

    assert float(tallies["balance"].sums) == pytest.approx(float(balance), rel=1e-4) and 0 < float(balance) < 1e4
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and mine[name].grad is not None, name
            assert (mine[name].grad - parameter.grad).abs().max() < 1e-6, name
    assert all(p.grad.abs().sum() > 0 for p in ours.critic.parameters() if p.ndim == 4)
    wanted = error + passed.penalty.mean()
    assert float(loss.detach().mean()) == pytest.approx(float(wanted.detach()), abs=1e-6), (
        "what is told is the error and the penalty"
    )
    for optimizer in (one, *two):
        optimizer.step()
    for name, parameter in theirs.named_parameters():
        assert (mine[name] - parameter).abs().max() < 1e-5, name


def test_each_player_moves_as_it_wants() -> None:
    """A step against the gradient makes the critic's answers part, and those about reconstructions rise."""
    made = objective(*KL, *CRITIC, "objective.critic.start=0", "objective.critic.weight=50", "loss/norm@objective.norm=mse")
    x, source = to_float(pictures(6).images), Source(0, torch.arange(6))
    ask = lambda: {n: float(t.sums) for n, t in made.loss(Batch(x, None, torch.arange(6)), source)[1].items()}  # noqa: E731
    for player, figure in ((made.critic, "critic"), (made.autoencoder, "adversarial")):
        before = ask()[figure]
        optimizer = torch.optim.SGD(player.parameters(), lr=1e-4)
        made.zero_grad()
        made.loss(Batch(x, None, torch.arange(6)), source)[0].mean().backward()
        optimizer.step()
        assert ask()[figure] < before, figure


def test_it_enters_at_its_step_and_resumes_to_the_bit(tmp_path: Path) -> None:
    base = (*KL, *CRITIC, "trainer.steps=6", "trainer.keep=9", "ema=half_life", "optimizer.clip=1")
    whole = run(tmp_path / "whole", *base)
    before, at, after = (weights(whole, step, "critic") for step in (2, 4, 6))
    assert not same(before, at) and not same(at, after)
    plain = run(tmp_path / "plain", *KL, "trainer.steps=6", "trainer.keep=9", "optimizer.clip=1")
    assert same(weights(whole, 2, "autoencoder"), weights(plain, 2, "autoencoder")), "until then nothing is different"
    assert not same(weights(whole, 6, "autoencoder"), weights(plain, 6, "autoencoder"))
    rows = figures(whole)
    assert ["train/balance" in row for row in rows if "train/loss" in row] == [False, False, True, True, True, True]
    fresh = weights(run(tmp_path / "waits", *base, "objective.critic.start=99"), 6, "critic")
    assert same(fresh, before), "before its start a critic is as it was made"
    stopped(tmp_path / "parts", 3, *NOT_OF_THE_UNET, *base)
    assert hashes(run(tmp_path / "parts", *base)) == hashes(whole)


def test_a_weight_of_zero_is_no_critic(tmp_path: Path) -> None:
    off = run(tmp_path / "off", *KL, *CRITIC, "objective.critic.start=0", "objective.critic.weight=0", "trainer.keep=9")
    plain = run(tmp_path / "plain", *KL)
    assert same(weights(off, 2, "critic"), weights(off, 4, "critic"))
    for group in ("weights", "average"):
        assert same(weights(off, 4, "autoencoder", group), weights(plain, 4, "autoencoder", group))


def test_nothing_of_it_is_handed_on(tmp_path: Path) -> None:
    found = find(run(tmp_path, *KL, *CRITIC))
    assert any(name.startswith("critic.") for name in found.tensors("average"))
    kept = safetensors.torch.load(alone(found, "autoencoder", "ema")["average.safetensors"])
    assert kept and all(name.startswith("autoencoder.") for name in kept)
    assert not any("critic" in name for name in load_codec(found, "ema").state_dict())
    begun = run(tmp_path / "begun", *KL, *CRITIC, f"init={found.run}", "trainer.steps=2")
    assert not same(weights(found.run, 2, "critic"), weights(found.run, 4, "critic"))
    assert same(weights(begun, 2, "critic"), weights(found.run, 2, "critic")), "a run that begins from it makes its own"


@pytest.mark.parametrize(("size", "layers", "map_size"), [(8, None, 2), (32, None, 2), (64, None, 6), (256, 3, 30), (6, 1, 1)])
def test_patches(size: int, layers: int | None, map_size: int) -> None:
    """256 pixels and 3 layers are the 70 x 70 discriminator of Isola et al. 2017: 30 x 30 answers."""
    critic = PatchCritic(width=4, layers=layers).make(3, size)
    assert critic(normal(2, 3, size, size)).shape == (2, 1, map_size, map_size)
    if size == 256:
        x = normal(1, 3, size, size).requires_grad_()
        torch.nn.Sequential(*(p for p in critic.parts if not isinstance(p, torch.nn.GroupNorm)))(x)[0, 0, 15, 15].backward()
        seen = x.grad[0].abs().sum(0) > 0
        assert int(seen.any(0).sum()) == int(seen.any(1).sum()) == 70


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ConfigError, match="adapter=lora and objective/critic"):
        config.check_train(compose(*KL, *CRITIC, "adapter=lora"))
    with pytest.raises(ConfigError, match=r"objective: critic\.layers is 2 and image_size 8: it must be at most 1"):
        rehearse(config.check_train(compose(*KL, *CRITIC, "objective.critic.layers=2")).node)
    with pytest.raises(ConfigError, match=r"objective\.critic\.weight is -1"):
        config.check_train(compose(*KL, "objective/critic=patch", "objective.critic.weight=-1"))
    with pytest.raises(ValueError, match="6 pixels at least"):
        PatchCritic().make(1, 4)
