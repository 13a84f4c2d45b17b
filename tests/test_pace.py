"""A batch that doubles: every picture of the sequence once, whatever the batch; a doubled one is so many parts of the first."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import distance, weights
from tiny import figures, hashes, train

from diffusion_cli import checkpoint
from diffusion_cli.data import Batches, Pictures
from diffusion_cli.errors import ConfigError
from diffusion_cli.optimizers import AdamW, InverseSqrt
from diffusion_cli.pace import Pace

PACES = st.builds(
    lambda batch, images: Pace(batch, tuple(sorted(images))), st.integers(1, 9), st.sets(st.integers(1, 90), max_size=4)
)


def counted(pace: Pace, steps: int) -> list[int]:
    """The batch of each step, by counting."""
    sizes: list[int] = []
    for _ in range(steps):
        sizes.append(pace.batch * 2 ** sum(sum(sizes) >= images for images in pace.doublings))
    return sizes


@given(PACES)
def test_it_counts(pace: Pace) -> None:
    sizes = counted(pace, 60)
    for step, size in enumerate(sizes):
        assert (pace.size(step), pace.times(step), pace.seen(step)) == (size, size // pace.batch, sum(sizes[:step]))
    for images in range(min(sum(sizes), 99)):
        assert pace.steps(images) == next(step for step in range(61) if sum(sizes[:step]) >= images)


@given(PACES, st.integers(1, 2))
def test_every_picture_has_its_turn(pace: Pace, world: int) -> None:
    """Over all processes the endless sequence of epochs, of which each is every picture once."""
    pictures, pace = Pictures(torch.zeros(7, 1, 2, 2, dtype=torch.uint8)), Pace(pace.batch * world, pace.doublings)
    found, ranks = [], [Batches(pictures, pace, 0, rank=rank, world=world).starting_at(0) for rank in range(world)]
    for step in range(12):
        batches = [next(rank) for rank in ranks]
        assert [len(batch.ids) for batch in batches] == [pace.size(step) // world] * world
        found += [number for batch in batches for number in batch.ids.tolist()]
    epochs = [found[k : k + 7] for k in range(0, len(found) - 6, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)


def test_what_goes_by_pictures_goes_by_those() -> None:
    pace = Pace(10, (100,))
    rule = AdamW(1.0, (0.9, 0.99), 1e-8, 0.0, 0, None, InverseSqrt(300), warmup_images=200)
    rates = [rule.rate(step, 100, pace) for step in range(40)]
    assert rates[9:14] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert rates[14:20] == pytest.approx([1.0] * 6) and rates[30] == pytest.approx((300 / 500) ** 0.5)


def test_a_run_doubles_and_says_so(tmp_path: Path) -> None:
    words = ("trainer.batch_doublings=[16,40]", "trainer.steps=null", "trainer.images=90", "dataset.flip=true")
    run = train(tmp_path, *words)
    said = [line for line in figures(run) if "train/batch" in line]
    assert [line["train/batch"] for line in said] == [8, 8, 16, 16, 32, 32]
    assert [line["train/images"] for line in said] == [8, 16, 32, 48, 80, 112]
    assert checkpoint.load(checkpoint.folders(run / "checkpoints")[0]).state["images"] == 112


def test_its_parts_are_as_large_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the mean over them is that of the whole batch, worked off at once."""
    words, seen = ("trainer.batch_doublings=[8]", "dataset.flip=true", "dataset.labels=true"), set[int]()
    from diffusion_cli.objectives.denoising import Denoising

    loss = Denoising.loss
    monkeypatch.setattr(Denoising, "loss", lambda self, batch, source: (seen.add(len(batch.x)), loss(self, batch, source))[1])
    parts = train(tmp_path, *words, name="parts")
    assert seen == {8}
    monkeypatch.setattr(Pace, "times", lambda self, step: 1)
    whole = train(tmp_path, *words, name="whole")
    assert seen == {8, 16}
    assert 0 < distance(weights(parts), weights(whole)) < 1e-5
    assert distance(weights(parts), weights(train(tmp_path, *words[1:], name="plain"))) > 1e-3, "the comparison can fail"


def test_a_run_from_before_there_were_doublings_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint has no such key; it is the run without them, and no other."""
    plain, save = train(tmp_path, name="plain"), checkpoint.save

    def older(folder, step, groups, config, state):  # type: ignore[no-untyped-def]
        trainer = {key: value for key, value in config["config"]["trainer"].items() if key != "batch_doublings"}
        return save(folder, step, groups, {**config, "config": {**config["config"], "trainer": trainer}}, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", older)
        train(tmp_path, "trainer.steps=2")
    with pytest.raises(ConfigError, match=r"trainer\.batch_doublings: null in the run, \[16\] now"):
        train(tmp_path, "trainer.batch_doublings=[16]")
    assert hashes(train(tmp_path))["weights.safetensors"] == hashes(plain)["weights.safetensors"]


def test_averages_of_any_length_go_by_pictures() -> None:
    """Weights that are the number of pictures seen: the average of exponent g is (g + 1) / (g + 2) of it."""
    from diffusion_cli.ema import Power, exponent

    pace, rule, average = Pace(1, (50, 300)), Power(), 0.0
    for step in range(1000):
        beta = rule.beta(step, pace)
        average = beta * average + (1 - beta) * pace.seen(step + 1)
    g = exponent(rule.length)
    assert average / pace.seen(1000) == pytest.approx((g + 1) / (g + 2), rel=2e-3)
