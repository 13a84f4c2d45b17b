#!/usr/bin/env python3
"""Runs a command of this project, making its environment first: python3 scripts/run.py diffusion-train trainer.steps=100

The environment is .venv beside pyproject.toml. It is installed into once, and again only when pyproject.toml or
constraints.txt changed, when the folder was moved, or when a tool needs an extra that is not there yet. The command runs in
the caller's folder. Standard library only, in a syntax that an old Python can read, so that it can say that it is too old.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN, EXE = (VENV / "Scripts", ".exe") if os.name == "nt" else (VENV / "bin", "")
PYTHON, STAMP = BIN / ("python" + EXE), VENV / "installed.txt"
EXTRAS = ["", "[test]", "[dev]"]  # each holds the one before it
NEEDS = dict.fromkeys(["ruff", "mypy", "pre-commit", "check-yaml", "end-of-file-fixer"], "[dev]")
NEEDS["pytest"] = "[test]"


def install(extra):
    """Brings .venv up to date with `extra`, or ends with the reason why it cannot."""
    pinned = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    digest = hashlib.sha256(pinned).hexdigest()
    stamp = STAMP.read_text(encoding="utf-8") if STAMP.exists() else ""
    root, installed, had = (stamp.split("\n") + ["", ""])[:3]
    if PYTHON.exists() and (root, installed) == (str(ROOT), digest) and EXTRAS.index(had) >= EXTRAS.index(extra):
        return
    extra = max(extra, had, key=EXTRAS.index)
    steps = [[str(PYTHON), "-m", "pip", "install", "-c", "constraints.txt", "-e", "." + extra]]
    if not PYTHON.exists() or root not in ("", str(ROOT)):  # the commands in a moved .venv still name the old folder
        if not (3, 11) <= sys.version_info[:2] < (3, 14):
            found = next(filter(shutil.which, ("python3.13", "python3.12", "python3.11")), "python3.12")
            sys.exit("Python 3.11, 3.12 or 3.13 is needed; this is {}.{}. Try {}".format(*sys.version_info[:2], found))
        steps.insert(0, [sys.executable, "-m", "venv", "--clear", str(VENV)])
    print("installing into .venv (about a minute; several where CUDA comes along)", file=sys.stderr, flush=True)
    VENV.mkdir(exist_ok=True)
    for step in steps:
        done = subprocess.run(step, cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            tail = done.stdout.decode(errors="replace").splitlines()[-15:]
            print(
                *tail, "", "could not install into .venv; above is how this ended:", " ".join(step), sep="\n", file=sys.stderr
            )
            sys.exit(1)
    STAMP.write_text("\n".join([str(ROOT), digest, extra]), encoding="utf-8")


def main():
    if len(sys.argv) < 2:
        sys.exit(
            "usage: python3 scripts/run.py COMMAND [ARGUMENTS], COMMAND being diffusion-train, diffusion-sample, pytest ..."
        )
    name = sys.argv[1]
    install(NEEDS.get(name, ""))
    tool = BIN / (name + EXE)
    if not tool.exists():
        ours = sorted(path.stem for path in BIN.glob("diffusion-*"))
        sys.exit("no command {!r}: there are {}".format(name, ", ".join([*ours, "python", "tensorboard", *NEEDS])))
    os.environ["PATH"] = str(BIN) + os.pathsep + os.environ.get("PATH", "")
    command = [str(tool), *sys.argv[2:]]
    if os.name == "nt":  # exec on Windows gives the prompt back before the command ends
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
