"""What Hydra finds of this package: a launcher and sweepers. It takes plugins from the namespace package hydra_plugins alone.

Every Hydra application in the environment reads this file when it starts, so it imports next to nothing: the work is in
diffusion_cli/sweeps, the words and their meaning in configs/hydra.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from diffusion_cli.sweeps.sweep import Sweep


class Processes(Launcher):
    """One process per job, for this package's sweepers, which hand it what they have checked (sweeps/sweep.py)."""

    def __init__(self, **words: Any):
        pass  # read from the config, where they can be checked

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        pass

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from diffusion_cli.errors import ConfigError

        raise ConfigError(
            "hydra/launcher=processes goes with hydra/sweeper=grid, random or optuna; for others: hydra/launcher=basic"
        )


class _OwnSweeper(Sweeper):
    schema: str  # the class of its words in sweeps/settings.py

    def __init__(self, **words: Any):
        pass

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from diffusion_cli.sweeps.sweep import Sweep, read

        words, processes = read(self.schema, self.config.hydra, isinstance(self.launcher, Processes))
        self.go(Sweep(words, self.config, self.hydra_context, self.launcher, processes, arguments))

    @abstractmethod
    def go(self, sweep: "Sweep") -> None:
        """Runs it."""


class Grid(_OwnSweeper):
    schema = "Grid"

    def go(self, sweep: "Sweep") -> None:
        from diffusion_cli.sweeps.space import grid

        sweep.run_list(sweep.listed(grid(sweep.space)))


class Random(_OwnSweeper):
    schema = "Random"

    def go(self, sweep: "Sweep") -> None:
        from diffusion_cli.sweeps.space import draws

        sweep.run_list(sweep.listed(draws(sweep.space, sweep.words.seed, sweep.words.trials)))


class Optuna(_OwnSweeper):
    schema = "Optuna"

    def go(self, sweep: "Sweep") -> None:
        from diffusion_cli.sweeps.study import search

        search(sweep)
