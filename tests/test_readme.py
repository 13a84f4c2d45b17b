"""What the README, the help pages and the recipes tell a reader to type is right: every command composes and checks."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from diffusion_cli import cli, config
from diffusion_cli.commands import evaluate, sample, train
from diffusion_cli.sweeps import space

REPO = Path(__file__).resolve().parents[1]
COMMAND = re.compile(r"^(?:\$ |#\s+|python3 scripts/run\.py )?(diffusion-(?:train|sample|evaluate)(?: .*)?)$")


def commands() -> list[str]:
    """Each once, without comments behind it, placeholders in capitals left as they are."""
    pages = [REPO / "README.md", *(REPO / "docs").glob("*.md"), *(REPO / "configs/experiment").glob("*.yaml")]
    lines = [line.strip() for page in pages if page.name != "extending.md" for line in page.read_text().splitlines()]
    found = [match[1] for line in lines if (match := COMMAND.match(line))]
    found += [example for example, _ in (*train.EXAMPLES, *sample.EXAMPLES, *evaluate.EXAMPLES)]
    return sorted({re.split(r"\s{2,}|\s#", command)[0].strip() for command in found if "..." not in command})


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 25


@pytest.mark.parametrize("command", commands())
def test_command_is_right(command: str) -> None:
    program, *words = shlex.split(command)
    if words == ["trainer.stepz=3"]:
        pytest.skip("the README's example of a mistake")
    said = cli.overrides([cli.with_home(word) for word in words])
    said = said if program == "diffusion-train" else sample.with_scale(said)
    many = cli.is_multirun(words) or any(word.startswith("sweep=") for word in words)
    fixed, varied = space.parse({}, said) if many else (said, {})
    varied.pop("case", None)  # the names of cases, each of which tests/test_experiments.py composes
    singles = [*fixed, *(f"{key}={choices.values[0]}" for key, choices in varied.items())]
    primary = program.removeprefix("diffusion-")
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        node = config.plain(compose(primary, singles))
    check = {"train": config.check_train, "sample": config.check_sample, "evaluate": config.check_evaluate}[primary]
    assert check(node)


def test_checkpoints_that_the_readme_names_are_kept_by_the_default_run() -> None:
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        trainer = compose("train", []).trainer
    kept = [trainer.steps - back * trainer.save_every for back in range(trainer.keep)]
    readme = (REPO / "README.md").read_text()
    assert re.findall(r"checkpoints/step_(\d+)/", readme) == [f"{trainer.steps:08d}"]
    earlier = [int(step) for step in re.findall(r"guidance\.step=(\d+)", readme)]
    assert earlier and set(earlier) <= set(kept) - {trainer.steps}, (earlier, kept)


def test_every_recipe_is_in_the_readme() -> None:
    cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", (REPO / "README.md").read_text(), re.M)
    listed = set(re.findall(r"\w+", " ".join(cells)))
    assert listed >= {path.stem for path in (REPO / "configs/experiment").glob("*.yaml")}


def test_every_picture_of_the_pages_is_there() -> None:
    for page in (REPO / "README.md", *(REPO / "docs").glob("*.md")):
        prose = re.sub(r"^ {4}.*$", "", page.read_text(), flags=re.M)  # without code
        for link in re.findall(r"\]\(([^)#]+)\)", prose):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
