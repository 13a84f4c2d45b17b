"""What a sweep decides before, between and after its jobs: pure, or with processes of a few lines instead of training."""

import csv
import json
import os
import signal
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffusion_cli.config import CONFIGS
from diffusion_cli.errors import ConfigError, Stopped, StorageError
from diffusion_cli.signatures import check_values, signature
from diffusion_cli.status import locked, note_failure, status_of, write_status
from diffusion_cli.sweeps import pool, table
from diffusion_cli.sweeps.jobs import Job, figure, label, labels, standing
from diffusion_cli.sweeps.machine import Machine, Slot, deal, this_machine
from diffusion_cli.sweeps.settings import Processes
from diffusion_cli.sweeps.space import Choice, Interval, corners, draw, draws, grid, parse, read_cases, written

# -- sharing a machine -------------------------------------------------------------------------------------------------

AUTO = Processes("auto", "auto", "auto")
GB = 1e9


def test_each_gpu_has_one_job() -> None:
    slots = deal(Machine(16, 64 * GB, ("0", "1", "3")), AUTO, jobs=10)
    assert [slot.gpu for slot in slots] == ["0", "1", "3"] and {slot.threads for slot in slots} == {5}
    assert [slot.gpu for slot in deal(Machine(16, 64 * GB, ("0", "1", "3")), AUTO, jobs=2)] == ["0", "1"]


def test_more_jobs_than_gpus_share_them_in_turn() -> None:
    slots = deal(Machine(8, 64 * GB, ("4", "5")), Processes(4, "auto", "auto"), jobs=None)
    assert slots == [Slot(2, "4"), Slot(2, "5"), Slot(2, "4"), Slot(2, "5")]


def test_gpus_that_are_asked_for_are_dealt_out() -> None:
    fake = Machine(8, 64 * GB, ("0", "1"))
    assert [slot.gpu for slot in deal(fake, Processes("auto", "auto", (7, "MIG-ab")), jobs=9)] == ["7", "MIG-ab"]
    assert {slot.gpu for slot in deal(fake, Processes("auto", "auto", ()), jobs=9)} == {None}


def test_cores_and_memory_are_divided() -> None:
    assert deal(Machine(8, 64 * GB, ()), AUTO, jobs=None) == [Slot(1)] * 8
    assert deal(Machine(8, 64 * GB, ()), AUTO, jobs=3) == [Slot(2)] * 3
    assert deal(Machine(8, 4 * GB, ()), AUTO, jobs=None) == [Slot(4)] * 2, "memory for two"
    assert deal(Machine(8, 0.1 * GB, ()), AUTO, jobs=None) == [Slot(8)], "one at least"
    assert deal(Machine(8, 64 * GB, ()), Processes("auto", 4, "auto"), jobs=None) == [Slot(4)] * 2
    assert deal(Machine(8, 64 * GB, ()), AUTO, jobs=None, threads=2) == [Slot(2)] * 4, "OMP_NUM_THREADS of the user"
    assert deal(Machine(2, 64 * GB, ()), Processes(3, "auto", "auto"), jobs=None) == [Slot(1)] * 3, "as asked"


def test_this_machine_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    found = this_machine()
    assert found.gpus == ("2", "5") and 1 <= found.cores <= (os.cpu_count() or 1) and found.memory > 1e6
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert this_machine().gpus == ()


# -- the space ---------------------------------------------------------------------------------------------------------


def test_a_file_and_the_command_line_say_the_same() -> None:
    params = {
        "optimizer.lr": {"low": 1e-5, "high": 1e-2, "log": True},
        "model.width": [16, 24],
        "seed": "range(0,3)",
        "optimizer.betas": [[0.9, 0.99], [0.9, 0.999]],
        "trainer.batch": {"low": 8, "high": 64},
    }
    words = [
        "optimizer.lr=tag(log, interval(1e-5, 1e-2))", "model.width=choice(16,24)", "seed=0,1,2",
        "optimizer.betas=[0.9,0.99],[0.9,0.999]", "trainer.batch=int(interval(8, 64))", "trainer.steps=5",
    ]  # fmt: skip
    fixed, told = parse({}, words)
    assert fixed == ["trainer.steps=5"] and told == parse(params, [])[1]
    assert told["trainer.batch"] == Interval(8, 64, whole=True) and told["seed"] == Choice(("0", "1", "2"))


def test_the_command_line_wins_over_the_file() -> None:
    params = {"seed": "1,2", "optimizer.lr": [1, 2]}
    assert parse(params, ["seed=7"]) == (["seed=7"], {"optimizer.lr": Choice(("1", "2"))})
    assert parse(params, ["seed=7,8"])[1]["seed"] == Choice(("7", "8"))


@pytest.mark.parametrize(
    ("params", "words", "said"),
    [
        ({"a": {"lo": 1, "high": 2}}, [], "hydra.sweeper.params.a.lo is not an option of Interval: did you mean low?"),
        ({"a": {"low": 1}}, [], "hydra.sweeper.params.a.high is missing"),
        ({"a": {"low": "x", "high": 2}}, [], "hydra.sweeper.params.a.low is x: it must be a number"),
        ({"a": {"low": 2, "high": 1}}, [], "goes from 2 to 1: the lower end comes first"),
        ({"a": {"low": 0, "high": 1, "log": True}}, [], "a logarithm needs low > 0"),
        ({"a": {"low": 1, "high": 3, "log": True, "step": 1}}, [], "both log and step"),
        ({"a": []}, [], "hydra.sweeper.params.a is empty"),
        ({"a": "[1"}, [], "hydra.sweeper.params.a is [1: the value cannot be read"),
        ([1], [], "hydra.sweeper.params is [1]: it must be a list of key: values"),
        ({}, ["a=interval(2,1)"], "a=interval(2,1): goes from 2 to 1"),
        ({}, ["name=a,b"], "name cannot be swept"),
    ],
)
def test_a_wrong_space_is_said(params: object, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(params, words)
    assert said in str(caught.value)


def test_cases_are_a_key_of_their_own() -> None:
    cases = read_cases({"plain": [], "muon": ["optimizer=muon", "optimizer.lr=0.02"]})
    assert cases == {"plain": (), "muon": ("optimizer=muon", "optimizer.lr=0.02")}
    assert grid(parse({"seed": "0,1"}, [], None, cases)[1])[1:3] == [
        {"case": "plain", "seed": "1"},
        {"case": "muon", "seed": "0"},
    ]
    assert parse({}, ["case=muon"], None, cases) == ([], {"case": Choice(("muon",))})
    assert parse({}, ["case=muon,plain", "seed=3"], None, cases) == (["seed=3"], {"case": Choice(("muon", "plain"))})
    assert parse({}, ["case=muon"]) == (["case=muon"], {}), "a key like any other where there are no cases"
    with pytest.raises(ConfigError, match="case=moun: did you mean muon"):
        parse({}, ["case=moun,plain"], None, cases)
    for wrong in ({"a/b": []}, {"a": "optimizer=muon"}, {"a": [1]}, {"a": None}):
        with pytest.raises(ConfigError, match="a case is a name and a list of words"):
            read_cases(wrong)


def test_grid_is_the_product_once() -> None:
    assert grid({"a": Choice(("1", "2", "1")), "b": Interval(0, 1, step=0.5)}) == [
        {"a": a, "b": b} for a in "12" for b in ("0.0", "0.5", "1.0")
    ]
    with pytest.raises(ConfigError, match="a grid needs values"):
        grid({"a": Interval(0, 1)})


def test_draws_are_inside_and_stay() -> None:
    space = {
        "lr": Interval(1e-5, 1e-2, log=True),
        "n": Interval(8, 64, whole=True),
        "s": Choice(("a", "b")),
        "d": Interval(0, 1, step=0.25),
    }
    found = draws(space, seed=3, count=400)
    assert len(found) == 400 and found[:10] == draws(space, 3, 10) != draws(space, 4, 10)
    assert draw({"lr": space["lr"]}, 3, 0)["lr"] == draw(space, 3, 0)["lr"], "whatever the other keys are"
    rates = sorted(float(values["lr"]) for values in found)
    assert rates[0] >= 1e-5 and rates[-1] <= 1e-2 and 1e-4 < rates[200] < 1e-3, "the median of a log-uniform is 10^-3.5"
    assert {int(values["n"]) for values in found} == set(range(8, 65))
    assert {values["d"] for values in found} == {"0.0", "0.25", "0.5", "0.75", "1.0"}
    assert len(draws({"s": space["s"]}, 0, 50)) == 2, "not twice the same"


def test_corners_are_every_end() -> None:
    space = {"a": Choice(("1", "2", "3")), "b": Interval(0, 1)}
    assert corners(space) == [{"a": a, "b": b} for a in "123" for b in ("0.0", "1.0")]
    many = {str(key): Choice(tuple(map(str, range(9)))) for key in range(4)}
    assert {(key, value) for values in corners(many) for key, value in values.items()} == {
        (k, str(v)) for k in many for v in range(9)
    }


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text("ab c,=[]{}'\"\\", max_size=6),
        lambda inside: st.lists(inside, max_size=3),
    )
)
def test_values_of_a_file_survive_the_command_line(value: object) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = ("", " ", "null", "true", "false")
    if isinstance(value, str) and value.lower() in words:
        return
    assert OverridesParser.create().parse_override(f"key={written([value])}").value() == [value]


@pytest.mark.parametrize("file", sorted((CONFIGS / "hydra").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_files_of_hydra_have_the_words_of_their_class(file: Path) -> None:
    node = yaml.safe_load(file.read_text())
    schema = signature(f"diffusion_cli.sweeps.settings.{node['_target_'].rpartition('.')[2]}")
    assert check_values(node, schema, "") == [] and set(node) - {"_target_"} == set(schema.parameters)


# -- names and standings -----------------------------------------------------------------------------------------------


def job(folder: Path, number: int = 0, node: dict[str, object] | None = None) -> Job:
    """A job whose run is that folder."""
    whole = {"outputs": str(folder.parent), "name": folder.name, "device": "cpu", **(node or {})}
    return Job(number, {"n": str(number)}, ("sweep=x", f"n={number}"), whole)


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["seed", "optimizer.lr", "loss/times"]), st.text(max_size=90)),
        unique_by=str,
        max_size=6,
    )
)
def test_names_are_folders_and_all_different(lists: list[dict[str, str]]) -> None:
    found = labels(lists)
    assert len(set(found)) == len(lists)
    assert all(len(name) <= 110 and not set(name) & set("=,/ ") for name in found)


def test_a_name_stays_when_the_sweep_grows() -> None:
    assert label({"schedule": "vp", "optimizer.lr": "1e-4"}) == "schedule_vp-lr_1e-4"
    assert labels([{"a": "1"}, {"a": "2"}])[0] == labels([{"a": "1"}])[0]


def test_the_command_of_one_job_runs_it_alone(tmp_path: Path) -> None:
    assert job(tmp_path / "x").command == "diffusion-train hydra.mode=RUN sweep=x n=0"


def test_what_is_missing(tmp_path: Path) -> None:
    node = {"seed": 1, "trainer": {"steps": 5, "images": None, "minutes": None, "keep": 2}, "betas": (0.9, 0.99)}
    one = job(tmp_path / "run", node=node)
    assert standing(one) == "missing"
    write_status(one.folder.parent, "x", 0)  # a status elsewhere means nothing
    (one.folder / "checkpoints").mkdir(parents=True)
    (one.folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(one.node))))
    write_status(one.folder, "running", 3)
    assert standing(one) == "interrupted"
    write_status(one.folder, "finished", 5)
    assert standing(one) == "finished"
    longer = {**node, "trainer": {**node["trainer"], "steps": 9}}  # type: ignore[dict-item]
    assert standing(job(one.folder, node=longer)) == "interrupted"
    with pytest.raises(ConfigError, match=r"other settings .*seed: 1 in the run, 2 now"):
        standing(job(one.folder, node={**node, "seed": 2}))


def test_a_folder_is_one_process_s(tmp_path: Path) -> None:
    lock = locked(tmp_path)
    with pytest.raises(StorageError, match=f"in use by another process .pid {os.getpid()}"):
        locked(tmp_path)
    lock.close()
    locked(tmp_path).close()


# -- the table ---------------------------------------------------------------------------------------------------------


def sweep_of(folder: Path, metric: str | None = None, direction: str = "minimize") -> None:
    found = {"a": 0.3, "b": 0.1, "c": float("nan"), "d": 0.2}
    for name, value in found.items():
        write_status(
            folder / name if (folder / name).mkdir() is None else folder,
            "finished",
            5,
            figures={"evaluate/x0_mse": value, "evaluate/fid": -value},
        )
    for name, state in (("e", "failed"), ("f", "pruned"), ("g", "preempted")):
        note_failure(folder / name, f"because of {name}\nand more", state)
    table.enter(folder, {name: {"optimizer.lr": f"1e-{i}"} for i, name in enumerate("abcdefgh")}, metric, direction)


@pytest.mark.parametrize(
    ("metric", "direction", "order"),
    [(None, "minimize", "bdacfeg"), ("evaluate/fid", "minimize", "adbcfeg"), ("evaluate/x0_mse", "maximize", "adbcfeg")],
)
def test_the_best_is_first(metric: str | None, direction: str, order: str, tmp_path: Path) -> None:
    sweep_of(tmp_path, metric, direction)
    text = table.write_table(tmp_path)
    rows = list(csv.reader((tmp_path / "sweep.csv").open()))
    assert "".join(row[0] for row in rows[1:]) == order, "finished by the figure, without it, pruned, failed and waiting"
    assert rows[0] == [
        "run",
        "state",
        "step",
        "optimizer.lr",
        metric or "evaluate/x0_mse",
        *({"evaluate/x0_mse", "evaluate/fid"} - {metric or "evaluate/x0_mse"}),
        "reason",
    ]
    assert [line.split()[0] for line in text.splitlines()] == ["run", *order]
    assert dict(zip(rows[0], rows[6], strict=True))["reason"] == "because of e"
    said = json.loads((tmp_path / "sweep.json").read_text())
    assert said["metric"] == (metric or "evaluate/x0_mse") and said["direction"] == direction
    assert said["runs"] == list("abcdefgh") and said["swept"] == ["optimizer.lr"]


def test_later_launches_add_to_the_record(tmp_path: Path) -> None:
    table.enter(tmp_path, {"a": {"seed": "1"}}, None, "minimize")
    table.enter(tmp_path, {"b": {"seed": "2", "optimizer.lr": "3"}}, "evaluate/fid", "maximize")
    said = table.record(tmp_path)
    assert (said.runs, said.swept, said.metric, said.direction) == (
        ("a", "b"),
        ("seed", "optimizer.lr"),
        "evaluate/fid",
        "maximize",
    )
    note_failure(tmp_path / "a", "x")
    (tmp_path / "a" / "config.yaml").write_text("optimizer: {lr: 0.5}\n")
    table.write_table(tmp_path)
    first = next(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert first["optimizer.lr"] == "0.5", "what it was not given, its config says"
    (tmp_path / "sweep.json").write_text("{")
    assert table.record(tmp_path) == table.Record() and table.write_table(tmp_path) == ""


def test_the_usual_figure_is_on_held_out_pictures() -> None:
    found = {"train/loss": 0.0, "evaluate_on_train/x0_mse": 1.0, "evaluate/cross_entropy": 2.0}
    assert figure(found, None) == ("evaluate/cross_entropy", 2.0) and figure(found, "train/loss") == ("train/loss", 0.0)
    assert figure({}, None) is None


# -- processes ---------------------------------------------------------------------------------------------------------

KILLED, LESS = "killed by SIGKILL", "fewer hydra.launcher.jobs, or a smaller batch"


@pytest.mark.parametrize(
    ("code", "status", "pruned", "stopping", "starved", "line", "expected"),
    [
        (0, {"state": "finished"}, "", False, False, "", ("finished", "")),
        (0, {"state": "finished"}, "behind", False, False, "", ("finished", "")),
        (70, {"state": "failed", "reason": "not finite\nmore"}, "", False, False, "x", ("failed", "not finite")),
        (1, {"state": "failed", "reason": ""}, "", False, False, "x", ("failed", "exit code 1")),
        (138, {"state": "preempted", "reason": "SIGUSR1"}, "behind", False, False, "", ("pruned", "behind")),
        (143, {"state": "preempted", "reason": "SIGTERM"}, "", True, False, "", ("preempted", "SIGTERM")),
        (-15, {"state": "running"}, "", True, False, "", ("preempted", "stopped before its first step")),
        (-15, {"state": "running"}, "", False, False, "", ("failed", "killed by SIGTERM")),
        (-11, {}, "", False, False, "", ("failed", "killed by SIGSEGV")),
        (-9, {"state": "running"}, "", False, False, "", ("failed", f"{KILLED} (kill -9, or out of memory)")),
        (-9, {"state": "running"}, "", False, True, "", ("failed", f"{KILLED} (the system ran out of memory: {LESS})")),
        (64, {}, "", False, False, "diffusion-train: no such device", ("failed", "no such device")),
        (3, {}, "", False, False, "", ("failed", "exit code 3")),
    ],
)  # fmt: skip
def test_how_a_job_ended(code, status, pruned, stopping, starved, line, expected) -> None:
    assert pool.ending(code, status, pruned, stopping, starved, line) == expected


FAKE = """
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path
folder, node = Path(sys.argv[1]), json.loads(sys.stdin.readline())
def status(state, **more):
    text = json.dumps({"state": state, "step": 1, "pid": os.getpid(), **more})
    (folder / "tmp").write_text(text); os.replace(folder / "tmp", folder / "status.json")
def stop(number, frame):
    status("preempted", reason=f"signal {number}"); os._exit(128 + number)
(folder / "seen.json").write_text(json.dumps({key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}))
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGUSR1, stop)
status("running")
print("says", node["does"], flush=True)
if node["does"] == "raise": raise MemoryError("no room")
if node["does"] == "exit": os._exit(9)
if node["does"] == "kill": os.kill(os.getpid(), signal.SIGKILL)
if node["does"] == "segv": os.kill(os.getpid(), signal.SIGSEGV)
if node["does"] == "orphan":
    child = subprocess.Popen(["sleep", "300"]); (folder / "child").write_text(str(child.pid))
if node["does"] == "wait":
    def follow():
        while os.read(0, 1): pass
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=follow, daemon=True).start()
    time.sleep(300)
status("finished", figures={"evaluate/x0_mse": 1.0})
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Jobs that do as they are told: fake("raise", "wait", ...) -> Jobs."""
    script = tmp_path / "fake.py"
    script.write_text(textwrap.dedent(FAKE))
    monkeypatch.setattr(pool, "COMMAND", (str(script),))
    return lambda *deeds: [job(tmp_path / f"{i}_{does}", i, {"does": does}) for i, does in enumerate(deeds)]


def quiet(job: Job) -> str:
    return ""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_end_of_one_is_the_others(fake) -> None:
    jobs = fake("ok", "raise", "exit", "kill", "segv", "ok")
    begun: list[int] = []
    ended = {end.job.number: end for end in pool.run(iter(jobs), [Slot(1)] * 2, lambda job: begun.append(job.number), quiet)}
    assert begun == list(range(6)) and [ended[i].state for i in range(6)] == ["finished", *["failed"] * 4, "finished"]
    assert [ended[i].reason for i in range(1, 5)] == [
        "exit code 1: MemoryError: no room",
        "exit code 9: says exit",
        f"{KILLED} (kill -9, or out of memory)",
        "killed by SIGSEGV",
    ]
    for one in jobs:
        log = (one.folder / "job.log").read_text()
        assert log.startswith("# 20") and one.command in log and f"says {one.node['does']}" in log
        assert status_of(one.folder)["state"] == ended[one.number].state, "nothing is left running on paper"
    assert "Traceback" in (jobs[1].folder / "job.log").read_text()


def test_slots_are_kept_and_told_to_the_jobs(fake) -> None:
    """While a long job holds the first GPU, all others take their turn on the second."""
    jobs = fake("wait", "ok", "ok", "ok")
    ended: list[int] = []
    watch = lambda job: "long enough" if len(ended) == 3 and job.number == 0 else ""  # noqa: E731
    for end in pool.run(iter(jobs), [Slot(3, "4"), Slot(3, "7")], lambda job: None, watch):
        ended.append(end.job.number)
    seen = [json.loads((one.folder / "seen.json").read_text()) for one in jobs]
    assert ended == [1, 2, 3, 0] and {one["OMP_NUM_THREADS"] for one in seen} == {"3"}
    assert [one["CUDA_VISIBLE_DEVICES"] for one in seen] == ["4", "7", "7", "7"]


def test_the_next_job_is_asked_for_when_one_has_ended(fake) -> None:
    """A search knows the figure of every ended job before it proposes another."""
    jobs, ended, known = fake("ok", "ok", "ok"), list[int](), list[int]()

    def asked() -> Iterator[Job]:
        for one in jobs:
            known.append(len(ended))
            yield one

    for end in pool.run(asked(), [Slot(1)], lambda job: None, quiet):
        ended.append(end.job.number)
    assert known == [0, 1, 2]


def test_a_pruned_job_ends_alone(fake) -> None:
    jobs = fake("wait", "ok")
    watch = lambda job: "behind" if job.node["does"] == "wait" and status_of(job.folder) else ""  # noqa: E731
    ended = {end.job.number: end for end in pool.run(iter(jobs), [Slot(1)] * 2, lambda job: None, watch)}
    assert (ended[0].state, ended[0].reason, ended[1].state) == ("pruned", "behind", "finished")
    assert status_of(jobs[0].folder)["state"] == "pruned" and status_of(jobs[0].folder)["reason"] == "behind"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_and_starts_none(fake, number: signal.Signals) -> None:
    jobs = fake("wait", "wait", "wait")
    sent: list[int] = []

    def watch(job: Job) -> str:
        if not sent and all(status_of(one.folder) for one in jobs[:2]):
            sent.append(number)
            signal.raise_signal(number)
        return ""

    ended = []
    with pytest.raises(Stopped) as caught:
        for end in pool.run(iter(jobs), [Slot(1)] * 2, lambda job: None, watch):
            ended.append((end.job.number, end.state, end.reason))
    assert caught.value.code == 128 + number and sorted(ended) == [(i, "preempted", f"signal {signal.SIGTERM}") for i in (0, 1)]
    assert not jobs[2].folder.exists() and not any(alive(status_of(one.folder)["pid"]) for one in jobs[:2])


def test_nothing_of_a_job_stays_behind(fake) -> None:
    (one,) = fake("orphan")
    list(pool.run(iter([one]), [Slot(1)], lambda job: None, quiet))
    pid = int((one.folder / "child").read_text())
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_a_failure_of_the_sweep_leaves_no_job(fake) -> None:
    jobs = fake("wait", "wait")

    def watch(job: Job) -> str:
        if all(status_of(one.folder) for one in jobs):
            raise RuntimeError("a bug")
        return ""

    with pytest.raises(RuntimeError):
        list(pool.run(iter(jobs), [Slot(1)] * 2, lambda job: None, watch))
    assert {status_of(one.folder)["state"] for one in jobs} == {"preempted"}
    assert not any(alive(status_of(one.folder)["pid"]) for one in jobs)


def test_a_killed_sweep_leaves_no_job(fake, tmp_path: Path) -> None:
    """kill -9 of the sweep closes the jobs' standard input."""
    jobs = fake("wait", "wait")
    child = os.fork()
    if child == 0:
        try:
            list(pool.run(iter(jobs), [Slot(1)] * 2, lambda job: None, quiet))
        finally:
            os._exit(1)
    deadline = time.monotonic() + 20
    while not all(status_of(one.folder) for one in jobs) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while {status_of(one.folder)["state"] for one in jobs} != {"preempted"} and time.monotonic() < deadline:
        time.sleep(0.02)
    assert {status_of(one.folder)["state"] for one in jobs} == {"preempted"}


def test_a_run_of_another_process_keeps_its_word(fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that finds its run in use fails without writing over the status of the one that works there."""
    (one,) = fake("ok")
    one.folder.mkdir()
    write_status(one.folder, "running", 7)
    script = one.folder / "busy.py"
    script.write_text("import sys; print('diffusion-train: x is in use by another process'); sys.exit(74)")
    monkeypatch.setattr(pool, "COMMAND", (str(script),))
    (end,) = pool.run(iter([one]), [Slot(1)], lambda job: None, quiet)
    assert (end.state, end.reason) == ("failed", "x is in use by another process")
    assert status_of(one.folder)["state"] == "running" and status_of(one.folder)["pid"] == os.getpid()
