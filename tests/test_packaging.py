"""The house keeps its shape: imports point down, commands start without torch, nothing unpickles, the wheel is whole."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "diffusion_cli"

# The floor of every module and folder right under diffusion_cli/ (docs/architecture.md): imports point down or stay level.
FLOORS = {
    4: "commands sweeps config help cli launching",
    3: "training sampling trainer assembly objectives evaluation exporting features checkpoint best runs distributed build "
    "averages storage optimizers ema settings devices drawing signals status report pretrained finding stages alone initial "
    "guard parts gradients capture group pulse sharding progress profiling recomputing stall winograd pairs",
    2: "denoiser losses samplers guidance editing walking noisy_classifier adapters",
    1: "models data codecs conditioning vision",
    0: "schedules coloured beta_curves predictions randomness errors ranges signatures options collectives pace",
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}
STRANGERS = {"models": {"schedules", "predictions"}}  # a network knows tensors, never schedules
TORCH_FREE = [
    "cli", "config", "errors", "help", "pace", "pairs", "ranges", "settings", "signatures", "status",
    *(f"sweeps.{file.stem}" for file in sorted((PACKAGE / "sweeps").glob("[a-z]*.py"))),
]  # fmt: skip
HEAVY = {"torch", "torchvision", "datasets", "diffusers", "matplotlib", "pandas", "tensorboard"}
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE = {"torch.load", "torch.save", "torch.hub", "torch.package"}
LINES = 400

SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): file for file in SOURCES}
COMMANDS = [name for name in MODULES if name.startswith("diffusion_cli.commands")]
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))


def imported(name: str, top_level_only: bool = False) -> set[str]:
    """The modules of this package that module `name` imports, wherever in it: in functions and for type checkers too."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, (
                f"{name} imports relatively in line {node.lineno}: write diffusion_cli.*, so that it can be searched"
            )
            origin = str(node.module)
            members = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {member if member in MODULES else origin for member in members}
    return {module for module in found if module.split(".")[0] == "diffusion_cli" and module != "diffusion_cli"}


def room(module: str) -> str:
    return module.split(".")[1]


def floor(module: str) -> int:
    if room(module) not in FLOOR_OF:
        pytest.fail(f"diffusion_cli/{room(module)} has no floor: add it to FLOORS in tests/test_packaging.py", pytrace=False)
    return FLOOR_OF[room(module)]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "diffusion_cli"])
def test_imports_point_down(module: str) -> None:
    here = floor(module)
    up = [other for other in imported(module) if floor(other) > here]
    assert not up, f"{module} (floor {here}) imports from a higher floor: {up}"
    strange = [other for other in imported(module) if room(other) in STRANGERS.get(room(module), ())]
    assert not strange, f"{module} should not know {strange}"


def test_imports_run_in_no_circle() -> None:
    below = {module: imported(module, top_level_only=True) & set(MODULES) for module in MODULES}
    while free := [module for module, others in below.items() if not others - {module}]:
        below = {module: others - set(free) for module, others in below.items() if module not in free}
    assert not below, f"these import each other in a circle: {sorted(below)}"


@pytest.mark.parametrize("module", COMMANDS + [f"diffusion_cli.{name}" for name in TORCH_FREE])
def test_starts_without_heavy_imports(module: str, tmp_path: Path) -> None:
    """A help page, a tab completion and an error in a config come before torch, which alone takes two seconds."""
    if module not in MODULES:
        pytest.skip(f"{module} is not there yet")
    code = f"import sys; sys.path.insert(0, {str(REPO)!r}); import {module}; print(*({HEAVY} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"importing {module} imports {done.stdout.split()} too: import these where they are needed"


def unsafe(code: str) -> list[str]:
    """What in a source could run code that came with a file."""
    found = []
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name.split(".")[0] in PICKLERS]
            case ast.ImportFrom(module=str(module), names=names):
                found += [module] * (module.split(".")[0] in PICKLERS)
                found += [f"{module}.{alias.name}" for alias in names if f"{module}.{alias.name}" in UNSAFE]
                found += [alias.name for alias in names if alias.name == "instantiate"]
            case ast.Attribute() if node.attr == "instantiate" or ast.unparse(node) in UNSAFE:
                found.append(ast.unparse(node))
            case ast.Call(func=ast.Name(id="eval" | "exec" | "instantiate" as called)):
                found.append(called)
            case ast.keyword(arg="allow_pickle", value=value) if ast.unparse(value) != "False":
                found.append("allow_pickle")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_nothing_unpickles(module: str) -> None:
    """Files and configs come from strangers: weights are safetensors, state is JSON, objects come through build()."""
    found = unsafe(MODULES[module].read_text(encoding="utf-8"))
    assert not found, f"{module} uses {found}"


@pytest.mark.parametrize(
    ("code", "safe"),
    [
        ("import pickle", False),
        ("from torch import load", False),
        ("def f():\n    torch.load(path, weights_only=True)", False),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", False),
        ("hydra.utils.instantiate(node)", False),
        ("from hydra.utils import instantiate as make", False),
        ("eval('1')", False),
        ("'''No pickle, no torch.load, no instantiate() here.'''\nnet.eval()\nnp.load(path, allow_pickle=False)", True),
    ],
)
def test_unsafe_is_told_from_safe(code: str, safe: bool) -> None:
    assert (not unsafe(code)) == safe


def test_files_stay_short_and_say_what_they_are() -> None:
    files = [file for folder in ("diffusion_cli", "scripts") for file in (REPO / folder).rglob("*.py")]
    lengths = {str(file.relative_to(REPO)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    long = {name: n for name, n in lengths.items() if n > LINES}
    assert not long, f"over {LINES} lines, split by what the parts are about: {long}"
    assert not [name for name in lengths if Path(name).stem in {"utils", "util", "misc", "common", "helpers"}]


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    return [Requirement(text) for text in sum(project["optional-dependencies"].values(), project["dependencies"])]


def test_constraints_pin_every_requirement() -> None:
    """One line each, `name==version`: no build of one machine (+cpu), no CUDA library, no path, no host."""
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert not [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin)]
    versions = {canonicalize_name(name): version for name, _, version in (pin.partition("==") for pin in pins)}
    assert len(versions) == len(pins), "a name is there twice"
    assert not [name for name in versions if name.startswith(("nvidia-", "cuda-", "triton", "diffusion-cli"))]
    for wanted in requirements():
        if wanted.name != "diffusion-cli":
            assert canonicalize_name(wanted.name) in versions, f"{wanted.name} is not in constraints.txt"
            assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), f"constraints.txt breaks {wanted}"


def test_extras_exist() -> None:
    """What an extra or scripts/run.py asks of another extra is there."""
    asked = {extra for wanted in requirements() if wanted.name == "diffusion-cli" for extra in wanted.extras}
    asked |= set(re.findall(r'"\[(\w+)\]"', (REPO / "scripts" / "run.py").read_text(encoding="utf-8")))
    assert {"test", "dev"} <= asked <= set(PYPROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("command", PYPROJECT["project"]["scripts"])
def test_commands_have_their_function(command: str) -> None:
    module, _, function = PYPROJECT["project"]["scripts"][command].partition(":")
    assert module in MODULES, f"{command} starts {module}, which is not there"
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


@pytest.mark.slow
def test_wheel_is_whole(tmp_path: Path) -> None:
    """The wheel holds the code, in C++ too, every config under diffusion_cli/configs, and the digits; and nothing else."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(REPO)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    configs = {f"diffusion_cli/{file.relative_to(REPO).as_posix()}" for file in (REPO / "configs").rglob("*.yaml")}
    sources = {file.relative_to(REPO).as_posix() for file in (*SOURCES, REPO / "hydra_plugins" / "diffusion_cli.py")}
    assert configs
    page = {file.relative_to(REPO).as_posix() for file in (PACKAGE / "report").iterdir() if file.is_file()}
    assert {"diffusion_cli/report/page.html", "diffusion_cli/report/echarts.LICENSE.txt"} <= page
    assert configs | sources | page | {"diffusion_cli/data/digits.npz", "diffusion_cli/winograd.cpp"} <= names
    ours = ("diffusion_cli/", "diffusion_cli-", "hydra_plugins/diffusion_cli.py")
    assert not [name for name in names if not name.startswith(ours)]
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert set(PYPROJECT["project"]["scripts"]) <= set(re.findall(r"[\w-]+", archive.read(entry_points).decode()))


@pytest.fixture
def launch(tmp_path: Path):
    """scripts/run.py in a tree of its own, where python only writes down how it was called; gives what pip was asked for."""
    if os.name == "nt":
        pytest.skip("the stand-in for python is a shell script")
    root, calls = tmp_path / "a tree", tmp_path / "calls"
    for folder in ("scripts", ".venv/bin"):
        (root / folder).mkdir(parents=True)
    for file in ("scripts/run.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / file, root / file)
    fake = f'#!/bin/sh\necho "$@" >> "{calls}"\n[ ! -e "{tmp_path}/broken" ] || {{ echo no such wheel; exit 1; }}\n'
    for name in ("python", "pytest", "ruff", "diffusion-train"):
        (root / ".venv/bin" / name).write_text(fake)
        (root / ".venv/bin" / name).chmod(0o755)

    def run(*command: str) -> tuple[list[str], subprocess.CompletedProcess[str]]:
        calls.write_text("")
        done = subprocess.run([sys.executable, root / "scripts/run.py", *command], cwd=tmp_path, capture_output=True, text=True)
        asked = calls.read_text().splitlines()
        return [line.partition("-e ")[2] for line in asked if line.startswith("-m pip install -c constraints.txt")], done

    run.root = root
    return run


def test_run_installs_once_and_only_what_is_needed(launch) -> None:
    assert launch("diffusion-train", "trainer.steps=2")[0] == ["."]
    assert launch("diffusion-train")[0] == []
    assert launch("pytest", "-q")[0] == [".[test]"]
    assert launch("diffusion-train")[0] == launch("pytest")[0] == []
    assert launch("ruff")[0] == [".[dev]"]
    assert launch("pytest")[0] == []
    (launch.root / "constraints.txt").write_text("torch==2.14.0\n")
    assert launch("diffusion-train")[0] == [".[dev]"], "a new pin renews all that was installed"
    assert launch("diffusion-train")[0] == []


def test_run_says_what_went_wrong(launch) -> None:
    (launch.root.parent / "broken").touch()
    for _ in range(2):  # a failed installation is not taken for one
        asked, done = launch("diffusion-train")
        assert asked == ["."] and done.returncode == 1
        assert "no such wheel" in done.stderr and "could not install" in done.stderr and "Traceback" not in done.stderr
    (launch.root.parent / "broken").unlink()
    _, done = launch("diffusion-trian")
    assert done.returncode == 1 and "no command 'diffusion-trian': there are diffusion-train," in done.stderr
    assert "usage" in launch()[1].stderr
