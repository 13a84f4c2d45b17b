"""Distances between clouds of vectors: closed forms, torch-fidelity number for number, and what each must and must not see."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion_cli.evaluation import distances, words
from diffusion_cli.evaluation.distances import MEASURES, Cloud, kernel, kernel_of_pairs
from diffusion_cli.evaluation.figures import of_samples, over_draws, over_pictures
from diffusion_cli.vision import mend_torchvision


def cloud(n: int, seed: int, shift: float = 0.0, scale: float = 1.0, D: int = 8) -> Cloud:
    return Cloud(scale * torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + shift)


def with_moments(mean: Tensor, covariance: Tensor) -> Cloud:
    return Cloud(torch.zeros(1, len(mean)), given=(mean.double(), covariance.double()))


def value(metric: str, samples: Cloud, real: Cloud) -> float:
    return MEASURES[metric](samples, real)


# -- closed forms ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(1, 12))
def test_frechet_of_gaussians_with_one_basis(seed: int, D: int) -> None:
    """|mu_1 - mu_2|^2 + sum (s_1 - s_2)^2 where both covariances have the same axes."""
    random = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(random.normal(size=(D, D)))
    one, two = random.uniform(0.1, 3, (2, D))
    mean = random.normal(size=(2, D))
    clouds = [
        with_moments(torch.from_numpy(m), torch.from_numpy(axes @ np.diag(s**2) @ axes.T))
        for m, s in zip(mean, (one, two), strict=True)
    ]
    expected = ((mean[0] - mean[1]) ** 2).sum() + ((one - two) ** 2).sum()
    assert value("fid", *clouds) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_frechet_of_any_gaussians() -> None:
    """Against the trace of scipy's matrix square root."""
    from scipy.linalg import sqrtm

    random = np.random.default_rng(0)
    factors = random.normal(size=(2, 6, 6))
    one, two = (factor @ factor.T for factor in factors)
    expected = np.trace(one + two - 2 * sqrtm(one @ two).real)
    found = value("fid", *(with_moments(torch.zeros(6), torch.from_numpy(s)) for s in (one, two)))
    assert found == pytest.approx(expected, rel=1e-9)


def test_sliced_wasserstein_of_a_shift() -> None:
    """Of clouds that differ by a vector d: the root mean square of u.d over directions, which is |d| / sqrt(D)."""
    from diffusion_cli.evaluation.samples import directions

    u = directions(64, torch.device("cpu"))
    assert torch.allclose(u.norm(dim=0), torch.ones(u.shape[1]))
    x, d = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 64)
    found = value("sliced_wasserstein", Cloud(projections=(x + d) @ u), Cloud(projections=x @ u))
    assert found == pytest.approx(float((d @ u).square().mean().sqrt()), rel=1e-5)
    assert found == pytest.approx(float(d.norm()) / 8, rel=0.15)


def test_sliced_wasserstein_of_gaussians_and_unequal_counts() -> None:
    """Of N(0, 1) and N(0, 4) in one dimension: |2 - 1|; of the same values at other counts: 0."""
    quantiles = torch.special.ndtri((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000)[:, None]
    assert value("sliced_wasserstein", Cloud(projections=2 * quantiles), Cloud(projections=quantiles)) == pytest.approx(
        1, abs=1e-3
    )
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    assert value("sliced_wasserstein", Cloud(projections=x.repeat(3, 1)), Cloud(projections=x)) == 0


def test_inception_score_of_sure_and_unsure_answers() -> None:
    """K classes, each seen surely and equally often: K; the same answer always: 1."""
    sure = 100 * torch.eye(7).repeat(1000, 1)
    assert value("inception_score", Cloud(sure, sure), Cloud()) == pytest.approx(7, rel=0.02)
    assert value("inception_score", Cloud(sure, torch.ones(200, 7)), Cloud()) == pytest.approx(1)


def test_class_accuracy_counts() -> None:
    logits = torch.eye(4)[[0, 1, 2, 3, 0]]
    assert value("class_accuracy", Cloud(logits, logits, torch.tensor([0, 1, 2, 0, 0])), Cloud()) == pytest.approx(0.8)


# -- beside the library and a definition by hand --------------------------------------------------------------------------


def test_torch_fidelity_number_for_number() -> None:
    """On the same features: its own way from features to figures, in its own type where it has one."""
    mend_torchvision()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    one, two = cloud(1200, 0, 0.3, D=32), cloud(1500, 1, D=32)
    assert one.features is not None and two.features is not None
    stats = [fid_features_to_statistics(part.features.double()) for part in (one, two)]  # type: ignore[union-attr]
    assert value("fid", one, two) == pytest.approx(
        fid_statistics_to_metric(*stats, False)["frechet_inception_distance"], rel=1e-9
    )
    single = [fid_features_to_statistics(part.features) for part in (one, two)]  # type: ignore[arg-type]
    for stat in single:
        stat["mu"] = stat["mu"].astype(np.float64)
    assert value("fid", one, two) == pytest.approx(
        fid_statistics_to_metric(*single, False)["frechet_inception_distance"], rel=1e-6
    )
    theirs = kid_features_to_metric(one.features.double(), two.features.double(), verbose=False)
    assert value("kid", one, two) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    theirs = prc_features_to_metric(one.features, two.features, verbose=False)
    assert (value("precision", one, two), value("recall", one, two)) == (theirs["precision"], theirs["recall"])
    score = isc_features_to_metric(one.features)["inception_score_mean"]
    assert value("inception_score", Cloud(one.features, one.features), two) == pytest.approx(score, rel=1e-9)


def test_density_and_coverage_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ball and each pair, one by one, as Naeem et al. write it; in parts of any size."""
    monkeypatch.setattr(distances, "ROWS", 7)
    one, two = cloud(60, 0, 0.5, D=3), cloud(40, 1, D=3)
    assert one.features is not None and two.features is not None
    real, made, k = two.features.double().numpy(), one.features.double().numpy(), distances.WIDER_BALL
    radius = [sorted(np.linalg.norm(real - r, axis=1))[k] for r in real]
    inside = np.array([[np.linalg.norm(f - r) < reach for r, reach in zip(real, radius, strict=True)] for f in made])
    assert value("density", one, two) == pytest.approx(inside.sum() / (k * len(made)))
    assert value("coverage", one, two) == pytest.approx(inside.any(0).mean())


def test_kernel_distance_is_unbiased() -> None:
    """Of equal distributions: 0 within its own spread, below it about as often as above; a Frechet distance is always above."""
    found = [value("kid", cloud(250, seed, D=4), cloud(250, 1000 + seed, D=4)) for seed in range(40)]
    error = np.std(found, ddof=1) / math.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error and 8 < sum(one > 0 for one in found) < 32
    assert all(value("fid", cloud(250, seed, D=4), cloud(250, 1000 + seed, D=4)) > 5 * abs(error) for seed in range(5))


# -- what they see -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Real digits as vectors in [-1, 1] [1797, 64], and their labels."""
    from diffusion_cli.data import Digits

    pictures = Digits(size=8, channels=1, labels=True, test_share=0.0).load("train")
    assert pictures is not None and isinstance(pictures.images, Tensor) and pictures.labels is not None
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))  # they lie there writer by writer
    return pictures.images[order].flatten(1).float() / 127.5 - 1, pictures.labels[order]


def as_cloud(x: Tensor) -> Cloud:
    from diffusion_cli.evaluation.samples import directions

    return Cloud(x, projections=x @ directions(x.shape[1], torch.device("cpu")))


NEARER = ("fid", "kid", "sliced_wasserstein")


def test_a_set_is_at_no_distance_from_itself(digits: tuple[Tensor, Tensor]) -> None:
    whole = as_cloud(digits[0])
    assert abs(value("fid", whole, whole)) < 1e-6 and value("sliced_wasserstein", whole, whole) == 0
    assert -0.05 < value("kid", whole, whole) < 0
    assert value("precision", whole, whole) == value("recall", whole, whole) == value("coverage", whole, whole) == 1


def test_its_halves_are_near_and_nearer_the_larger_they_are(digits: tuple[Tensor, Tensor]) -> None:
    x = digits[0]
    for metric in ("fid", "sliced_wasserstein"):
        found = [value(metric, as_cloud(x[:half]), as_cloud(x[-half:])) for half in (100, 300, 890)]
        assert all(more > 1.3 * less > 0 for more, less in pairwise(found)), (metric, found)
    assert value("density", as_cloud(x[:890]), as_cloud(x[-890:])) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("metric", NEARER)
def test_noise_and_blur_lead_away(metric: str, digits: tuple[Tensor, Tensor]) -> None:
    x, real = digits[0][:890], as_cloud(digits[0][890:])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    by_noise = [value(metric, as_cloud(x + level * noise), real) for level in (0.0, 0.2, 0.4, 0.8)]
    pictures = x.view(-1, 1, 8, 8)
    blurred = [x, *(torch.nn.functional.avg_pool2d(pictures, k, 1, k // 2, count_include_pad=False).flatten(1) for k in (3, 5))]
    by_blur = [value(metric, as_cloud(pixels), real) for pixels in blurred]
    for found in (by_noise, by_blur):
        assert all(one < two for one, two in pairwise(found)), found


def test_lost_classes_cost_recall_and_coverage_and_not_precision(digits: tuple[Tensor, Tensor]) -> None:
    x, labels = digits
    ours, real = labels[:890], as_cloud(x[890:])
    clouds = [as_cloud(x[:890][ours < kept]) for kept in (10, 6, 2)]
    for metric in ("recall", "coverage"):
        found = [value(metric, samples, real) for samples in clouds]
        assert found[0] > 0.85 and found[0] > found[1] + 0.2 and found[1] > found[2] + 0.2, (metric, found)
    for metric in ("precision", "density"):
        found = [value(metric, samples, real) for samples in clouds]
        assert min(found) > 0.85, (metric, found)
    for metric in NEARER:
        found = [value(metric, samples, real) for samples in clouds]
        assert found[0] < found[1] < found[2], (metric, found)


def test_noise_costs_precision_and_density(digits: tuple[Tensor, Tensor]) -> None:
    x, real = digits[0][:890], as_cloud(digits[0][890:])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for metric in ("precision", "density", "coverage"):
        found = [value(metric, as_cloud(x + level * noise), real) for level in (0.0, 0.3, 0.6)]
        assert found[0] > found[1] > found[2], (metric, found)


# -- names and spreads -------------------------------------------------------------------------------------------------


def test_names_carry_features_and_n() -> None:
    assert words.name_of("fid", "inception", 50000) == "inception_fid_50000"
    assert words.name_of("fid", "classifier", 2000) == "classifier_fd_2000"
    assert words.name_of("kid", "dinov2", 10) == "dinov2_kid_10"
    assert words.name_of("sliced_wasserstein", "raw", 10) == "pixels_sliced_wasserstein_10"
    higher = [metric for metric in words.OF_SAMPLES if words.higher_is_better(f"evaluate/{words.name_of(metric, 'raw', 5)}")]
    assert higher == ["inception_score", "precision", "recall", "density", "coverage", "class_accuracy", "clip_score"]
    assert words.higher_is_better("evaluate/accuracy_clean") and not words.higher_is_better("evaluate/x0_mse")


def test_every_word_has_its_measure() -> None:
    assert set(MEASURES) == set(words.OF_SAMPLES)


def test_spreads_are_of_pictures_or_of_draws() -> None:
    assert over_pictures(torch.tensor([1.0, 2.0, 3.0]))["error"] == pytest.approx(1 / math.sqrt(3))
    assert over_draws([1.0]) == {"value": 1.0, "error": None, "of": "one draw"}
    found = over_draws([1.0, 2.0, 3.0])
    assert found == {"value": 2.0, "error": 1.0, "of": "standard deviation over 3 draws", "values": [1.0, 2.0, 3.0]}


def test_kid_leads_where_a_frechet_distance_says_little() -> None:
    draws = [cloud(20, seed) for seed in (0, 1)]
    found = of_samples(["fid", "coverage", "kid"], draws, cloud(30, 5), "raw")
    assert list(found) == ["raw_kid_20", "raw_fd_20", "raw_coverage_20"]
    assert all(len(figure["values"]) == 2 for figure in found.values())


def test_kid_of_pairs_is_that_of_torch_fidelity_without_the_pairs() -> None:
    """And 0 of equal pairs, where the mean over all i and j is far below."""
    x, y = cloud(30, 1), cloud(30, 2, shift=0.3)
    a, b = x.features.double(), y.features.double()
    across = (a @ b.T / a.shape[1] + 1) ** 3
    wanted = kernel(x, y) + 2 * across.mean() - 2 * (across.sum() - across.diagonal().sum()) / (30 * 29)
    assert kernel_of_pairs(x, y) == pytest.approx(float(wanted), rel=1e-6)
    assert kernel_of_pairs(x, x) == 0 and kernel(x, x) < -0.01
