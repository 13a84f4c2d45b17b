"""The words of the command line that are not objects: their types, ranges and defaults. Free of torch.

Each class is the schema of a node of configs/train.yaml or configs/sample.yaml, read like any constructor's signature.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffusion_cli.pace import Pace
from diffusion_cli.ranges import Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from diffusion_cli.signatures import default_of, shown


@dataclass(frozen=True)
class Trainer:
    """Cadences are in steps; 0 is never (but at the end)."""

    steps: PositiveInt | None
    images: PositiveInt | None
    minutes: PositiveFloat | None
    batch: PositiveInt
    accumulate: PositiveInt
    report_every: PositiveInt
    preview_every: NonNegativeInt
    evaluate_every: NonNegativeInt
    save_every: NonNegativeInt
    keep: PositiveInt
    preview: PositiveInt
    evaluate: PositiveInt
    metrics: tuple[
        Literal[
            "fid", "kid", "inception_score", "precision", "recall", "density", "coverage", "class_accuracy",
            "sliced_wasserstein", "clip_score", "clip_score_shuffled",
        ],
        ...,
    ]  # fmt: skip
    metrics_every: NonNegativeInt
    metrics_n: PositiveInt
    best: str | None
    patience: PositiveInt | None
    stall: PositiveFloat
    batch_doublings: tuple[PositiveInt, ...] = ()

    @property
    def pace(self) -> Pace:
        return Pace(self.batch, self.batch_doublings)

    @property
    def end(self) -> int | None:
        """The last step, by whichever of steps and images is first; None where minutes alone end the run."""
        limits = [] if self.steps is None else [self.steps]
        if self.images is not None:
            limits.append(self.pace.steps(self.images))
        return min(limits) if limits else None

    @property
    def total(self) -> int:
        """The same for what counts down to it: out of reach where there is none."""
        return 2**62 if self.end is None else self.end

    def reached(self, step: int, seconds: float) -> bool:
        """Whether a run that made so many steps in so many seconds of training is at its end."""
        return step >= self.total or (self.minutes is not None and seconds >= 60 * self.minutes)


@dataclass(frozen=True)
class Train:
    """The root of train.yaml, but for its groups."""

    name: str | None
    seed: NonNegativeInt
    device: str
    compile: bool | Literal["auto"]
    convolutions: Literal["auto", "torch", "winograd"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    cuda_graph: bool | Literal["auto"]
    recompute: bool
    profile: bool
    resume: Literal["auto", "always", "never"]
    preview: Literal["data"] | None
    outputs: str
    trust: tuple[str, ...]
    init: str | None
    init_weights: Literal["ema", "raw"] | None
    init_digest: str | None


@dataclass(frozen=True)
class Sample:
    """The root of sample.yaml, but for its groups."""

    ckpt: str
    n: PositiveInt
    seed: NonNegativeInt
    batch: PositiveInt
    out: str | None
    label: str | int | tuple[str | int, ...] | None
    prompt: str | tuple[str, ...] | None
    prompts: str | None
    negative: str | None
    init: str | None
    strength: Fraction | None
    vary: Fraction | None
    between: tuple[NonNegativeInt | str, ...] | None
    weights: Literal["ema", "raw"] | PositiveFloat
    trajectory: bool
    animation: Literal["gif", "webp"]
    snapshots: tuple[NonNegativeInt, ...]
    nearest: NonNegativeInt
    data: str | None
    format: Literal["png", "npz", "safetensors", "parquet"]
    shard: PositiveInt
    device: str
    compile: bool | Literal["auto"]
    convolutions: Literal["auto", "torch", "winograd"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    trust: tuple[str, ...]

    @property
    def tells(self) -> bool:
        """Whether it says what the pictures show."""
        return any(word is not None for word in (self.label, self.prompt, self.prompts))


@dataclass(frozen=True)
class Evaluate:
    """The root of evaluate.yaml, but for its groups."""

    ckpt: str
    metrics: tuple[
        Literal[
            "denoising", "bound", "bits", "vlb", "reconstruction",
            "fid", "kid", "inception_score", "precision", "recall", "density", "coverage", "class_accuracy",
            "sliced_wasserstein", "clip_score", "clip_score_shuffled",
        ],
        ...,
    ]  # fmt: skip
    n: PositiveInt | None
    repeats: PositiveInt
    split: Literal["train", "test"] | None
    data: str | None
    seed: NonNegativeInt
    batch: PositiveInt
    levels: PositiveInt
    tolerance: PositiveFloat
    weights: Literal["ema", "raw"] | PositiveFloat
    out: str | None
    device: str
    compile: bool | Literal["auto"]
    convolutions: Literal["auto", "torch", "winograd"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    trust: tuple[str, ...]


@dataclass(frozen=True)
class Export:
    """The root of export.yaml."""

    ckpt: str
    to: Literal["folder", "diffusers", "safetensors", "onnx", "torch_export", "hub"]
    out: str | None
    weights: Literal["ema", "raw"] | PositiveFloat
    label: str | int | None
    steps: PositiveInt | None
    licence: str | None
    repo: str | None
    form: Literal["folder", "diffusers", "safetensors", "onnx", "torch_export"]
    private: bool
    trust: tuple[str, ...]

    @property
    def written(self) -> str:
        """What lies in the folder: `to`, and for the hub the form that is pushed there."""
        return self.form if self.to == "hub" else self.to


@dataclass(frozen=True)
class Measurement:
    """What is measured of a checkpoint, all checked. sampler: as in Request; features: None where none are asked for."""

    root: Evaluate
    features: dict[str, Any] | None
    sampler: dict[str, Any]
    guidance: dict[str, Any]

    def request(self) -> "Request":
        """As diffusion-sample would be asked for such pictures."""
        root = self.root
        sample = Sample(
            ckpt=root.ckpt, n=1, seed=root.seed, batch=root.batch, out=None, label=None,
            prompt=None, prompts=None, negative=None, init=None, strength=None, vary=None,
            between=None, weights=root.weights, trajectory=False, animation="gif", snapshots=(), nearest=0, data=root.data,
            format="png", shard=1, device=root.device, compile=root.compile,
            convolutions=root.convolutions, precision=root.precision, trust=root.trust,
        )  # fmt: skip
        return Request(sample, self.sampler, self.guidance, None)


@dataclass(frozen=True)
class Report:
    """The root of report.yaml."""

    runs: tuple[str, ...]
    out: str | None


@dataclass(frozen=True)
class Request:
    """What is asked of a checkpoint, all checked: the words, and the nodes of what they name.

    sampler: without _target_ it only changes the checkpoint's own; edit: None where nothing binds the walk.
    """

    root: Sample
    sampler: dict[str, Any]
    guidance: dict[str, Any]
    edit: dict[str, Any] | None


@dataclass(frozen=True)
class Plan:
    """A training run, all checked. node: the whole config as plain dictionaries."""

    root: Train
    trainer: Trainer
    node: dict[str, Any]


# what may change between two launches of the same run; all else is frozen
_FREE = re.compile(
    r"name|device|compile|convolutions|precision|cuda_graph|recompute|profile|resume|preview|outputs|trust"
    r"|(distributed|sampler|guidance)\b.*"
    r"|objective\.(cache|method\.teacher)"
    r"|dataset\.(path|workers|memory)|features\b.*"
    r"|trainer\.(steps|images|minutes|keep|preview|evaluate|metrics|metrics_n|best|patience|stall|\w+_every)"
)

_SETTINGS = {"trainer": "diffusion_cli.settings.Trainer"}  # nodes without _target_ -> their schema


def flat(node: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        inside = f"{path}.{key}" if path else str(key)
        found |= flat(value, inside) if isinstance(value, Mapping) else {inside: value}
    return found


def frozen_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys that may not change within a run and did, one line each. One that an older program did not know had the value
    that it has where nothing is said."""
    old, new = flat(before), flat(now)
    same = lambda key: old.get(key) == new.get(key) or (key not in old and _unsaid(now, key) == new[key])  # noqa: E731
    keys = [key for key in dict.fromkeys([*old, *new]) if not _FREE.fullmatch(key) and not same(key)]
    return [f"{key}: {shown(old.get(key))} in the run, {shown(new.get(key))} now" for key in keys]


def _unsaid(node: Mapping[str, Any], path: str) -> object:
    """The default of the constructor's argument at a path; ... where there is none."""
    *folders, key = path.split(".")
    for folder in folders:
        node = node[folder]
    target = node.get("_target_", _SETTINGS.get(".".join(folders)))
    found = ... if target is None else default_of(target, key)
    return list(found) if isinstance(found, tuple) else found
