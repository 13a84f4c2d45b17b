"""Networks that read texts: padding says nothing, words do, and without texts each is the network that it was.

tests/test_models.py asks them for the promises of every network; `unet_text` and `mmdit` are told tokens there.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as nnf
from test_models import batch, make, stir
from torch import Tensor, nn

from diffusion_cli.errors import ConfigError
from diffusion_cli.exporting.diffusers_models import peer_of
from diffusion_cli.exporting.parts import network_of
from diffusion_cli.models.dit import positions
from diffusion_cli.models.network import Network
from diffusion_cli.models.texts import CrossAttention, TextEmbedding

D = 6  # width of a token
TINY = {
    "unet_text": {"width": 16, "multipliers": [1, 2], "attention_levels": [1], "head_width": 8, "groups": 4},
    "dit": {"width": 32, "depth": 2, "heads": 2},
    "transformer": {"width": 32, "depth": 2, "heads": 2},
    "mmdit": {"width": 32, "depth": 2, "heads": 2},
}
READING = ("reading", "text_embedding")  # parts of a name that only a network with texts has
every_network = pytest.mark.parametrize("option", TINY)


def tiny(option: str, classes: int = 0, **changes: int) -> Network:
    """For pictures of 8x8, fresh."""
    return make(option, 1, 8, classes, **{"text_width": D, **TINY[option], **changes})


def words(count: int = 3, length: int = 4) -> Tensor:
    """[B, L, D]: the first text fills all tokens, the second two, the third none."""
    tokens = torch.randn(count, length, D, generator=torch.Generator().manual_seed(5))
    tokens[1::3, 2:], tokens[2::3] = 0, 0
    return tokens


def trained(option: str, steps: int, **changes: int) -> Network:
    """After so many steps towards something random; under the optimizer's eps, weights whose gradient is 0 stay."""
    network = tiny(option, **changes)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    x, time = batch(1, 8, count=3)
    for _ in range(steps):
        optimizer.zero_grad()
        (network(x, time, words()) - x.flip(0)).square().mean().backward()
        optimizer.step()
    return network


# --- padding ----------------------------------------------------------------------------------------------------------


@every_network
def test_padding_says_nothing(option):
    """However much of it, and wherever it stands: also where a text is nothing else."""
    network, tokens = stir(tiny(option)).eval(), words()
    x, time = batch(1, 8, count=3)
    with torch.no_grad():
        expected = network(x, time, tokens)
        assert expected.isfinite().all()
        for more in (1, 3, 60):
            assert (network(x, time, nnf.pad(tokens, (0, 0, 0, more))) - expected).abs().max() < 2e-6
        assert (network(x, time, tokens[:, [2, 3, 1, 0]]) - expected).abs().max() < 2e-6
        assert (network(x[2:], time[2:], tokens[2:, :1]) - expected[2:]).abs().max() < 2e-6
        louder = torch.cat([tokens, 1e-3 * torch.ones(3, 1, D).cumsum(2)], dim=1)  # a token, small as it is, is one
        assert ((network(x, time, louder) - expected).abs().amax(dim=(1, 2, 3)) > 1e-4).all()


@every_network
def test_of_a_text_of_padding_no_weight_reads_anything(option, monkeypatch):
    """Also by the textbook's attention, where a softmax over nothing is no number; not every kernel of torch makes it 0."""

    def textbook(q, k, v, attn_mask=None):
        scores = q @ k.mT / q.shape[-1] ** 0.5  # [B, heads, N, M]
        return (scores if attn_mask is None else scores.masked_fill(~attn_mask, -torch.inf)).softmax(-1) @ v

    monkeypatch.setattr(nnf, "scaled_dot_product_attention", textbook)
    network = stir(tiny(option)).eval()
    x, time = batch(1, 8)
    empty = torch.zeros(2, 3, D)
    network(x, time, empty).square().sum().backward()
    silent = [name for name in network.state_dict() if name.endswith((".kv.weight", "pooled.weight", "tokens_in.weight"))]
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if name in silent:
            assert parameter.grad.abs().max() == 0, name
    assert len(silent) > 1


def test_attention_to_a_text_is_multi_head_attention():
    """torch's own module, given the same weights and told the padding by its mask."""
    reading, embedding = CrossAttention(16, 4, D), TextEmbedding(D, 8)
    tokens = words()[:2]
    text, pooled = embedding(tokens)
    theirs = nn.MultiheadAttention(16, 4, kdim=D, vdim=D, batch_first=True)
    k, v = reading.kv.weight.chunk(2)
    weights = {"q_proj_weight": reading.q.weight, "k_proj_weight": k, "v_proj_weight": v, "out_proj.weight": reading.out.weight}
    bias = torch.cat([reading.q.bias, torch.zeros(32)])
    theirs.load_state_dict({**weights, "in_proj_bias": bias, "out_proj.bias": reading.out.bias})
    normed = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        expected, _ = theirs(x, normed, normed, key_padding_mask=(tokens == 0).all(-1))
        assert (reading(x, text) - expected).abs().max() < 1e-6
        means = torch.stack([normed[0].mean(0), normed[1, :2].mean(0)])
        assert (pooled - embedding.pooled(means)).abs().max() < 1e-6


# --- reading ----------------------------------------------------------------------------------------------------------


@every_network
def test_words_matter_from_the_third_step_on(option):
    """All that writes starts at zero; then the answer depends on every token that is no padding."""
    x, time = batch(1, 8, count=3)
    for steps, matters in [(0, False), (3, True)]:
        tokens = words().requires_grad_()
        trained(option, steps)(x, time, tokens).square().sum().backward()
        assert tokens.grad is not None
        moved = tokens.grad.abs().sum(-1)[:2] > 0  # [2, L]
        assert moved[0].all() and moved[1, :2].all() if matters else not moved.any()


@every_network
def test_no_weight_is_dead(option):
    before, after = tiny(option).state_dict(), trained(option, 6).state_dict()
    for name, value in before.items():
        if name.endswith("attention.k.bias"):  # adds the same to all that a softmax compares
            continue
        assert (after[name] - value).abs().max() > 1e-4, f"{name} never learns"


@every_network
@pytest.mark.parametrize("setting", ["autocast", "compiled", "meta"])
def test_texts_elsewhere(option, setting):
    network = stir(tiny(option)).eval()
    x, time = batch(1, 8, count=3)
    with torch.no_grad():
        expected = network(x, time, words())
        if setting == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                found = network(x, time, words())
            assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
        if setting == "compiled":
            torch._dynamo.reset()
            traced = torch.compile(network, backend="eager", fullgraph=True)
            for length in (4, 9):
                assert (traced(x, time, nnf.pad(words(), (0, 0, 0, length - 4))) - expected).abs().max() < 1e-5
        if setting == "meta":
            with torch.device("meta"):
                bare = tiny(option)
                assert bare(x.to("meta"), time.to("meta"), words().to("meta")).shape == x.shape
            bare.load_state_dict(network.state_dict(), assign=True)  # nothing is kept that a checkpoint lacks
            assert torch.equal(bare.eval()(x, time, words()), expected)


@every_network
def test_two_texts_two_colours(option):
    """From noise alone, a few hundred steps teach a network to paint one flat colour or another as it is told."""
    network, tokens = tiny(option), words(2)
    colours = torch.tensor([0.8, -0.5])
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(6)
    for _ in range(100):
        which = torch.randint(0, 2, (16,), generator=generator)
        x = torch.randn(16, 1, 8, 8, generator=generator)
        loss = (network(x, torch.full((16,), 1000.0), tokens[which]) - colours[which, None, None, None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(8, 1, 8, 8, generator=generator)
    with torch.no_grad():
        painted = network(x, torch.full((8,), 1000.0), tokens[[0, 1] * 4])
    assert (painted - colours.repeat(4)[:, None, None, None]).abs().mean() < 0.15


# --- without texts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["unet_text", "dit"])
def test_a_network_without_texts_can_be_taught_to_read(option):
    """Its state dict has no name of what reads; its weights in a fresh network with texts compute what they computed."""
    plain, reader = stir(tiny(option, text_width=0)).eval(), tiny(option).eval()
    x, time = batch(1, 8, count=3)
    assert not any(part in name for name in plain.state_dict() for part in READING)
    missing, unexpected = reader.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and len(missing) >= 7 and all(any(part in name for part in READING) for name in missing)
    with torch.no_grad():
        assert (reader(x, time, words()) - plain(x, time)).abs().max() < 1e-6


@every_network
def test_a_reader_is_told_no_labels(option):
    """Of a data set with classes, too: its table would never be asked."""
    labelled, network = tiny(option, classes=4), tiny(option)
    assert labelled.told and labelled.num_classes == 0
    assert labelled.state_dict().keys() == network.state_dict().keys()


def test_mmdit_needs_texts():
    with pytest.raises(ValueError, match="MMDiT reads texts, and none were chosen: give an option of the group texts"):
        tiny("mmdit", text_width=0)


@every_network
def test_diffusers_has_no_such_network(option):
    with pytest.raises(ConfigError, match=r"to=diffusers: .* reads texts"):
        peer_of(tiny(option), {}, None)


@pytest.mark.parametrize("option", ["dit", pytest.param("mmdit", marks=pytest.mark.slow)])
def test_a_graph_takes_any_batch_of_texts_of_any_length(option):
    """As diffusion-export traces it; the U-Net's is in tests/test_export_texts.py."""
    network = stir(tiny(option)).eval()
    part = network_of(SimpleNamespace(denoiser=SimpleNamespace(network=network, null=torch.zeros(7, D))))
    graph = torch.export.export(part.module, part.arguments, dynamic_shapes=part.shapes).module()
    for count, length in ((1, 1), (3, 4), (2, 7)):
        given = (*batch(1, 8, count=count), words(count, length))
        with torch.no_grad():
            assert (graph(*given) - network(*given)).abs().max() < 1e-5


# --- the MM-DiT -------------------------------------------------------------------------------------------------------


def test_mmdit_is_the_papers_formula():
    network, tokens = stir(tiny("mmdit"), seed=3).eval(), words()[:2]
    x, time = batch(1, 8)

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def rms(part, h):
        return part.weight * h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def of(stream, h):
        k, v, *q = (part.unflatten(-1, (2, 16)) for part in stream.kvq(h).split(32, dim=-1))  # [B, N, heads, d]
        return rms(stream.norm_k, k), v, *(rms(stream.norm_q, one) for one in q)

    def modulated(stream, h):
        shift, scale, *rest = stream.modulation(c)[:, None].split(32, dim=-1)
        return of(stream, norm(h) * (1 + scale) + shift), rest

    def written(stream, h, read, rest):
        gate1, shift2, scale2, gate2 = rest
        h = h + gate1 * stream.out(read)
        return h + gate2 * stream.mlp(norm(h) * (1 + scale2) + shift2)

    normed = nnf.layer_norm(tokens, (D,))
    means = torch.stack([normed[0].mean(0), normed[1, :2].mean(0)])
    c = nnf.silu(network.time_embedding(time) + network.text_embedding.pooled(means))
    corners = [x[:, :, i : i + 4, j : j + 4].flatten(1) for i in (0, 4) for j in (0, 4)]
    h = network.patches_in(torch.stack(corners, dim=1)) + positions(2, 32, x.device)
    answers = []
    for row, real in ((0, 4), (1, 2)):  # each picture alone, with the tokens that it has and no padding
        c_all, c = c, c[row : row + 1]
        a, y = h[row : row + 1], network.tokens_in(normed[row : row + 1, :real])
        for block in network.blocks:
            (k_x, v_x, q_x), rest_x = modulated(block.picture, a)
            (k_y, v_y, *q_y), rest_y = modulated(block.text, y)
            k, v, q = torch.cat([k_x, k_y], 1), torch.cat([v_x, v_y], 1), torch.cat([q_x, *q_y], 1)
            weight = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 4).softmax(-1)
            read = torch.einsum("bhnm,bmhd->bnhd", weight, v).flatten(2)
            a = written(block.picture, a, read[:, :4], rest_x)
            y = written(block.text, y, read[:, 4:], rest_y) if q_y else y
        shift, scale = network.modulation_out(c)[:, None].chunk(2, dim=-1)
        p, q, r, s = network.patches_out(norm(a) * (1 + scale) + shift).unflatten(2, (1, 4, 4)).unbind(1)
        answers.append(torch.cat([torch.cat([p, q], dim=3), torch.cat([r, s], dim=3)], dim=2))
        c = c_all
    assert (network(x, time, tokens) - torch.cat(answers)).abs().max() < 1e-5


def test_the_text_of_the_last_block_is_read_only():
    first, last = tiny("mmdit").blocks
    assert {name for name, _ in last.text.named_children()} == {"norm", "kvq", "norm_k", "modulation"}
    assert last.text.kvq.out_features == 2 * 32 and first.text.kvq.out_features == 3 * 32
