"""Nothing that a stranger sends runs code, imports, starts or reaches anything, writes outside the run or takes memory without
bound; each is answered in a line, or is harmless where it lies unread. The table is hostile.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile
import pytest
from hostile import HARMLESS, KINDS, Case, Told
from hostile_parts import PICKLES

LATE = {"torch._dynamo", "PIL"}  # packages of which parts are imported by what fails in them


def meet(root: Path, kinds: list[str]) -> dict[str, Told]:
    caches = {
        "HF_HOME": str(root / "hub"),
        "XDG_CACHE_HOME": str(root / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, hostile.__file__, str(root), *kinds], env={**os.environ, **caches}, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr[-3000:]
    return {told.name: told for told in (Told(*json.loads(line)) for line in done.stdout.splitlines())}


def wrong(case: Case, told: Told) -> list[str]:
    """What a case did that it must not."""
    found = [f"exit code {told.code}"] * (told.code not in case.codes)
    found += ["more than a line"] * (len(told.said.strip().splitlines()) > 7 or "Traceback" in told.said)
    found += ["nothing said"] * (told.code not in (0,) and not told.said.strip())
    found += told.heard
    found += [f"imports {name}" for name in told.modules if name.partition(".")[0] not in LATE]
    return found + [f"takes {told.more} MB"] * (told.more > case.more)


def all_are_met(tmp_path: Path, kinds: list[str]) -> None:
    told = meet(tmp_path, kinds)
    cases = [case for kind in kinds for case in KINDS[kind]()]
    assert len({case.name for case in cases}) == len(cases)
    bad = {case.name: (found, told[case.name].said[-300:]) for case in cases if (found := wrong(case, told[case.name]))}
    assert not bad, f"{len(bad)} of {len(cases)}:\n" + json.dumps(bad, indent=1)
    harmless = {case.name: told[case.name] for case in HARMLESS if told[case.name].code not in case.codes}
    assert not harmless, harmless
    print(f"{len(cases)} hostile cases of {', '.join(kinds)}: none ran, wrote, reached or took what it must not")


@pytest.mark.timeout(600)
def test_hostile_checkpoints_and_runs(tmp_path: Path) -> None:
    all_are_met(tmp_path, ["files", "runs", "reports"])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_all_that_is_hostile(tmp_path: Path) -> None:
    all_are_met(tmp_path, list(KINDS))


def test_there_are_enough_and_the_detector_hears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The payloads act where nobody stops them: else a quiet run would prove nothing."""
    assert sum(1 for kind in KINDS.values() for _ in kind()) >= 150
    heard: list[str] = []
    ears = hostile._ears(tmp_path, heard)
    ears("os.system", ("touch owned",))
    ears("open", ("/etc/owned", "w", os.O_WRONLY | os.O_CREAT))
    ears("open", (str(tmp_path / "mine"), "w", os.O_WRONLY | os.O_CREAT))
    ears("open", ("/etc/passwd", "r", os.O_RDONLY))
    ears("os.rename", (str(tmp_path / "a"), "/etc/b", -1, -1))
    ears("pickle.find_class", ("posix", "system"))
    assert [line.partition(" ")[0] for line in heard] == ["os.system", "open", "os.rename", "pickle.find_class"]
    (tmp_path / "outside").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    import pickle

    pickle.loads(PICKLES["pickle"])
    assert (tmp_path / "outside" / "owned").exists()
    case = Case("x", lambda here: [])
    assert wrong(case, Told("x", 0, "", ["os.system"], ["antigravity"], 1000, 0)) == [
        "exit code 0", "os.system", "imports antigravity", "takes 1000 MB",
    ]  # fmt: skip
