#!/usr/bin/env python3
"""Shows that the tests of reliability can fail: breaks the program in ten ways, one after the other, and expects red.

    python scripts/mutations.py            # all ten, some minutes
    python scripts/mutations.py fsync      # those whose name holds the word

Each breakage is an edit of one place in a copy of the source tree, and the tests that should see it. Exit code 1 where one
survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str
    tests: str  # words for pytest


MUTATIONS = (
    Mutation(
        "no fsync", "storage.py", '        watch("sync", path)\n        os.fsync(file.fileno())\n', "",
        "tests/test_storage.py tests/test_power.py",
    ),
    Mutation(
        "no rename", "storage.py", '    temporary = folder.with_name(f".{folder.name}.tmp")\n', "    temporary = folder\n",
        "tests/test_storage.py tests/test_checkpoint.py",
    ),
    Mutation(
        "no hash", "checkpoint.py", '"sha256": hashlib.sha256(data).hexdigest()} for', '"sha256": ""} for',
        "tests/test_checkpoint.py",
    ),
    Mutation(
        "hash not compared", "checkpoint.py", 'if hashlib.sha256(data).hexdigest() != files[name]["sha256"]:', "if False:",
        "tests/test_checkpoint.py",
    ),
    Mutation(
        "counter not advanced", "trainer.py", "self.batches.starting_at(first)\n        nothing",
        "self.batches.starting_at(0)\n        nothing",
        "tests/test_resume.py -k resumed_equals_uninterrupted",
    ),
    Mutation(
        "average not restored", "trainer.py", '"weights": self.objective, **self.averages()}.items():\n                held',
        '"weights": self.objective}.items():\n                held',
        "tests/test_resume.py -k resumed_equals_uninterrupted",
    ),
    Mutation(
        "old deleted first", "trainer.py", "        checkpoint.save(\n",
        "        for old in checkpoint.folders(self.run.checkpoints)[self.settings.keep - 1 :]:\n"
        "            storage.remove(old)\n"
        "        checkpoint.save(\n",
        "tests/test_resume.py -k some_operations",
    ),
    Mutation(
        "flag not polled", "trainer.py", "                    if done or stop.number:\n", "                    if done:\n",
        "tests/test_trainer.py tests/test_signals.py -k signal",
    ),
    Mutation(
        "non-finite check after the optimizer", "trainer.py",
        "        if self.guard.accepts(",
        "        self.scaler.step(self.optimizer)\n        if self.guard.accepts(",
        "tests/test_guard.py -k bad_step",
    ),
    Mutation(
        "loader trusts names", "checkpoint.py", "if not named or", "if not whole or", "tests/test_checkpoint.py",
    ),
)  # fmt: skip


def survives(mutation: Mutation) -> bool:
    """Whether all its tests pass although it is there."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(REPO, tree, ignore=shutil.ignore_patterns(".git", ".venv", "outputs", "__pycache__", ".*_cache"))
        path = tree / "diffusion_cli" / mutation.file
        source = path.read_text(encoding="utf-8")
        if source.count(mutation.old) != 1:
            sys.exit(f"{mutation.name}: its place in {mutation.file} is gone: name another")
        path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutation.tests.split()]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or ["nothing"])[-1]
    red = done.returncode == 1  # other codes: no test was run
    print(f"{'red' if red else 'SURVIVES':9} {mutation.name:38} {last}", flush=True)
    return not red


if __name__ == "__main__":
    wanted = [mutation for mutation in MUTATIONS if " ".join(sys.argv[1:]) in mutation.name]
    sys.exit(any([survives(mutation) for mutation in wanted]))
