"""Sweeps as a user starts them: what is wrong is said before anything begins, and real jobs train, fail, stop and go on."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import SMALL, SMALL_NETWORK, hashes, train

BIN = Path(sys.executable).parent
TINY = [*SMALL, *SMALL_NETWORK]


def command(*words: str) -> list[str]:
    """Later words win."""
    merged = {word.partition("=")[0]: word for word in (*TINY, *words)}
    return [str(BIN / "diffusion-train"), *merged.values()]


def sweep(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, cwd=folder)


def table(folder: Path) -> dict[str, dict[str, str]]:
    return {row["run"]: row for row in csv.DictReader((folder / "sweep.csv").open())}


def status(run: Path) -> dict[str, object]:
    return json.loads((run / "status.json").read_text())


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def test_jobs_are_runs_like_any_other_and_a_failure_is_its_own(tmp_path: Path) -> None:
    """One of two fails; the other is to the bit what it is alone; the same command runs what is missing."""
    words = ("-m", "optimizer.lr=1e-3,1e30", "trainer.steps=3", "trainer.save_every=0", "hydra.launcher.threads=1")
    done = sweep(tmp_path, *words)
    folder = tmp_path / "outputs" / "sweep"
    assert done.returncode == 1, done.stderr
    assert done.stderr == "diffusion-train: 1 of 2 jobs did not finish: the same command tries them again\n"
    for said in ("2 jobs", "[1/2] begins: lr_0.001", "[1/2] finished", "[2/2] failed", "lr_1e+30/job.log", "sweep.csv"):
        assert said in done.stdout, done.stdout
    assert "images/s" not in done.stdout.partition("\nrun ")[0], "what jobs say is in their logs"
    rows = table(folder)
    assert list(rows) == ["lr_0.001", "lr_1e+30"] and [row["state"] for row in rows.values()] == ["finished", "failed"]
    assert "not finite" in rows["lr_1e+30"]["reason"] and float(rows["lr_0.001"]["evaluate/x0_mse"]) > 0
    said = json.loads((folder / "sweep.json").read_text())
    assert (said["runs"], said["swept"], said["metric"]) == (list(rows), ["optimizer.lr"], "evaluate/x0_mse")
    assert "step       3  loss" in (folder / "lr_0.001" / "job.log").read_text()

    before = hashes(folder / "lr_0.001")
    alone = train(tmp_path / "alone", "optimizer.lr=1e-3", *words[2:4])
    assert hashes(alone) == before

    again = sweep(tmp_path, *words)
    assert again.returncode == 1 and "2 jobs, 1 finished before, 1 go on" in again.stdout, again.stdout + again.stderr
    assert "[2/2] begins: lr_1e+30" in again.stdout and "[1/2] finished before: lr_0.001" in again.stdout
    assert "[1/2] begins" not in again.stdout and hashes(folder / "lr_0.001") == before


@pytest.mark.slow
def test_a_stopped_sweep_goes_on(tmp_path: Path) -> None:
    """SIGINT stops both jobs, saved; the same command finishes all three, and each is to the bit the uninterrupted one."""
    words = (
        "-m",
        "seed=1,2,3",
        "trainer.steps=300",
        "trainer.save_every=0",
        "trainer.report_every=50",
        "hydra.launcher.threads=1",
    )
    words += ("hydra.launcher.jobs=2",)
    folder = tmp_path / "outputs" / "sweep"
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    both = [folder / "seed_1", folder / "seed_2"]
    wait_for(lambda: all((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size for run in both), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.startswith("diffusion-train: stopped by SIGINT"), (out, err)
    assert {status(run)["state"] for run in both} == {"preempted"} and not (folder / "seed_3").exists()
    assert not any(Path(f"/proc/{status(run)['pid']}").exists() for run in both)

    done = sweep(tmp_path, *words)
    assert done.returncode == 0 and "3 jobs, 2 go on" in done.stdout, done.stdout + done.stderr
    assert all(row["state"] == "finished" for row in table(folder).values())
    clean = sweep(tmp_path, *words, "name=clean")
    assert clean.returncode == 0
    for i in (1, 2, 3):
        assert hashes(folder / f"seed_{i}") == hashes(tmp_path / "outputs" / "clean" / f"seed_{i}")


@pytest.mark.slow
def test_kill_9_of_a_job_and_of_the_sweep(tmp_path: Path) -> None:
    words = (
        "-m",
        "seed=1,2",
        "trainer.steps=100000",
        "trainer.save_every=0",
        "trainer.report_every=20",
        "hydra.launcher.jobs=2",
    )
    folder = tmp_path / "outputs" / "sweep"
    runs = [folder / "seed_1", folder / "seed_2"]
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    wait_for(lambda: all((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size for run in runs), process)
    os.kill(int(str(status(runs[0])["pid"])), signal.SIGKILL)
    wait_for(lambda: status(runs[0])["state"] == "failed", process)
    assert "killed by SIGKILL" in str(status(runs[0])["reason"]) and status(runs[1])["state"] == "running"
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while status(runs[1])["state"] != "preempted" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert status(runs[1])["state"] == "preempted" and "saved" in str(status(runs[1])["reason"])


@pytest.mark.slow
def test_a_search_prunes_and_goes_on(tmp_path: Path) -> None:
    """Three runs at a good rate; the fourth, at none to speak of, would take days: it is pruned and leaves a checkpoint."""
    pytest.importorskip("optuna")
    (tmp_path / "conf" / "sweep").mkdir(parents=True)
    (tmp_path / "conf" / "sweep" / "mine.yaml").write_text(
        "# @package _global_\n# mine\ndefaults:\n  - override /hydra/sweeper: optuna\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    trials: null\n    sampler: grid\n    startup: 3\n    params:\n"
        "      optimizer.lr: [0.01, 0.011, 0.012, 1.0e-12]\n"
    )
    words = ("--config-dir=conf", "sweep=mine", "trainer.evaluate_every=10", "trainer.save_every=0", "hydra.launcher.jobs=1")
    done = sweep(tmp_path, *words, "trainer.steps=30")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table(tmp_path / "outputs" / "mine")
    assert [row["state"] for row in rows.values()] == ["finished"] * 3 + ["pruned"], done.stdout
    pruned = tmp_path / "outputs" / "mine" / "003-lr_1e-12"
    assert "falls behind the other runs (median)" in rows[pruned.name]["reason"]
    assert int(rows[pruned.name]["step"]) < 30 and list((pruned / "checkpoints").glob("step_*/manifest.json"))
    again = sweep(tmp_path, *words, "trainer.steps=30")
    assert again.returncode == 0 and "4 trials, 4 made before" in again.stdout and "begins" not in again.stdout
