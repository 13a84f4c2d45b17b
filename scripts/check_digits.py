#!/usr/bin/env python3
"""Are the digits digits? Asks a classifier that saw only real ones: python scripts/check_digits.py outputs/digits [--n 1000]

A small CNN is trained on the data set that the run itself was trained on (all its classes), shifted by up to a pixel, and
on junk as one class more, `none`: noise of several kinds, pictures half noised, shuffled pixels. A picture is accepted when
one digit has a probability of 0.9 or more. The same share of held-out real digits is the yardstick, that of junk the proof
that not everything passes; junk of kinds that were never trained on is in it. What is put together from halves of real
digits passes in part: a share says that the samples have the strokes of a digit, not that a person would have drawn them.

Exit status 1: fewer samples accepted than --aim says, or a class that the run was trained on never appears.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_cli.assembly import Facts
from diffusion_cli.build import build
from diffusion_cli.checkpoint import Checkpoint
from diffusion_cli.data import Dataset, Pictures
from diffusion_cli.data.dataset import class_id
from diffusion_cli.data.pixels import to_float, to_uint8
from diffusion_cli.errors import ConfigError, UserError
from diffusion_cli.finding import find, load_denoiser
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Sampler, last
from diffusion_cli.walking import walk

SURE = 0.9  # the probability from which a digit is accepted


# -- junk: x [B, C, H, W] of real digits in [-1, 1] -> as many pictures that are none -----------------------------------


def noise(x: Tensor) -> Tensor:
    return torch.rand_like(x) * 2 - 1


def gaussian(x: Tensor) -> Tensor:
    return torch.randn_like(x).clamp(-1, 1)


def shuffled(x: Tensor) -> Tensor:
    """The pixels of each picture in an order of its own: the same grey levels, no shape."""
    order = torch.rand_like(x).flatten(1).argsort(1)
    return x.flatten(1).gather(1, order).view_as(x)


def half_noised(x: Tensor, least: float = 0.5, most: float = 0.5) -> Tensor:
    """(1 - t) x + t noise, with Gaussian noise, t between least and most."""
    t = torch.rand(len(x), 1, 1, 1) * (most - least) + least
    return ((1 - t) * x + t * torch.randn_like(x)).clamp(-1, 1)


def blank(x: Tensor) -> Tensor:
    """One grey level each."""
    return torch.rand(len(x), 1, 1, 1).expand_as(x) * 2 - 1


def collage(x: Tensor) -> Tensor:
    """The left half of one picture beside the left half of another, mirrored: strokes, but of no digit for the most part."""
    half = x.shape[-1] // 2
    other = x.roll(1, 0).flip(-1)
    return torch.cat([x[..., :half], other[..., half:]], -1)


def checks(x: Tensor) -> Tensor:
    """Squares of 2 x 2 pixels, black or white by chance."""
    squares = torch.rand(len(x), x.shape[1], -(-x.shape[2] // 2), -(-x.shape[3] // 2)).round() * 2 - 1
    return squares.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : x.shape[2], : x.shape[3]]


def blobs(x: Tensor) -> Tensor:
    """Gaussian noise averaged over 3 x 3 pixels: smooth as strokes are."""
    rough = torch.randn(len(x), x.shape[1], x.shape[2] + 2, x.shape[3] + 2)
    return (3 * nn.functional.avg_pool2d(rough, 3, 1)).clamp(-1, 1)


Junk = Callable[[Tensor], Tensor]
TRAINED: tuple[Junk, ...] = (noise, gaussian, shuffled, lambda x: half_noised(x, 0.35, 1.0), blank, checks)
SHOWN: dict[str, Junk] = {
    "uniform noise": noise,
    "Gaussian noise": gaussian,
    "shuffled pixels": shuffled,
    "half-noised digits": half_noised,
    "random squares": checks,
    "smooth noise (never trained on)": blobs,
    "mirrored collages (never trained on)": collage,
}


# -- the classifier ----------------------------------------------------------------------------------------------------


def classifier(channels: int, size: int, classes: int) -> nn.Module:
    """[B, channels, size, size] to logits [B, classes + 1]; the last is `none`. Made for 8 x 8, and enough for 28 x 28."""
    half = (size + 1) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * half**2, classes + 1),
    )  # fmt: skip


def shifted(x: Tensor) -> Tensor:
    """Each picture moved by -1, 0 or 1 pixel in both directions; black comes in at the edge."""
    batch, _, height, width = x.shape
    padded = nn.functional.pad(x, (1, 1, 1, 1), value=-1.0)
    rows = torch.arange(height) + torch.randint(0, 3, (batch, 1))  # [B, H]
    columns = torch.arange(width) + torch.randint(0, 3, (batch, 1))  # [B, W]
    return padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(images: Tensor, labels: Tensor, classes: int, steps: int = 500, batch: int = 128, seed: int = 0) -> nn.Module:
    """A classifier of pictures uint8 [N, C, H, W] with labels [N], and of junk; in evaluation mode, the same every time.

    Real pictures lose half a grey level of their 17 to noise: a sample is not to be told from them by its steps of grey.
    """
    torch.manual_seed(seed)
    model = classifier(images.shape[1], images.shape[-1], classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    each = -(-batch // 4 // len(TRAINED))  # junk of each kind: a fifth of what is seen
    none = torch.full((each * len(TRAINED),), classes)
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (batch,))
        real = to_float(images[chosen])
        junk = torch.cat([make(real[torch.randperm(batch)[:each]]) for make in TRAINED])
        moved = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, shifted(real), real)
        moved = moved + (torch.rand_like(real) - 0.5) / 8
        loss = nn.functional.cross_entropy(model(torch.cat([moved, junk])), torch.cat([labels[chosen], none]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def judged(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures float [N, C, H, W] in [-1, 1] -> (the likeliest digit [N], whether it is accepted [N])."""
    digits = torch.cat([torch.softmax(model(part), 1)[:, :-1] for part in x.split(1000)])
    probability, digit = digits.max(1)
    return digit, probability >= SURE


def share(found: Tensor) -> float:
    return float(found.float().mean())


# -- the run and its samples -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Real pictures of all classes. taught: the numbers of the classes that the run was trained on."""

    train: Pictures
    test: Pictures
    taught: list[int]


def data_of(found: Checkpoint, path: str | None) -> Data:
    """The run's data set, read again with all classes; path: where it lies now. Raises UserError."""
    node = dict(found.config["config"]["dataset"])
    if path is not None:
        if "path" not in node:
            raise ConfigError(f"--data {path}: this run's data set has no path ({node['_target_']})")
        node["path"] = path
    dataset = build(node, Dataset, "dataset")
    only = dataset.classes
    dataset = replace(dataset, classes=None, labels=True, limit=0)
    train, test = dataset.load("train"), dataset.load("test")
    if train is None or test is None or not isinstance(train.images, Tensor) or not isinstance(test.images, Tensor):
        raise ConfigError(
            "the run's data set has no test split (or is too large for memory): this check needs held-out pictures"
        )
    every = range(len(train.classes))
    return Data(train, test, list(every) if only is None else [class_id(name, train.classes) for name in only])


@torch.inference_mode()
def samples(found: Checkpoint, n: int, seed: int, weights: str, batch: int = 250) -> tuple[Tensor, Tensor | None]:
    """uint8 [n, C, H, W] as diffusion-sample makes them, and the labels that they were asked for [n], if any."""
    facts: Facts = found.config["facts"]
    denoiser = load_denoiser(found, weights).to(memory_format=torch.channels_last)
    sampler = build(found.config["config"]["sampler"], Sampler, "sampler")
    asked = torch.tensor(facts["taught"])[torch.arange(n) % len(facts["taught"])] if facts["taught"] else None
    made = []
    for ids in torch.arange(n).split(batch):
        labels = None if asked is None else asked[ids]
        made.append(to_uint8(last(walk(denoiser, sampler, Source(seed, ids), labels)).x))
    return torch.cat(made), asked


def report(model: nn.Module, data: Data, made: Tensor, asked: Tensor | None, aim: float) -> bool:
    """Prints the figures; whether the samples hold up."""
    real = to_float(data.test.images)
    digit, sure = judged(model, real)
    print(f"held-out digits       {len(real):5}  accuracy {share(digit == data.test.labels):.1%}, accepted {share(sure):.1%}")
    for name, make in SHOWN.items():
        print(f"{name:<37}  accepted {share(judged(model, make(real.repeat(4, 1, 1, 1)[:1200]))[1]):.1%}")
    digit, sure = judged(model, to_float(made))
    print(f"samples               {len(made):5}  accepted {share(sure):.1%} (aim {aim:.0%})")
    if asked is not None:
        print(f"samples that are the digit asked for: {share(digit == asked):.1%}")
    counts = torch.bincount(digit[sure], minlength=len(data.train.classes)).tolist()
    print("accepted samples by class: " + ", ".join(f"{name} {count}" for name, count in zip(data.train.classes, counts)))
    missing = [data.train.classes[k] for k in data.taught if not counts[k]]
    if missing:
        print(f"never sampled: {', '.join(missing)}")
    return share(sure) >= aim and not missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", type=Path, help="a run (outputs/<name>) or one of its checkpoints/step_... folders")
    parser.add_argument("--n", type=int, default=1000, help="samples (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="of the samples (default: 1)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--data", metavar="PATH", help="where the run's data set lies now, such as a local copy of MNIST")
    parser.add_argument("--aim", type=float, default=0.95, help="share of samples to be accepted (default: 0.95)")
    options = parser.parse_args()
    try:
        found = find(options.ckpt)
        data = data_of(found, options.data)
        began = time.perf_counter()
        model = train(data.train.images, data.train.labels, len(data.train.classes))
        took = time.perf_counter() - began
        print(f"{found.folder}; classifier trained in {took:.0f} s on {len(data.train)} real digits and junk")
        began = time.perf_counter()
        made, asked = samples(found, options.n, options.seed, options.weights)
        print(f"{options.n} samples (seed {options.seed}, {options.weights} weights) in {time.perf_counter() - began:.0f} s")
        torch.manual_seed(1)  # of the junk
        sys.exit(0 if report(model, data, made, asked, options.aim) else 1)
    except UserError as error:
        sys.exit(f"check_digits: {error}")


if __name__ == "__main__":
    main()
