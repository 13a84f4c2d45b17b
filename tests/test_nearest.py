"""Copies are found, and what copies nothing is not accused: distances by hand, shares by construction, features of equals."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_scale import ask, pngs
from tiny import compose, train

from diffusion_cli import checkpoint, config
from diffusion_cli.codecs import Pixels
from diffusion_cli.data import Dataset
from diffusion_cli.data.digits import Digits
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.devices import choose
from diffusion_cli.errors import ConfigError, Stopped
from diffusion_cli.evaluation.middle import Middle, middle_of, pooled
from diffusion_cli.evaluation.nearest import close, copied, nearest, threshold
from diffusion_cli.models import DiT, Network, UNet, UNetBasic, UNetGated
from diffusion_cli.predictions import V
from diffusion_cli.sampling.nearest import compare
from diffusion_cli.schedules import Flow
from diffusion_cli.signals import StopRequest

DIGITS = dict(size=8, channels=1, labels=False)


def chunked(vectors: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
    for numbers in torch.arange(len(vectors)).split(size):
        yield numbers, vectors[numbers], False


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 12), st.integers(0, 5))
def test_nearest_is_what_all_distances_say(n: int, size: int, k: int, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    queries, vectors = torch.randn(4, 6, generator=draws), torch.randn(n, 6, generator=draws)
    found = nearest(queries, chunked(vectors, size), k)
    every = (queries[:, None].double() - vectors.double()).square().sum(2).sqrt()  # [4, n]
    expected, order = every.sort(1)
    assert torch.allclose(found.distance, expected[:, :k], rtol=0, atol=1e-7)
    assert torch.equal(found.number, order[:, :k]) and not found.mirrored.any()


def test_distances_of_pixels_are_exact() -> None:
    pixels = torch.randint(0, 256, (50, 3072), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    other = pixels.clone()
    other[:, 100] ^= 1
    found = nearest(other, chunked(pixels, 7), 1)
    assert torch.equal(found.distance[:, 0], torch.ones(50, dtype=torch.float64)) and found.number[:, 0].tolist() == list(
        range(50)
    )
    assert not nearest(pixels, chunked(pixels, 7), 1).distance.any(), "a copy is at 0, not near it"


def test_itself_and_its_mirror_do_not_count() -> None:
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    chunks = [(torch.arange(3), vectors, False), (torch.arange(3), vectors.flip(1), True)]
    found = nearest(vectors, chunks, 3, but=torch.tensor([0, 1, -1]))
    assert found.number[0].tolist() == [2, 2, 1] and found.mirrored[0].tolist() in (
        [False, True, False],
        [True, False, False],
        [False, True, True],
        [True, False, True],
    )
    assert found.distance[0].tolist() == [1, 1, 5] and 1 not in found.number[1]
    assert found.distance[2, 0] == 0 and found.number[2, 0] == 2, "-1 leaves nobody out"


def test_mirrored_pictures_are_found() -> None:
    vectors = torch.tensor([[1.0, 2.0, 3.0], [9.0, 9.0, 0.0]])
    found = nearest(
        torch.tensor([[0.0, 9.0, 9.0]]), [(torch.arange(2), vectors, False), (torch.arange(2), vectors.flip(1), True)], 1
    )
    assert (found.distance.item(), found.number.item(), found.mirrored.item()) == (0, 1, True)


def test_threshold_and_ratio_by_hand() -> None:
    assert threshold(torch.arange(1000.0, dtype=torch.float64)) == 9 and threshold(torch.tensor([5.0, 3.0])) == 3
    distance = torch.tensor([[1.0, 3.0, 4.0], [1.0, 2.0, 2.9], [0.0, 0.0, 5.0]])
    assert close(distance, 0.5).tolist() == [False, False, True]
    # alpha mean: 1.33, 0.98, 0.83
    assert copied(distance).tolist() == [True, False, True]


def test_only_the_fifty_nearest_say_what_is_usual() -> None:
    near, far = torch.full((1, 49), 3.0), torch.full((1, 100), 100.0)
    assert not copied(torch.cat([torch.full((1, 1), 1.6), near, far], 1)) and copied(
        torch.cat([torch.full((1, 1), 1.4), near, far], 1)
    )


# -- on known distributions --------------------------------------------------------------------------------------------


def shares(samples: torch.Tensor, training: torch.Tensor, held_out: torch.Tensor) -> tuple[float, float]:
    limit = threshold(nearest(held_out, chunked(training, 500), 1).distance[:, 0])
    found = nearest(samples, chunked(training, 500), 50).distance
    return float(close(found, limit).double().mean()), float(copied(found).double().mean())


def test_copies_are_all_close_and_new_draws_are_as_often_as_stated() -> None:
    """2,000 new points of one Gaussian: 1 % are within the quantile of 2,000 others, up to 3.5 standard errors of both."""
    draws = torch.Generator().manual_seed(1)
    training, held_out, new = (torch.randn(n, 64, generator=draws) for n in (3000, 2000, 2000))
    assert shares(training[:64], training, held_out) == (1.0, 1.0)
    near, ratio = shares(new, training, held_out)
    assert abs(near - 0.01) < 3.5 * (2 * 0.01 * 0.99 / 2000) ** 0.5 and ratio == 0
    half = torch.cat([training[:500] + 0.001, new[:500]])
    assert abs(shares(half, training, held_out)[0] - 0.505) < 0.01


# -- features ----------------------------------------------------------------------------------------------------------


def denoiser_of(make: type[Network], **words: object) -> Denoiser:
    torch.manual_seed(0)
    network = make(1, 8, 0, **words)  # type: ignore[call-arg]
    for weights in network.parameters():  # a fresh network answers 0
        torch.nn.init.normal_(weights, std=0.2)
    return Denoiser(network, V(Flow())).eval()


@pytest.mark.parametrize(
    ("make", "words", "middle"),
    [
        (UNet, {"width": 8, "groups": 4, "multipliers": (1, 2), "blocks": 1}, "up.0"),
        (DiT, {"width": 16, "depth": 4, "heads": 2}, "blocks.2"),
        (UNetBasic, {}, "up.0"),
        (UNetGated, {"width": 8, "levels": 2}, "bottom"),
    ],
)
def test_the_block_called_halfway_is_found(make: type[Network], words: dict[str, object], middle: str) -> None:
    denoiser = denoiser_of(make, **words)
    module = middle_of(denoiser, Pixels(), torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    name = next(name for name, other in denoiser.network.named_modules() if other is module)
    assert name.startswith(middle), name


def test_a_network_without_maps_has_no_features() -> None:
    class Flat(Network):
        def __init__(self, channels: int, image_size: int, num_classes: int):
            super().__init__(channels, image_size, num_classes)
            self.linear = torch.nn.Linear(64, 64)

        def forward(self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
            return self.linear(x.flatten(1)).view_as(x)

    assert middle_of(denoiser_of(Flat), Pixels(), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)) is None


def test_features_are_of_the_picture_alone() -> None:
    """Equal pictures have equal features wherever they stand; others differ; unit vectors once centred; no hook stays."""
    denoiser = denoiser_of(UNet, width=8, groups=4, multipliers=(1, 2), blocks=1)
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    middle = middle_of(denoiser, Pixels(), images)
    bare = Middle(denoiser, Pixels(), middle)
    f = bare(images)
    assert torch.allclose(bare(images[[3, 3]]), f[[3, 3]], rtol=0, atol=1e-6) and (f[0] - f[1]).norm() > 1e-3
    centred = Middle(denoiser, Pixels(), middle, f.mean(0))(images)
    assert torch.allclose(centred.norm(dim=1), torch.ones(6, dtype=torch.float64), atol=1e-9)
    assert not any(module._forward_hooks for module in denoiser.modules())
    assert torch.equal(pooled(torch.ones(2, 3, 4, 4)), torch.ones(2, 3)) and pooled(torch.ones(2, 5, 7)).shape == (2, 7)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On 200 digits, mirrored while training."""
    words = ("dataset.limit=200", "dataset.flip=true", "trainer.steps=20", "trainer.report_every=20", "optimizer.lr=3e-3")
    return train(tmp_path_factory.mktemp("runs"), *words)


def test_files_and_figures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ask(run, tmp_path / "out", "n=20", "nearest=3")
    facts = json.loads((folder / "nearest.json").read_text())
    assert facts["training_pictures"] == 200 and facts["mirrored"] and facts["reference"] == "held-out pictures"
    assert [one["index"] for one in facts["samples"]] == list(range(20)) and facts["references"] == 200
    images = Digits(**DIGITS, limit=200).load().images[:, 0].double() / 255
    made = torch.from_numpy(pngs(folder)).double() / 255
    for i, one in enumerate(facts["samples"]):
        both = torch.stack([images, images.flip(-1)])  # [2, 200, 8, 8]
        every = (both - made[i]).square().mean((2, 3)).sqrt()
        found = [near["distance"] for near in one["pixels"]]
        assert found == pytest.approx(every.flatten().sort().values[:3].tolist(), abs=1e-12)
        assert found[0] == pytest.approx(
            float(every[int(one["pixels"][0]["mirrored"]), one["pixels"][0]["picture"]]), abs=1e-12
        )
        assert len(one["features"]) == 3 and 0 <= one["features"][0]["distance"] <= 2
    shown = Image.open(folder / "nearest.png")
    assert shown.width > 7 * 58 and shown.height == 18 + 16 * 60, "sixteen rows: the sample, three and three"
    said = capsys.readouterr().out
    assert "20 samples among 200 training pictures and their mirrors" in said and "nearest in features: " in said


class Against:
    """The comparison itself, for samples that no walk has made."""

    def __init__(self, run: Path, folder: Path, *words: str):
        root = config.check_sample(compose(f"ckpt={run}", "nearest=1", "device=cpu", *words, primary="sample")).root
        folder.mkdir()
        self.found, self.root, self.folder = checkpoint.load(run / "checkpoints" / "step_00000020"), root, folder

    def __call__(self, samples: torch.Tensor, dataset: Dataset, stop: StopRequest | None = None) -> dict:
        compute = choose("cpu", "fp32", False, print)
        compare(samples, self.found, dataset, self.root, compute, self.folder, stop or StopRequest())
        return json.loads((self.folder / "nearest.json").read_text())


def test_training_pictures_as_samples_are_all_copies(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = Digits(**DIGITS, limit=200, flip=True)
    images = dataset.load().images
    facts = Against(run, tmp_path / "out")(torch.cat([images[:32], images[32:64].flip(-1)]), dataset)
    for space in ("pixels", "features"):
        assert facts[space]["close"] == 1 and facts[space]["close_of_reference"] == 2 / 200
        first = [one[space][0] for one in facts["samples"]]
        assert [near["picture"] for near in first] == list(range(64)) and max(near["distance"] for near in first) < 1e-5
        assert [near["mirrored"] for near in first] == [False] * 32 + [True] * 32
    assert facts["pixels"]["copied"] == 1 and facts["pixels"]["copied_of_reference"] < 0.1 and "copied" not in facts["features"]
    assert "not the pictures that the network was trained on" not in capsys.readouterr().out


def test_held_out_pictures_as_samples_copy_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = Digits(**DIGITS, test_share=0.5)
    held_out = dataset.load("test").images
    facts = Against(run, tmp_path / "out")(held_out[1::4], dataset)
    assert facts["reference"] == "held-out pictures" and not facts["mirrored"]
    for space in ("pixels", "features"):
        assert facts[space]["close"] < 0.03, facts[space]
    assert facts["pixels"]["copied"] < 0.1
    assert "not the pictures that the network was trained on" in capsys.readouterr().out


def test_a_signal_ends_the_search(run: Path, tmp_path: Path) -> None:
    stop = StopRequest()
    stop.number = 15
    with pytest.raises(Stopped, match="nearest training pictures"):
        Against(run, tmp_path / "out")(Digits(**DIGITS).load().images[:4], Digits(**DIGITS), stop)


def test_data_may_have_moved(tmp_path: Path, run: Path) -> None:
    images = Digits(**DIGITS, limit=40).load().images
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image[0].numpy()).save(tmp_path / folder / f"{i:03d}.png")
    words = ("dataset=folder", f"dataset.path={tmp_path / 'here'}", "dataset.size=8", "dataset.channels=1", "dataset.workers=0")
    other = train(tmp_path, *words, "trainer.steps=2", name="of_files")
    (tmp_path / "here").rename(tmp_path / "gone")
    folder = ask(other, tmp_path / "out", "nearest=2", f"data={tmp_path / 'there'}")
    facts = json.loads((folder / "nearest.json").read_text())
    assert facts["training_pictures"] == 40 and facts["reference"] == "training pictures, each left out"
    assert facts["references"] == 40 and 0 < facts["pixels"]["threshold"] < facts["pixels"]["median_of_reference"]
    with pytest.raises(ConfigError, match="has no path to change"):
        ask(run, tmp_path / "never", "nearest=2", "data=/elsewhere")
    with pytest.raises(ConfigError, match="add nearest=5"):
        ask(run, tmp_path / "never", "data=/elsewhere")
    assert not (tmp_path / "never").exists()
