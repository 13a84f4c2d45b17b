"""One sweep from its words to its table: every job is composed and checked first, what is missing runs, all are ranked."""

import itertools
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from diffusion_cli import config, storage
from diffusion_cli.cli import path_in_words
from diffusion_cli.errors import ConfigError, UserError
from diffusion_cli.signatures import check_values, did_you_mean, signature
from diffusion_cli.status import locked, status_of
from diffusion_cli.sweeps import machine, pool, settings, space, table
from diffusion_cli.sweeps.jobs import Job, figure, labels, standing
from diffusion_cli.sweeps.pool import Ended
from diffusion_cli.sweeps.settings import Processes, Sweeper

MANY = 20  # jobs whose check takes long enough to be announced


class Guide(Protocol):
    """Who says what runs next, and whether what runs is worth its time: a study (study.py), or a list and nothing else."""

    def jobs(self) -> Iterator[Job]: ...
    def watch(self, job: Job) -> str: ...
    def ended(self, end: Ended) -> None: ...


class Sweep:
    """launcher: where jobs run; processes: its words, if it is this package's own."""

    def __init__(
        self,
        words: Sweeper,
        master: DictConfig,
        context: HydraContext,
        launcher: Launcher,
        processes: Processes | None,
        arguments: list[str],
    ):
        self.words, self.master, self.context = words, master, context
        self.launcher, self.processes = launcher, processes
        self.cases = space.read_cases(words.cases)
        fixed, self.space = space.parse(words.params, arguments, context.config_loader, self.cases)
        self.fixed = [word for word in fixed if not word.startswith("name=")]
        self.name = str(master.name)
        self.folder = Path(str(master.outputs)) / self.name

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def job(self, number: int, values: Mapping[str, str], label: str) -> Job:
        """Composed and checked. Raises ConfigError, and Hydra's own errors for keys and options that there are not."""
        case = self.cases.get(values.get(space.CASE, ""), ())
        given = [f"{key}={value}" for key, value in values.items() if not (self.cases and key == space.CASE)]
        words = [*case, *self.fixed, *given, f"name={self.name}/{label}"]
        composed = self.context.config_loader.load_sweep_config(self.master, words)
        node = config.plain(OmegaConf.masked_copy(composed, [key for key in map(str, composed) if key != "hydra"]))
        try:
            checked = config.planned(node, words).node
            if self.processes is not None and str(checked["device"]).startswith("cuda:"):
                gpu = str(checked["device"])[5:]
                raise ConfigError(f"device=cuda:{gpu}: a sweep deals out the GPUs: device=auto and hydra.launcher.gpus=[{gpu}]")
        except ConfigError as error:
            raise ConfigError("\n".join(f"{label}: {line}" for line in str(error).splitlines())) from None
        return Job(number, values, tuple(words), checked)

    def listed(self, lists: Sequence[Mapping[str, str]]) -> list[Job]:
        """A job for each, all checked: what is wrong with any is said before the first begins."""
        found, wrong = list[Job](), list[str]()
        if len(lists) > MANY:
            say(f"checking {len(lists)} jobs")
        for number, (values, label) in enumerate(zip(lists, labels(lists), strict=True)):
            try:
                found.append(self.job(number, values, label))
            except ConfigError as error:
                wrong.append(str(error))
        if wrong:
            more = [f"  ... and {len(wrong) - 3} more of {len(lists)} jobs"] if len(wrong) > 3 else []
            raise ConfigError("\n".join([*wrong[:3], *more]))
        return found

    # -- running -------------------------------------------------------------------------------------------------------

    def run_list(self, jobs: list[Job]) -> None:
        """Runs those that are missing or were interrupted."""
        standings = {job.number: standing(job) for job in jobs}
        todo = [job for job in jobs if standings[job.number] != "finished"]
        self.enter(jobs)
        done, again = len(jobs) - len(todo), sum(state == "interrupted" for state in standings.values())
        say(
            f"{path_in_words(self.folder)}: {len(jobs)} jobs"
            + f", {done} finished before" * bool(done)
            + f", {again} go on" * bool(again)
        )
        for job in jobs:
            if standings[job.number] == "finished":
                say(f"  [{job.number + 1}/{len(jobs)}] finished before: {job.folder.name}{_figure(job, self.words.metric)}")
        if todo:
            self.run(_List(todo), len(jobs), batch=len(todo))
        else:
            self._say_table()

    def run(self, guide: Guide, total: int, batch: int) -> None:
        """Runs what the guide says, then ranks what there is. batch: jobs that are sent off together by other launchers.

        Raises UserError if some did not finish, Stopped after a signal.
        """
        storage.make_folder(self.folder)
        unfinished = list[Ended]()
        lock = locked(self.folder)
        try:
            with closing(self._ends(guide, total, batch)) as ends:
                for end in ends:
                    guide.ended(end)
                    self._say_end(end, total)
                    unfinished += [end] if end.state not in ("finished", "pruned") else []
                    table.write_table(self.folder)
        finally:
            lock.close()
            self._say_table()
        if unfinished:
            raise UserError(f"{len(unfinished)} of {total} jobs did not finish: the same command tries them again")

    def enter(self, jobs: Sequence[Job]) -> None:
        """Their names and values in sweep.json."""
        named = {job.folder.name: job.values for job in jobs}
        table.enter(self.folder, named, self.words.metric, self.words.direction)

    def _ends(self, guide: Guide, total: int, batch: int) -> Generator[Ended]:
        if self.processes is None:
            yield from self._sent(guide.jobs(), batch)
            return
        asked = machine.asked_threads()
        slots = machine.deal(_share(str(self.master.device), self.processes), self.processes, total, asked)
        gpus = [slot.gpu for slot in slots if slot.gpu is not None]
        where = f"on GPU {', '.join(gpus)}" if gpus else f"with {slots[0].threads} thread{'s' * (slots[0].threads > 1)} each"
        say(f"  {len(slots)} at a time, {where}; what they say is in job.log of each")
        begins = lambda job: say(f"  [{job.number + 1}/{total}] begins: {job.folder.name}")  # noqa: E731
        yield from pool.run(guide.jobs(), slots, begins, guide.watch)

    def _sent(self, jobs: Iterator[Job], batch: int) -> Iterator[Ended]:
        """By a launcher of Hydra's, which gives back a batch when all of it has ended."""
        number = 0
        while together := list(itertools.islice(jobs, batch)):
            say(f"  {len(together)} jobs are sent off: " + ", ".join(job.folder.name for job in together))
            try:
                self.launcher.launch([job.words for job in together], initial_job_idx=number)
            except Exception as error:  # of one job that died hard, or of the cluster; the runs' own words say what ended well
                say(f"  {type(self.launcher).__name__}: {next(iter(str(error).splitlines()), type(error).__name__)}")
            number += len(together)
            for job in together:
                status = status_of(job.folder)
                state = status.get("state", "failed")
                yield Ended(job, "failed" if state == "running" else state, str(status.get("reason", "it left no word")), 0.0)

    def _say_table(self) -> None:
        text = table.write_table(self.folder)
        if text:
            here = path_in_words(self.folder)
            say(f"\n{text}\n\n{here}/sweep.csv; diffusion-report {here} draws it")
        known = {name for run in table.record(self.folder).runs for name in status_of(self.folder / run).get("figures", {})}
        if known and self.words.metric not in (None, *known):
            near = did_you_mean(str(self.words.metric), known)
            say(f"the order is not by hydra.sweeper.metric={self.words.metric}, which no run reports: {near}")

    def _say_end(self, end: Ended, total: int) -> None:
        took = f" after {end.seconds:.0f} s" if end.seconds else ""
        tail = _figure(end.job, self.words.metric) if end.state == "finished" else f": {end.reason}"
        say(f"  [{end.job.number + 1}/{total}] {end.state}{took}: {end.job.folder.name}{tail}")
        if end.state == "failed" and self.processes is not None:
            say(f"      see {path_in_words(end.job.folder / 'job.log')}")


class _List:
    """Jobs in their order, each to its end."""

    def __init__(self, jobs: list[Job]):
        self._jobs = jobs

    def jobs(self) -> Iterator[Job]:
        return iter(self._jobs)

    def watch(self, job: Job) -> str:
        return ""

    def ended(self, end: Ended) -> None:
        pass


def read(schema: str, hydra: DictConfig, own_launcher: bool) -> tuple[Sweeper, Processes | None]:
    """The words of hydra.sweeper and, if the launcher is this package's own, of hydra.launcher. Raises ConfigError."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise ConfigError(f"WORLD_SIZE={world}: a sweep starts its own processes, so it goes without torchrun")
    nodes = {"sweeper": schema} | ({"launcher": "Processes"} if own_launcher else {})
    plain = {part: config.plain(hydra[part]) for part in nodes}
    wrong = [
        line
        for part, name in nodes.items()
        for line in check_values(plain[part], signature(f"{settings.__name__}.{name}"), f"hydra.{part}")
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    made = [
        getattr(settings, name)(**{key: value for key, value in plain[part].items() if key != "_target_"})
        for part, name in nodes.items()
    ]
    return made[0], made[1] if own_launcher else None


def say(line: str) -> None:
    print(line, flush=True)


def _share(device: str, words: Processes) -> machine.Machine:
    """This machine; without its GPUs where the jobs are told to stay away from them."""
    found = machine.this_machine()
    return machine.Machine(found.cores, found.memory, ()) if device == "cpu" else found


def _figure(job: Job, metric: str | None) -> str:
    found = figure(status_of(job.folder).get("figures", {}), metric)
    return f"  {found[0]} {found[1]:.4g}" if found else ""
