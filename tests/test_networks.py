"""Networks of papers, each against its formulas: NCSN++, EDM2, U-ViT, a modern transformer. What all networks promise is in
tests/test_models.py, whole NCSN++ in tests/test_convert.py."""

import copy

import pytest
import torch
from test_models import NULL, SMALLER, batch, make, node, parameters, stir
from torch import nn

from diffusion_cli import models
from diffusion_cli.assembly import denoiser_of
from diffusion_cli.ema import update
from diffusion_cli.errors import ConfigError
from diffusion_cli.models import magnitudes
from diffusion_cli.models.magnitudes import Kept, Table, Weights
from diffusion_cli.models.resampling import doubled, halved
from diffusion_cli.models.transformer import angles, turned
from diffusion_cli.vision import mend_torchvision

silu = nn.functional.silu


def whole(option: str, channels: int, size: int, classes: int, **changes) -> int:
    """Parameters of an option at its full size."""
    keys = {**node(option), **changes}
    with torch.device("meta"):
        return parameters(getattr(models, keys.pop("_target_").rpartition(".")[2])(channels, size, classes, **keys))


# --- NCSN++ -----------------------------------------------------------------------------------------------------------


def test_filtered_sizes_are_those_of_diffusers():
    mend_torchvision()
    pytest.importorskip("diffusers")
    from diffusers.models.downsampling import downsample_2d
    from diffusers.models.upsampling import upsample_2d

    x = torch.randn(2, 5, 8, 12)
    assert (halved(x, "fir") - downsample_2d(x, (1, 3, 3, 1))).abs().max() < 1e-6
    assert (doubled(x, "fir") - upsample_2d(x, (1, 3, 3, 1))).abs().max() < 1e-6
    one = torch.ones(1, 1, 8, 8)
    assert (doubled(one, "fir")[..., 1:-1, 1:-1] == 1).all() and (halved(one, "fir")[..., 1:-1, 1:-1] == 1).all()


def test_waves_are_random_once_and_for_good():
    network = make("ncsnpp", 3, 32)
    assert network.waves.frequencies.std() == pytest.approx(16, rel=0.3) and "waves.frequencies" in network.state_dict()
    time = torch.tensor([0.25, -1.0])
    angle = 2 * torch.pi * time[:, None] * network.waves.frequencies
    assert (network.waves(time) - torch.cat([angle.cos(), angle.sin()], dim=1)).abs().max() < 1e-5
    assert not list(network.waves.parameters())


@pytest.mark.parametrize(("option", "prediction", "fits"), [("ncsnpp", "Velocity", 0), ("ncsnpp", "Preconditioned", 1)])
def test_random_waves_are_not_told_thousands(option, prediction, fits):
    """Of a time from 0 to 1000 they would be noise: one line says which prediction goes with such a network."""
    keys = {**node(option), **SMALLER[option]}
    facts = {"channels": 3, "image_size": 32, "classes": [], "taught": []}
    nodes = {"schedule": {"_target_": "diffusion_cli.schedules.Flow"}, "model": keys, "objective": {}}
    nodes["prediction"] = {"_target_": f"diffusion_cli.predictions.{prediction}"}
    if fits:
        assert denoiser_of(nodes, facts).network.bandwidth == keys["bandwidth"]
        return
    with pytest.raises(ConfigError, match=r"bandwidth is 16 and .* from 1 to 1000: choose prediction=edm.*=0.005"):
        denoiser_of(nodes, facts)
    keys["bandwidth"] = 0.005
    assert denoiser_of(nodes, facts).network.bandwidth == 0.005


# --- EDM2 -------------------------------------------------------------------------------------------------------------


def test_edm2_is_as_large_as_its_paper_says():
    """Karras et al. 2024, table 2, of 4-channel latents of 64x64 and 1000 classes, in millions: XS to XL."""
    sizes = [whole("edm2", 4, 64, 1000, width=width) for width in (128, 192, 256, 320, 384)]
    assert [round(size / 1e6) for size in sizes] == [125, 280, 498, 777, 1119]
    assert 1.6e6 < whole("edm2_small", 3, 32, 0) < 1.8e6


def test_magnitudes_are_kept():
    torch.manual_seed(0)
    a, b = torch.randn(4, 200, 32, 32), torch.randn(4, 50, 32, 32)

    def size(x):
        return x.square().mean().item()

    assert size(magnitudes.silu(a)) == pytest.approx(1, abs=0.01)
    assert size(magnitudes.mixed(a, a.flip(0), 0.3)) == pytest.approx(1, abs=0.01)
    both = magnitudes.joined(a, b)
    assert size(both) == pytest.approx(1, abs=0.01)
    assert size(both[:, :200]) * 200 == pytest.approx(size(both[:, 200:]) * 50, rel=0.02)  # t = 1/2: either gives half
    assert (magnitudes.unit(7 * a, 1).square().mean(1) - 1).abs().max() < 1e-3
    for layer in (Weights(200, 300), Weights(200, 300, 1), Weights(200, 300, 3)):
        x = a if layer.weight.ndim == 4 else a.movedim(1, -1)
        assert size(layer(x)) == pytest.approx(1, abs=0.05)
    assert size(Table(10, 500)(torch.arange(10))) == pytest.approx(1, abs=0.01)
    assert size(magnitudes.Waves(500, 1.0)(torch.linspace(-2, 2, 100))) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("option", ["edm2", "edm2_small"])
def test_every_block_of_edm2_keeps_unit_variance(option):
    """At initialisation, of a picture of unit variance, through 27 blocks and 36. What attention averages is a little less."""
    network, sizes = make(option, 3, 32, NULL, blocks=3, width=64), []
    for block in [*network.down, *network.mid, *network.up]:
        block.register_forward_hook(lambda block, inputs, output: sizes.append(output.square().mean().item()))
    network(torch.randn(4, 3, 32, 32), torch.randn(4), torch.tensor([0, 1, 2, NULL]))
    assert len(sizes) > 20 and all(0.65 < size < 1.2 for size in sizes), sizes


def test_weights_keep_their_length_while_they_train():
    network = stir(make("edm2_small", 1, 8, NULL))
    x, time = batch(1, 8)
    layers = [part for part in network.modules() if isinstance(part, Kept)]
    assert network.class_embedding in layers

    def strange():
        return max((layer.weight.square().mean(layer.dims) - 1).abs().max().item() for layer in layers)

    with torch.no_grad():
        for layer in layers:
            layer.weight *= 3
        longer = copy.deepcopy(network)
        answer = network(x, time)
    assert strange() > 5, "only a pass with gradients puts them back"
    network.eval()(x, time)
    for mine, other in zip(network.parameters(), longer.parameters(), strict=True):
        assert torch.equal(mine, other), "only in training"
    assert (network.train()(x, time) - answer).abs().max() < 1e-3 * answer.abs().max() and strange() < 1e-3

    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    shadow = copy.deepcopy(network).eval().requires_grad_(False)
    for _ in range(3):
        F, again = network(x, time), network(x, time)  # two passes before the gradients of either
        (F + again).square().sum().backward()
        for layer in layers:
            along = (layer.weight * layer.weight.grad).sum(layer.dims).abs()
            assert (along < 1e-2 * torch.linalg.vector_norm(layer.weight.grad, dim=layer.dims) + 1e-4).all(), "none along it"
        optimizer.step()
        optimizer.zero_grad()
        update(shadow, network, 0.5)
    assert strange() > 1e-4
    network(x, time)
    assert strange() < 1e-3
    assert (shadow(x, time) - network(x, time)).abs().max() > 1e-4 and shadow(x, time).isfinite().all()


@pytest.mark.slow
def test_weights_keep_their_length_in_a_compiled_step():
    network = stir(make("edm2", 1, 8, NULL, multipliers=[1], attention_levels=[]))
    x, time = batch(1, 8)
    with torch.no_grad():
        network.conv_in.weight *= 3
    answer = network.eval()(x, time).detach()
    torch._dynamo.reset()
    compiled = torch.compile(network.train(), backend="aot_eager", fullgraph=True)
    F = compiled(x, time)
    F.sum().backward()
    assert (F - answer).abs().max() < 1e-3 * answer.abs().max() and network.gain_out.grad.abs() > 1e-3
    assert (network.conv_in.weight.square().mean((1, 2, 3)) - 1).abs().max() < 1e-3


def test_an_edm2_block_is_the_papers_formula():
    network = stir(make("edm2", 3, 32), seed=3).eval()
    encoder, decoder = network.down[5], network.up[-2]  # one of attention at 8 pixels, one that joins
    while not (encoder.attention is not network.down[0].attention and hasattr(encoder.attention, "qkv")):
        encoder = network.down[list(network.down).index(encoder) + 1]
    conv2d = nn.functional.conv2d

    def w(layer, gain=1.0):
        return gain * layer.weight / layer.weight.flatten(1).norm(dim=1).view(-1, *[1] * (layer.weight.ndim - 1))

    def unit(h, dim):
        return h / h.square().mean(dim, keepdim=True).sqrt()

    def branch(block, h, emb):
        y = conv2d(silu(h) / 0.596, w(block.conv1), padding=1) * (1 + emb @ w(block.emb, block.gain).T)[:, :, None, None]
        return conv2d(silu(y) / 0.596, w(block.conv2), padding=1)

    def mixed(h, y):
        return (0.7 * h + 0.3 * y) / (0.49 + 0.09) ** 0.5

    emb = torch.randn(2, encoder.emb.weight.shape[1])
    for block in (encoder, decoder):
        c_in = block.shortcut.weight.shape[1] if isinstance(block.shortcut, Weights) else block.conv1.weight.shape[1]
        x = torch.randn(2, c_in, 4, 4)
        h = conv2d(x, w(block.shortcut)) if isinstance(block.shortcut, Weights) else x
        h = mixed(unit(h, 1), branch(block, unit(h, 1), emb)) if block.encoder else mixed(h, branch(block, x, emb))
        if block is encoder:
            tokens = h.flatten(2).transpose(1, 2)
            q, k, v = unit((tokens @ w(block.attention.qkv).T).unflatten(2, (3, -1, 16)), 4).unbind(2)  # [B, N, heads, d]
            weight = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 4).softmax(-1)
            read = torch.einsum("bhnm,bmhd->bnhd", weight, v).flatten(2) @ w(block.attention.out).T
            h = mixed(h, read.transpose(1, 2).view_as(h))
        with torch.no_grad():
            assert (block(x, emb) - h).abs().max() < 2e-3  # epsilons
            assert h.std() > 0.3


# --- U-ViT ------------------------------------------------------------------------------------------------------------


def test_uvit_is_as_large_as_its_paper_says():
    """Bao et al. 2023, table 1: U-ViT-S/2 has 44 million, here counted from its formula: D = 512, 13 blocks, 6 long skips."""
    D, block = 512, 3 * 512**2 + 512 * 513 + 512 * 2048 + 2048 + 2048 * 512 + 512 + 4 * 512
    ends = 12 * D + D + (256 + 1) * D + 2 * D + 12 * D + 12 + 3 * 3 * 9 + 3
    assert whole("uvit", 3, 32, 0) == 13 * block + 6 * (2 * D * D + D) + ends
    assert round(whole("uvit", 3, 32, 0) / 1e6) == 44
    assert whole("uvit", 3, 32, 10) - whole("uvit", 3, 32, 0) == 12 * D  # ten labels, the null one, a place


def test_uvit_is_the_papers_formula():
    network = stir(make("uvit", 1, 8, NULL, patch_size=4, depth=3), seed=3).eval()
    x, time = batch(1, 8)
    labels = torch.tensor([1, NULL])
    norm = nn.functional.layer_norm

    def run(block, h):
        q, k, v = (
            part.unflatten(2, (2, 16)) for part in block.qkv(norm(h, (32,), block.norm1.weight, block.norm1.bias)).chunk(3, -1)
        )
        weight = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 4).softmax(-1)
        h = h + block.out(torch.einsum("bhnm,bmhd->bnhd", weight, v).flatten(2))
        linear1, linear2 = block.mlp[0], block.mlp[3]
        return h + linear2(nn.functional.gelu(linear1(norm(h, (32,), block.norm2.weight, block.norm2.bias))))

    angle = time[:, None] * 10000 ** (-torch.arange(16) / 16)
    corners = [x[:, :, i : i + 4, j : j + 4].flatten(1) for i in (0, 4) for j in (0, 4)]
    tokens = [torch.cat([angle.cos(), angle.sin()], 1), network.class_embedding.weight[labels]]
    h = torch.stack([*tokens, *map(network.patches_in, corners)], 1) + network.places
    first = run(network.down[0], h)
    h = run(network.up[0], network.up[0].long(torch.cat([run(network.mid, first), first], 2)))
    a, b, c, d = network.patches_out(network.norm_out(h))[:, 2:].unflatten(2, (1, 4, 4)).unbind(1)
    expected = network.conv_out(torch.cat([torch.cat([a, b], dim=3), torch.cat([c, d], dim=3)], dim=2))
    with torch.no_grad():
        assert (network(x, time, labels) - expected).abs().max() < 1e-5 and expected.std() > 0.01


def test_uvit_refuses_an_even_depth():
    with pytest.raises(ValueError, match="depth is 4: choose an odd one"):
        make("uvit", 3, 32, depth=4)


# --- the modern transformer -------------------------------------------------------------------------------------------


def test_the_transformer_is_as_large_as_its_paper_says():
    """Li and He 2025, table of sizes, at 256 pixels, patches of 16 and 1000 classes: JiT-B 131M, L 459M, H 953M. Their
    fixed positions are counted."""
    sizes = {(768, 12, 12, 128): 131, (1024, 24, 16, 128): 459, (1280, 32, 16, 256): 953}
    for (width, depth, heads, bottleneck), millions in sizes.items():
        keys = {"patch_size": 16, "width": width, "depth": depth, "heads": heads, "bottleneck": bottleneck}
        keys |= {"class_tokens": 32, "class_start": 4}
        assert round((whole("transformer", 3, 256, 1000, **keys) + 256 * width) / 1e6) == millions
    assert 1.8e6 < whole("transformer_small", 1, 28, 0) < 1.9e6 and 32e6 < whole("transformer", 3, 32, 0) < 33e6


def test_turning_says_how_far_and_not_where():
    q, k, angle = torch.randn(16), torch.randn(16), angles(6, 16, torch.device("cpu"))
    at = lambda h, row, column: turned(h, angle[6 * row + column])  # noqa: E731
    here = at(q, 2, 1) @ at(k, 3, 3)
    assert (here - at(q, 0, 2) @ at(k, 1, 4)).abs() < 1e-4  # as far: one down, two to the right
    for row, column in [(2, 3), (3, 2), (4, 3), (3, 4)]:
        assert (here - at(q, 2, 1) @ at(k, row, column)).abs() > 1e-3
    assert (at(q, 5, 5).norm() - q.norm()).abs() < 1e-5


@pytest.mark.parametrize("tokens", [0, 3])
def test_the_transformer_is_the_papers_formula(tokens):
    keys = {"bottleneck": 6, "class_tokens": tokens, "class_start": 1}
    network = stir(make("transformer", 1, 8, NULL, **keys), seed=3).eval()  # width 32, 2 heads of 16, 2 blocks
    x, time = batch(1, 8)
    labels = torch.tensor([1, NULL])

    def norm(h, gain=1.0):
        return gain * h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    places = [(row, column) for row in (0, 1) for column in (0, 1)]
    turns = torch.tensor([[axis * 10000 ** (-i / 4) for axis in place for i in range(4)] for place in places])  # [N, 8]

    def turn(h):  # the patches, which are the last four, as complex numbers [B, N, heads, 8]
        z = torch.complex(h[:, -4:, :, :8], h[:, -4:, :, 8:]) * torch.polar(torch.ones(4, 8), turns)[:, None]
        return torch.cat([h[:, :-4], torch.cat([z.real, z.imag], -1)], 1)

    def attend(part, h):
        q, k, v = (one.unflatten(-1, (2, 16)) for one in part.qkv(h).chunk(3, dim=-1))  # [B, N, heads, d]
        q, k = turn(norm(q, part.norm_q.weight)), turn(norm(k, part.norm_k.weight))
        weight = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 4).softmax(-1)
        return part.out(torch.einsum("bhnm,bmhd->bnhd", weight, v).flatten(2))

    def gated(part, h):
        a, b = part.linear1(h).chunk(2, -1)
        return part.linear2(silu(a) * b)

    c = silu(network.time_embedding(time) + network.class_embedding.weight[labels])
    patches = torch.stack([x[:, :, i : i + 4, j : j + 4].flatten(1) for i in (0, 4) for j in (0, 4)], dim=1)
    place = models.dit.positions(2, 32, x.device)
    h = network.patches_in[1](patches @ network.patches_in[0].weight.T) + place
    for k, block in enumerate(network.blocks):
        if tokens and k == 1:
            h = torch.cat([network.class_embedding.weight[labels][:, None] + network.class_places, h], 1)
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)[:, None].chunk(6, dim=-1)
        h = h + gate1 * attend(block.attention, norm(h, block.norm1.weight) * (1 + scale1) + shift1)
        h = h + gate2 * gated(block.mlp, norm(h, block.norm2.weight) * (1 + scale2) + shift2)
    shift, scale = network.modulation_out(c)[:, None].chunk(2, dim=-1)
    h = norm(h[:, -4:], network.norm_out.weight) * (1 + scale) + shift
    a, b, c, d = network.patches_out(h).unflatten(2, (1, 4, 4)).unbind(1)
    expected = torch.cat([torch.cat([a, b], dim=3), torch.cat([c, d], dim=3)], dim=2)
    with torch.no_grad():
        assert (network(x, time, labels) - expected).abs().max() < 1e-5 and expected.std() > 0.01


def test_the_transformer_refuses_heads_that_cannot_be_placed():
    with pytest.raises(ValueError, match="heads is 16: places in two dimensions"):
        make("transformer", 3, 32, heads=16)


def test_tokens_that_nothing_reads_are_refused():
    with pytest.raises(ValueError, match=r"class_tokens is 4, and no block would read them: give dataset\.labels=true"):
        make("transformer", 3, 32, class_tokens=4)
    with pytest.raises(ValueError, match="choose a class_start below 2, or class_tokens=0"):
        make("transformer", 3, 32, 5, class_tokens=4, class_start=2)
