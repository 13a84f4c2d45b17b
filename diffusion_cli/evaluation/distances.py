"""How far samples are from real pictures, of vectors [n, D] and [m, D] in the same features.

    fid        |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), the Frechet distance of two Gaussians (Heusel et al. 2017)
    kid        MMD^2 with the kernel (x.y / D + 1)^3, unbiased, mean over 100 subsets of 1000 (Binkowski et al. 2018, section 4)
    inception_score   exp E_x KL(p(y|x) || p(y)), mean over 10 parts (Salimans et al. 2016, section 4)
    precision  share of samples within the ball of a real picture, which reaches to its 3rd neighbour
    recall     share of real pictures within the ball of a sample (both Kynkaanniemi et al. 2019, section 2)
    density    1 / (k n) sum_i sum_j [ |f_i - r_j| < R_k(r_j) ] of samples f_i and real r_j; R_k: to the k-th neighbour, k = 5
    coverage   share of real pictures with a sample within their ball (both Naeem et al. 2020, section 3)
    sliced_wasserstein   (E_u integral (F_u^-1(p) - G_u^-1(p))^2 dp)^(1/2) over directions |u| = 1 (Bonneel et al. 2015)

The first five are torch-fidelity's functions on our features, so that they are the published values; the rest is short.
FID is biased: it falls as 1 / n with the number of samples, so figures of unequal n must not be compared. KID is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.errors import ConfigError
from diffusion_cli.evaluation import clip_score
from diffusion_cli.vision import mend_torchvision

SUBSETS, SUBSET = 100, 1000  # of kid
SPLITS = 10  # of the inception score
BALL, WIDER_BALL = 3, 5  # neighbours: of precision and recall; of density and coverage
ROWS = 2000  # vectors whose distances to all others are held at once


@dataclass(frozen=True, eq=False)
class Cloud:
    """Vectors of pictures, on the host. features [n, D] float32, logits [n, K], labels [n], projections [n, P], texts [n, D] as
    far as they were asked for. given: mean [D] and covariance [D, D] float64, where they are known."""

    features: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    projections: Tensor | None = None
    texts: Tensor | None = None
    given: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return next(len(part) for part in (self.features, self.projections) if part is not None)

    def with_texts(self) -> tuple[Tensor, Tensor]:
        assert self.features is not None and self.texts is not None
        return self.features, self.texts

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D], float64."""
        assert self.features is not None
        return moments(self.features) if self.given is None else self.given

    @cached_property
    def reach(self) -> Tensor:
        """[n] the radii of density and coverage, float32."""
        assert self.features is not None
        return radii(self.features, WIDER_BALL)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """features [n, D] -> mean [D], covariance [D, D] with n - 1, float64."""
    found = _fidelity("metric_fid").fid_features_to_statistics(features.double())
    return torch.from_numpy(found["mu"]), torch.from_numpy(np.atleast_2d(found["sigma"]))


def frechet(samples: Cloud, real: Cloud) -> float:
    one, two = ({"mu": mean.numpy(), "sigma": sigma.numpy()} for mean, sigma in (samples.moments, real.moments))
    return _fidelity("metric_fid").fid_statistics_to_metric(one, two, False)["frechet_inception_distance"]


def kernel(samples: Cloud, real: Cloud) -> float:
    assert samples.features is not None and real.features is not None
    size = min(SUBSET, len(samples), len(real))
    if size < 2:
        raise ConfigError("metrics=kid compares pairs: it needs two samples and two real pictures at least")
    subsets = 1 if size == len(samples) == len(real) else SUBSETS  # of all, there is one
    found = _fidelity("metric_kid").kid_features_to_metric(
        samples.features.double(), real.features.double(), kid_subsets=subsets, kid_subset_size=size, verbose=False
    )
    return found["kernel_inception_distance_mean"]


def kernel_of_pairs(samples: Cloud, real: Cloud) -> float:
    """KID where sample i was made of picture i: the mean over i != j alone is unbiased for pairs too (Gretton et al. 2012, "A
    kernel two-sample test", lemma 6), and torch-fidelity's, with i = j across, is not. 0 where all pairs are equal."""
    assert samples.features is not None and real.features is not None
    x, y = samples.features.double(), real.features.double()
    n, total = len(x), 0.0
    if n < 2:
        raise ConfigError("metrics=kid compares pairs: it needs two pictures at least")
    k = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731  [R, D], [n, D] -> [R, n]
    for rows in torch.arange(n).split(ROWS):
        h = k(x[rows], x) + k(y[rows], y) - k(x[rows], y) - k(y[rows], x)
        total += float(h.sum() - h[torch.arange(len(rows)), rows].sum())
    return total / (n * (n - 1))


def inception_score(samples: Cloud, real: Cloud) -> float:
    assert samples.logits is not None
    splits = min(SPLITS, len(samples.logits))
    return _fidelity("metric_isc").isc_features_to_metric(samples.logits, splits)["inception_score_mean"]


@lru_cache(maxsize=1)  # both are asked for, one after the other
def _within(samples: Cloud, real: Cloud) -> dict[str, float]:
    assert samples.features is not None and real.features is not None
    if min(len(samples), len(real)) <= BALL:
        raise ConfigError(
            f"metrics=precision,recall look at {BALL} neighbours: they need more samples and real pictures, n={BALL + 1}"
        )
    words = {"prc_neighborhood": BALL, "prc_batch_size": ROWS, "save_cpu_ram": True, "verbose": False}
    return _fidelity("metric_prc").prc_features_to_metric(samples.features, real.features, **words)


def precision(samples: Cloud, real: Cloud) -> float:
    return _within(samples, real)["precision"]


def recall(samples: Cloud, real: Cloud) -> float:
    return _within(samples, real)["recall"]


def radii(features: Tensor, k: int) -> Tensor:
    """[n] the distance of each vector of features [n, D] to its k-th neighbour, itself not counted."""
    if len(features) <= k:
        raise ConfigError(f"metrics=density,coverage look at {k} neighbours: they need more real pictures than that")
    return torch.cat([torch.cdist(part, features).kthvalue(k + 1).values for part in features.split(ROWS)])


def density(samples: Cloud, real: Cloud) -> float:
    assert samples.features is not None and real.features is not None
    inside = sum(int((torch.cdist(part, real.features) < real.reach).sum()) for part in samples.features.split(ROWS))
    return inside / (WIDER_BALL * len(samples))


def coverage(samples: Cloud, real: Cloud) -> float:
    assert samples.features is not None and real.features is not None
    near = torch.cat([torch.cdist(part, samples.features).amin(1) for part in real.features.split(ROWS)])  # [m]
    return float((near < real.reach).double().mean())


def class_accuracy(samples: Cloud, real: Cloud) -> float:
    """Share of samples in which the classifier sees the class that was asked for."""
    assert samples.logits is not None and samples.labels is not None
    return float((samples.logits.argmax(1) == samples.labels).double().mean())


def sliced_wasserstein(samples: Cloud, real: Cloud) -> float:
    """Of projections [n, P] and [m, P] on the same P directions. In the unit of a pixel within [-1, 1]."""
    assert samples.projections is not None and real.projections is not None
    levels = min(len(samples), len(real))
    p = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    # the quantile function of n values is a staircase: its value at p is the sorted value number floor(p n)
    stairs = [
        part.double().sort(0).values[(p * len(part)).long().clamp(max=len(part) - 1)]
        for part in (samples.projections, real.projections)
    ]
    return float((stairs[0] - stairs[1]).square().mean().sqrt())


Measure = Callable[[Cloud, Cloud], float]
MEASURES: dict[str, Measure] = {
    "fid": frechet,
    "kid": kernel,
    "inception_score": inception_score,
    "precision": precision,
    "recall": recall,
    "density": density,
    "coverage": coverage,
    "class_accuracy": class_accuracy,
    "sliced_wasserstein": sliced_wasserstein,
    "clip_score": lambda samples, real: clip_score.matched(*samples.with_texts()),
    "clip_score_shuffled": lambda samples, real: clip_score.shuffled(*samples.with_texts()),
}


def _fidelity(module: str) -> Any:
    """A module of torch-fidelity. Raises ConfigError where the extra is not installed."""
    import importlib

    mend_torchvision()
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except ModuleNotFoundError:
        raise ConfigError("these metrics need torch-fidelity: pip install 'diffusion-cli[eval]'") from None
