"""Every draw is a function of (seed, stream, step, slot, element), and of nothing else."""

import hashlib
import math

import pytest
import torch
from closed_form import close, distance_from_uniform
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_cli import randomness
from diffusion_cli.randomness import Source, permutation, visited, word_of

MASK, GAMMA = 2**64 - 1, 0x9E3779B97F4A7C15


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator (Steele, Lea and Flood 2014), as a walk of its state, in Python's whole numbers."""
    out = []
    for _ in range(count):
        state = (state + GAMMA) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


def words(seed: int, stream: str, step: int, slot: int, count: int) -> list[int]:
    """What a Source should draw: SplitMix64 seeded by output number slot - 1 of SplitMix64 seeded by (seed, stream, step)."""
    digest = hashlib.blake2b(f"{seed}\x1f{stream}\x1f{step}".encode(), digest_size=8).digest()
    base = (int.from_bytes(digest, "little") >> 1) << 1
    key = splitmix64((base + (slot - 1) * GAMMA) & MASK, 1)[0]
    return splitmix64(key, count)


def source(slots: int = 64, seed: int = 3, step: int = 5) -> Source:
    return Source(seed, torch.arange(slots), step)


def test_the_reference_itself_gives_the_published_numbers():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert splitmix64(1234567, 5) == published


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**63), step=st.integers(0, 2**40), slot=st.integers(0, 2**62), stream=st.text(max_size=5))
def test_words_are_splitmix64(seed, step, slot, stream):
    drawn = Source(seed, torch.tensor([slot]), step)._words(stream, 9)[0].tolist()
    assert [w & MASK for w in drawn] == words(seed, stream, step, slot, 9)


def test_uniform_and_normal_are_the_stated_functions_of_the_words():
    one = Source(3, torch.tensor([11]), 5)
    w = words(3, "a", 5, 11, 4)
    close(one.uniform("a", (4,))[0], torch.tensor([((x >> 41) + 0.5) * 2.0**-23 for x in w]), 0)
    radius = [math.sqrt(-2 * math.log(((x >> 32) + 0.5) / 2**32)) for x in w]
    angle = [2 * math.pi * (x & 0xFFFFFFFF) / 2**32 for x in w]
    pairs = [v for r, a in zip(radius, angle) for v in (r * math.cos(a), r * math.sin(a))]
    close(one.normal("a", (7,))[0], torch.tensor(pairs[:7]), 5e-6)  # float32 against float64


@pytest.mark.parametrize("draw", ["uniform", "normal"])
def test_a_slot_draws_the_same_alone_and_in_any_batch(draw):
    whole = getattr(source(33), draw)("noise", (3, 5))
    assert whole.shape == (33, 3, 5) and whole.dtype == torch.float32
    for i in (0, 1, 17, 32):
        assert torch.equal(getattr(Source(3, torch.tensor([i]), 5), draw)("noise", (3, 5))[0], whole[i])
    shuffled = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    assert torch.equal(getattr(Source(3, shuffled, 5), draw)("noise", (3, 5)), whole[shuffled])


@pytest.mark.parametrize("draw", ["uniform", "normal"])
def test_draws_differ_by_seed_stream_step_and_slot(draw):
    def drawn(seed=0, stream="a", step=0, first=0):
        return getattr(Source(seed, torch.arange(first, first + 100), step), draw)(stream, (100,)).flatten().double()

    base = drawn()
    for other in (drawn(seed=1), drawn(stream="b"), drawn(step=1), drawn(first=100)):
        assert (base == other).float().mean() < 1e-3
        assert abs(torch.corrcoef(torch.stack([base, other]))[0, 1]) < 5 / math.sqrt(len(base))


def test_at_changes_the_step_alone():
    assert torch.equal(source().at(9).uniform("a"), Source(3, torch.arange(64), 9).uniform("a"))


def test_parts_of_a_key_are_not_run_together():
    assert len({word_of(1, "1", 2), word_of(11, "", 2), word_of(1, "12", ""), word_of(112)}) == 4
    assert 0 <= word_of("anything") < 2**63


def test_uniform_is_uniform():
    u = source(400).uniform("u", (500,))
    assert distance_from_uniform(u) < 1.95 / math.sqrt(u.numel())
    assert distance_from_uniform(source(200_000).uniform("u")) < 1.95 / math.sqrt(200_000)  # over slots too


@pytest.mark.parametrize("slots, shape", [(400, (500,)), (200_000, ()), (66_667, (3,))])
def test_normal_is_standard_normal(slots, shape):
    z = source(slots).normal("z", shape).double().flatten()
    n = len(z)
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(float((z**power).mean()) - moment) < 4.5 * math.sqrt(variance / n)
    assert distance_from_uniform(torch.special.ndtr(z)) < 1.95 / math.sqrt(n)


def test_the_two_numbers_of_a_pair_are_independent():
    z = source(50_000).normal("z", (2,)).double().T
    for a, b in [(z[0], z[1]), (z[0] ** 2, z[1] ** 2)]:
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4.5 / math.sqrt(50_000)


def test_the_extreme_words_stay_inside_the_open_interval_and_finite(monkeypatch):
    extreme = torch.tensor([[0, -1, 2**63 - 1, -(2**63), 0xFFFFFFFF, -(2**32)]])
    monkeypatch.setattr(randomness.Source, "_words", lambda self, stream, count: extreme[:, :count])
    u, z = source(1).uniform("u", (6,)), source(1).normal("z", (12,))
    assert u.min() > 0 and u.max() < 1
    assert z.isfinite().all() and z.abs().max() < 6.8


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), first=st.integers(0, 200), count=st.integers(1, 100))
def test_visiting_resumes_at_any_place_and_crosses_epochs(size, first, count):
    assert torch.equal(visited(7, first, count, size), visited(7, 0, first + count, size)[first:])


@pytest.mark.parametrize("size", [1, 2, 17, 100])
def test_every_epoch_visits_every_picture_once(size):
    order = visited(0, 0, 4 * size, size).view(4, size)
    assert torch.equal(order.sort(1).values, torch.arange(size).expand(4, size))


def test_the_order_differs_by_epoch_and_by_seed():
    assert not torch.equal(permutation(0, 0, 100), permutation(0, 1, 100))
    assert not torch.equal(permutation(0, 0, 100), permutation(1, 0, 100))
