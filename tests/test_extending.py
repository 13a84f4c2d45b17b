"""docs/extending.md is executed: its blocks become files, its commands are run, and its classes become contributions."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)
FILES = {  # a block whose first comment is a path
    found[1]: text
    for _, text in BLOCKS
    if (found := re.match(r"(?:# @package _global_\n)?# ((?:mypkg|myconfigs)/\S+)\n", text))
}
COMMANDS = [shlex.split(line) for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
SHORT = ["trainer.steps=2", "trainer.batch=4", "trainer.preview=2", "trainer.report_every=1", "device=cpu"]
MODULES = {"train": "diffusion_cli.commands.train", "sample": "diffusion_cli.commands.sample"}


def write_page(folder: Path) -> None:
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "mypkg" / "__init__.py").touch()


def execute(words: list[str], folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command of the page in that folder, a training run cut short; path: what PYTHONPATH says."""
    program = f"import sys; sys.argv[0] = {words[0]!r}; from {MODULES[words[0].partition('-')[2]]} import main; main()"
    call = [sys.executable, "-c", program, *words[1:], *(SHORT if words[0] == "diffusion-train" else [])]
    env = {**os.environ, "PYTHONPATH": str(path or folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(call, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the page's files, in which all its commands were run in turn."""
    folder = tmp_path_factory.mktemp("extending")
    write_page(folder)
    for words in COMMANDS:
        done = execute(words, folder)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return folder


def test_the_page_has_a_class_and_an_option_for_each_choice() -> None:
    assert {Path(name).stem for name in FILES if name.endswith(".py")} >= {
        "schedules", "predictions", "samplers", "models", "data",
    }  # fmt: skip
    groups = {Path(name).parent.name for name in FILES if name.endswith(".yaml")}
    assert groups == {"schedule", "prediction", "sampler", "model", "dataset", "experiment"}
    assert [words[0] for words in COMMANDS].count("diffusion-train") == 2


def test_the_commands_of_the_page_use_the_classes_of_the_page(place) -> None:
    for run in ("mine", "recipe"):
        config = (place / "outputs" / run / "config.yaml").read_text(encoding="utf-8")
        found = set(re.findall(r"_target_: (mypkg\.\S+)", config))
        classes = ("schedules.Trig", "predictions.Difference", "samplers.Midpoint", "models.MLP", "data.Shapes")
        assert found == {f"mypkg.{name}" for name in classes}
    generated = list((place / "outputs" / "mine" / "generated").iterdir())
    assert sorted(folder.name for folder in generated) == [
        "step_00000002-midpoint-5-seed_0", "step_00000002-midpoint-9-seed_0",
    ]  # fmt: skip
    assert all(len(list(folder.glob("0*.png"))) == 8 for folder in generated)


def test_a_checkpoint_says_whom_it_needs_trusted_as_the_page_quotes_it(place) -> None:
    done = execute(["diffusion-sample", "ckpt=outputs/mine", "n=1"], place)
    assert done.returncode == 64 and "Traceback" not in done.stderr
    said = done.stderr.strip().removeprefix("diffusion-sample: ")
    assert f"`{said}`" in " ".join(PAGE.split())


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("schedule.power=-1", "schedule.power is -1: it must be a number > 0"),
        ("schedule.powr=2", "schedule.powr is not a setting"),
        ("model.width=wide", "model.width is wide: it must be a whole number"),
        ("prediction=eps", "prediction=eps"),
        (
            "objective.self_conditioning=0.5",
            "needs a network that takes a hint, and MLP takes none (its constructor has no hint_channels)",
        ),
    ],
)
def test_the_signature_of_ones_own_class_is_the_schema(place, word, says) -> None:
    """As the page promises: names and ranges are refused, and a prediction that the schedule's end does not allow."""
    done = execute([*COMMANDS[0][:-1], "name=refused", word], place)
    assert done.returncode == 64 and "Traceback" not in done.stderr
    assert says in done.stderr
    assert not (place / "outputs" / "refused").exists()


def contribute(folder: Path) -> Path:
    """A copy of the source tree with the page's classes and options in the places that its table names."""
    tree = folder / "tree"
    for part in ("diffusion_cli", "configs", "tests"):
        shutil.copytree(REPO / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pyproject.toml", tree)
    for line in re.findall(r"^\| (?:schedule|prediction|sampler|network|data set) \|.*$", PAGE, re.M):
        goes_to, *_, yaml, target = re.findall(r"`([^`]+)`", line)
        name, path = target.rpartition(".")[2], tree / goes_to
        origin, text = next((f, t) for f, t in FILES.items() if f.endswith(".py") and f"class {name}(" in t)
        if path.exists():  # the class alone, at the end: what it needs is imported there
            item = next(i for i in ast.parse(text).body if isinstance(i, ast.ClassDef))
            lines = text.splitlines()[item.decorator_list[0].lineno - 1 : item.end_lineno]
            path.write_text(path.read_text(encoding="utf-8") + "\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
        else:
            path.write_text(text, encoding="utf-8")
            door, module = path.with_name("__init__.py"), ".".join(Path(goes_to).with_suffix("").parts)
            door.write_text(f"{door.read_text(encoding='utf-8')}from {module} import {name} as {name}\n", encoding="utf-8")
        option = FILES["my" + yaml].replace(f"{origin.removesuffix('.py').replace('/', '.')}.{name}", target)
        assert target in option
        (tree / yaml).write_text(option, encoding="utf-8")
    return tree


def test_the_same_classes_are_a_contribution(tmp_path) -> None:
    """In a copy of the tree: the command finds them without trust, and the tests of the mathematics run over them."""
    tree = contribute(tmp_path)
    words = [word for word in COMMANDS[0] if "trust" not in word and word not in ("--config-dir", "myconfigs")]
    done = execute(words, tmp_path, tree)
    assert done.returncode == 0, done.stderr
    assert "mypkg" not in (tmp_path / "outputs" / "mine" / "config.yaml").read_text(encoding="utf-8")

    tests = tree / "tests" / "test_samplers.py"
    tests.write_text(
        re.sub(
            r"^ORDER = \{",
            "ORDER = {__import__('diffusion_cli.samplers').samplers.Midpoint: 2, ",
            tests.read_text(),
            flags=re.M,
        )
    )
    chosen = "(Trig or Difference or Midpoint) and (ends or inverse or decode or order_of_convergence)"
    files = [str(tree / "tests" / f"test_{name}.py") for name in ("schedules", "predictions", "samplers")]
    call = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir", str(tree), "-k", chosen, *files]
    done = subprocess.run(call, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    for name in ("Trig", "Difference", "Midpoint"):
        assert re.search(rf"\b{name}\b.* PASSED", done.stdout), f"no test of the repository found {name}"
