"""The words of hydra.sweeper and hydra.launcher: each class is the schema of a file in configs/hydra. Free of torch."""

from dataclasses import dataclass
from typing import Literal

from diffusion_cli.ranges import NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class Processes:
    """hydra/launcher=processes: how this machine is shared."""

    jobs: PositiveInt | Literal["auto"]
    threads: PositiveInt | Literal["auto"]
    gpus: tuple[NonNegativeInt | str, ...] | Literal["auto"]


@dataclass(frozen=True)
class Sweeper:
    """What every sweeper is told. cases: words of the command line by the name of a case; the key `case` is swept over them;
    metric: None is the first of the usual ones that the runs report."""

    params: dict
    cases: dict
    metric: str | None
    direction: Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Grid(Sweeper):
    """hydra/sweeper=grid."""


@dataclass(frozen=True)
class Random(Sweeper):
    """hydra/sweeper=random."""

    trials: PositiveInt
    seed: NonNegativeInt


@dataclass(frozen=True)
class Optuna(Sweeper):
    """hydra/sweeper=optuna. warmup: in steps of training, like the figures that a pruner compares."""

    trials: PositiveInt | None
    seed: NonNegativeInt
    sampler: Literal["tpe", "random", "grid"]
    pruner: Literal["none", "median", "halving", "hyperband"]
    startup: NonNegativeInt
    warmup: NonNegativeInt
    batch: PositiveInt


@dataclass(frozen=True)
class Interval:
    """A range in a sweep's file: {low: 1e-5, high: 1e-2, log: true}; of whole numbers if both ends are."""

    low: float
    high: float
    log: bool = False
    step: PositiveFloat | None = None
