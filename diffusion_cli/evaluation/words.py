"""The words of `metrics`: what each compares, what it needs, which way is better, how its figures are called. Free of torch.

A figure's name carries what its value depends on most: `inception_fid_50000`, `classifier_kid_2000`.
"""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """library: whether torch-fidelity computes it; features: compared in a network's features (else in pixels); logits: of the
    network's classes; labels: of pictures made by label; texts: of pictures made by caption; higher: more is better."""

    library: bool = False
    features: bool = True
    logits: bool = False
    labels: bool = False
    texts: bool = False
    higher: bool = False


OF_PICTURES = ("denoising", "bound", "bits", "vlb", "reconstruction")  # of the network itself, on pictures of the data set
OF_SAMPLES = {
    "fid": Word(library=True),
    "kid": Word(library=True),
    "inception_score": Word(library=True, logits=True, higher=True),
    "precision": Word(library=True, higher=True),
    "recall": Word(library=True, higher=True),
    "density": Word(higher=True),
    "coverage": Word(higher=True),
    "class_accuracy": Word(logits=True, labels=True, higher=True),
    "sliced_wasserstein": Word(features=False),
    "clip_score": Word(texts=True, higher=True),
    "clip_score_shuffled": Word(texts=True),
}
ENOUGH = 10_000  # samples from which a Frechet distance is worth reading


def name_of(metric: str, features: str | None, n: int) -> str:
    """The figure of a metric of n samples. features: their name; a Frechet distance is only an FID in those of Inception."""
    word = "fd" if metric == "fid" and features != "inception" else metric
    return f"{features if OF_SAMPLES[metric].features else 'pixels'}_{word}_{n}"


def name_back(figure: str) -> str:
    """The same figure of reconstructions."""
    return f"reconstruction_{figure}"


def higher_is_better(figure: str) -> bool:
    """Of a figure's name, as TensorBoard has it or bare."""
    better = [metric for metric, word in OF_SAMPLES.items() if word.higher]
    if "shuffled" in figure:
        return False
    return any(word in figure.rpartition("/")[2] for word in (*better, "accuracy", "psnr", "ssim", "codebook"))


def unmet(key: str, metrics: Collection[str], features: str | None) -> list[str]:
    """What the words of samples need and do not have, one line each. key: the setting that says them."""
    wrong = []
    wanted = [metric for metric in metrics if metric in OF_SAMPLES and OF_SAMPLES[metric].features]
    if wanted and features is None:
        wrong.append(
            f"{key}={','.join(wanted)}: compared in which features? features=classifier features.ckpt=RUN (a classifier), "
            "features=inception, dinov2, clip, clip_run, raw or random"
        )
    blind = [
        metric for metric in wanted if OF_SAMPLES[metric].logits and features in ("dinov2", "clip", "cliprun", "raw", "random")
    ]
    if blind:
        wrong.append(f"{key}={','.join(blind)}: features={features} gives no classes; choose features=classifier")
    wordless = [metric for metric in wanted if OF_SAMPLES[metric].texts and features not in (None, "cliprun")]
    if wordless:
        wrong.append(f"{key}={','.join(wordless)}: features={features} reads no texts; choose features=clip_run")
    return wrong
