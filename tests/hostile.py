"""What a stranger could send (hostile_models.py, hostile_files.py), and the process that meets it.

`python hostile.py FOLDER KIND ...` warms up with harmless cases and runs each of the hostile ones in a fork, under limits, with
an audit hook that hears every process, socket, unpickling and write; test_hostile.py judges what it tells.
"""

import contextlib
import copy
import io
import json
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from hostile_files import _folder, _parquet, _reported, configs, datasets, pictures, reports, runs
from hostile_models import DDPM, PIPE, _pipeline, files, pipelines, targets, values
from hostile_parts import EVALUATE, REFUSED, SAMPLE, SEEN, TINY, Case, _encoded, a_run, told

KINDS: dict[str, Callable[[], Iterator[Case]]] = {
    "targets": targets, "values": values, "files": files, "pipelines": pipelines, "pictures": pictures, "datasets": datasets,
    "reports": reports, "runs": runs, "configs": configs,
}  # fmt: skip
HARMLESS = [
    Case("sample", told(a_run, SAMPLE), (0,)),
    Case("evaluate", told(a_run, EVALUATE), (0,)),
    Case("export", told(a_run, ["export", "ckpt=run"]), (0,)),
    Case("train", told(lambda here: None, TINY), (0,)),
    Case("init", told(a_run, [*SAMPLE, "init=given.png"]), REFUSED),
    Case("folder", told(lambda here: _folder(here, b""), [*SEEN, "dataset=folder", "dataset.path=pictures", "dataset.size=8",
        "dataset.channels=1"]), (0,)),
    Case("csv", told(lambda here: _folder(here, b"", b"file_name\n0.png\n", "csv"), [*SEEN, "dataset=folder",
        "dataset.path=pictures", "dataset.size=8", "dataset.channels=1"]), (0,)),
    Case("parquet", told(lambda here: _parquet(here, [{"bytes": _encoded("PNG", 8, 8), "path": None}] * 3), [*SEEN,
        "dataset=parquet", "dataset.path=set.parquet", "dataset.size=8", "dataset.channels=1"]), (0,)),
    Case("report", told(lambda here: _reported(here, _encoded("PNG", 8, 8), config__yaml=b"a: 1\n"),
        ["report", "runs=[mine]"]), (0,)),
    Case("pipeline", told(_pipeline(DDPM), PIPE)),
]  # fmt: skip


# -- the process that meets them ---------------------------------------------------------------------------------------

PROCESSES = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen",
             "pickle.find_class", "marshal.loads", "ctypes.dlopen",
             "socket.connect", "socket.getaddrinfo", "socket.bind", "webbrowser.open")  # fmt: skip
CHANGES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
)


class Told(NamedTuple):
    """What became of a case. heard: what no case may do; modules: what it imported; more: MB beyond the program's own."""

    name: str
    code: Any
    said: str
    heard: list[str]
    modules: list[str]
    more: float
    seconds: float


def _ears(here: Path, heard: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    caches = [os.path.realpath(os.environ[name]) for name in ("HF_HOME", "XDG_CACHE_HOME") if name in os.environ]
    inside = (os.path.realpath(here), *caches, "/dev/")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in PROCESSES:
            heard.append(f"{event} {str(arguments)[:120]}")
        elif event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                whole = os.path.realpath(path) if isinstance(path, str | os.PathLike) else ""
                if event == "open" and isinstance(path, str | os.PathLike) and os.path.islink(path):
                    continue  # asked before the link is refused; `contents` says whether something was written through it
                if whole and (event in CHANGES or arguments[2] & os.O_NOFOLLOW):  # of the link itself
                    whole = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
                if whole and not whole.startswith(inside):
                    heard.append(f"{event} {whole}")

    return hook


@cache
def composed(command: str, words: tuple[str, ...]) -> dict[str, Any]:
    """The plain config of a command line that many cases share: composing takes longer than most cases."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from diffusion_cli import config

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        return config.plain(hydra.compose(command, list(words)))


def asked(words: list[str]) -> None:
    """What the command does with its words. Raises UserError or SystemExit."""
    from diffusion_cli import config
    from diffusion_cli.commands import sample, train
    from diffusion_cli.evaluation.run import evaluate
    from diffusion_cli.exporting import export
    from diffusion_cli.report.making import make
    from diffusion_cli.sampling import sample as draw
    from diffusion_cli.training import train as fit

    if "main" in words:
        sys.argv = [f"diffusion-{words[0]}", *(word for word in words[1:] if word != "main")]
        {"sample": sample, "train": train}[words[0]].main()
        return
    node = copy.deepcopy(composed(words[0], tuple(words[1:])))
    {
        "train": lambda: fit(config.planned(node, words[1:])),
        "sample": lambda: draw(config.check_sample(node)),
        "evaluate": lambda: evaluate(config.check_evaluate(node)),
        "export": lambda: export(config.check_export(node)),
        "report": lambda: make(config.check_report(node)),
    }[words[0]]()


def met(case: Case, words: list[str], here: Path) -> Told:
    """One case whose files are there, in this process, in the current folder."""
    from diffusion_cli import cli
    from diffusion_cli.errors import UserError, advising_on_memory

    heard, before, began = list[str](), set(sys.modules), time.monotonic()
    sys.addaudithook(_ears(here, heard))
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            with advising_on_memory("a smaller batch", "fewer pictures"):  # as cli.run has it
                asked(words)
        except UserError as error:
            code = cli.tell("diffusion", error)
        except SystemExit as error:
            code = error.code  # type: ignore[assignment]
        except BaseException:
            said.write(traceback.format_exc()[-1500:])
            code = -1
    listened = list(heard)
    new = [name for name in set(sys.modules) - before if name.partition(".")[0] not in ("diffusion_cli", "encodings")]
    return Told(case.name, code, said.getvalue()[-2500:], listened, new, 0, time.monotonic() - began)


def forked(case: Case, root: Path) -> Told:
    here = root / "here"
    shutil.rmtree(root, ignore_errors=True)
    here.mkdir(parents=True)
    shutil.copytree(root.parent / "outside", root / "outside")
    words = case.make(here)
    if "main" not in words:
        with contextlib.suppress(Exception):  # here once, and not in each fork
            composed(words[0], tuple(words[1:]))
    base = held()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.chdir(here)
        most = held(0) * 2**20 + 2**30
        resource.setrlimit(resource.RLIMIT_AS, (int(most), int(most)))  # the machine is not to suffer from a defect
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
        found = met(case, words, here)
        with os.fdopen(write, "w") as file:
            file.write(json.dumps(found))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    _, status, used = os.wait4(child, 0)
    more = used.ru_maxrss / 1024 - base
    if not text:
        return Told(case.name, f"ended by {os.waitstatus_to_exitcode(status)}", "", [], [], more, 0)
    found = Told(*json.loads(text))._replace(more=round(more, 1), seconds=round(json.loads(text)[-1], 2))
    changed = contents(root / "outside") != contents(root.parent / "outside")
    told = any(b"SECRET" in page.read_bytes() for page in here.rglob("report.html") if not page.is_symlink())
    more_heard = ["something outside was written"] * changed + ["a report carries what lies outside"] * told
    return found._replace(heard=[*found.heard, *more_heard])


def held(which: int = 1) -> float:
    """MB of this process: 0 reserved, 1 in memory."""
    return int(Path("/proc/self/statm").read_text().split()[which]) * resource.getpagesize() / 2**20


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main(root: Path, kinds: list[str]) -> None:
    out = os.fdopen(os.dup(1), "w")
    (root / "outside").mkdir(parents=True)
    (root / "outside" / "secret.json").write_text('{"secret": "SECRET"}')
    (root / "outside" / "secret.yaml").write_text("# secret\nseed: 7\n")
    (root / "outside" / "secret.png").write_bytes(_encoded("PNG", 8, 8))
    for k, case in enumerate(HARMLESS):
        here = root / f"warm{k}"
        here.mkdir()
        os.chdir(here)
        found = met(case, case.make(here), here)
        out.write(json.dumps(found._replace(modules=[], heard=[])) + "\n")
    sys.stdout.flush()
    for kind in kinds:
        for case in KINDS[kind]():
            out.write(json.dumps(forked(case, root / "case")) + "\n")
            out.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
