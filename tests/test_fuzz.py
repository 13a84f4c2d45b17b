"""Bytes and words that nobody thought of, by hypothesis: a UserError or an answer, never another error.

By default some hundred of each; `-m slow` looks for minutes. What was found stays as an example.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from hostile_parts import GOLDEN, _encoded, signed
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diffusion_cli import checkpoint, cli, config
from diffusion_cli.checkpoint import Damaged
from diffusion_cli.commands.sample import with_scale, with_texts
from diffusion_cli.data.decoding import Unreadable, decode
from diffusion_cli.errors import UserError
from diffusion_cli.finding import find, load_denoiser

FEW, MANY = 100, int(os.environ.get("FUZZ_EXAMPLES", "5000"))
HASTE = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
KEYS = ["trainer.steps", "optimizer.betas", "model", "name", "dataset.classes", "sampler/grid", "hydra.sweeper", "", "trainer"]
SIGNS = st.text("abe=,.:[]{}()'\"\\$~+-/@!*&#%|<>? \n\t\0é0189", max_size=24)
WORDS = st.builds(lambda key, value: f"{key}={value}", st.sampled_from(KEYS), SIGNS) | SIGNS


def refused_or_checked(words: list[str], command: str = "train") -> None:
    """What cli.run does with these words, up to the checked config."""
    check = {"train": config.check_train, "sample": config.check_sample}[command]
    before = sys.argv
    sys.argv = [f"diffusion-{command}", *words]
    try:
        cli.run(f"diffusion-{command}", command, lambda node: check(config.plain(node)), lambda: "", lambda argv: argv)
    except SystemExit as error:
        assert error.code in (0, 64), words
    finally:
        sys.argv = before


@settings(max_examples=40, suppress_health_check=HASTE)
@given(st.lists(WORDS, max_size=3))
def test_words_are_refused_or_checked(words: list[str]) -> None:
    refused_or_checked(words)


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
@settings(max_examples=MANY // 10, suppress_health_check=HASTE)
@given(st.lists(WORDS, max_size=3))
def test_many_words_are_refused_or_checked(words: list[str]) -> None:
    refused_or_checked(words)


@settings(max_examples=FEW)
@given(st.lists(WORDS | st.text(max_size=24), max_size=4))
def test_words_are_read_before_hydra(words: list[str]) -> None:
    try:
        cli.overrides(cli._checked(with_texts(with_scale(words)), "diffusion-sample", "sample"))
    except UserError as error:
        assert error.code == 64


def changed(data: bytes, edits: list[tuple[int, bytes, int]]) -> bytes:
    """Each edit: from that place on these bytes instead of so many."""
    for place, new, instead in edits:
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + instead :]
    return data


EDITS = st.lists(st.tuples(st.integers(0, 2**16), st.binary(max_size=8), st.integers(0, 64)), min_size=1, max_size=4)
TEXTS = st.sampled_from([b'""', b"null", b"-1", b"[]", b"{}", b"1e400", b"true", b"9" * 400, b"NaN", b'"_target_"', b"[[["])
JSON_EDITS = st.lists(
    st.tuples(st.integers(0, 2**12), TEXTS | st.binary(max_size=4), st.integers(0, 40)), min_size=1, max_size=3
)


def read(root: Path, name: str, edits: list[tuple[int, bytes, int]]) -> None:
    """A checkpoint of a stranger, who signs what they changed."""
    shutil.rmtree(root / "run", ignore_errors=True)
    folder = Path(shutil.copytree(GOLDEN, root / "run" / "checkpoints" / GOLDEN.name))
    (folder / name).write_bytes(changed((folder / name).read_bytes(), edits))
    if name != "manifest.json":
        signed(folder)
    try:
        checkpoint.load(folder).tensors("optimizer")
        load_denoiser(find(root / "run"), "ema")
    except (Damaged, UserError) as error:
        assert str(error)


FILES = st.sampled_from(["average.safetensors", "optimizer.safetensors"])
NODES = st.sampled_from(["config.json", "manifest.json", "state.json"])


@settings(max_examples=FEW, suppress_health_check=HASTE)
@given(FILES, EDITS)
def test_a_changed_file_of_tensors_is_refused_or_read(tmp_path: Path, name: str, edits: list[tuple[int, bytes, int]]) -> None:
    read(tmp_path, name, edits)


@settings(max_examples=FEW, suppress_health_check=HASTE)
@given(NODES, JSON_EDITS)
def test_a_changed_config_is_refused_or_built(tmp_path: Path, name: str, edits: list[tuple[int, bytes, int]]) -> None:
    read(tmp_path, name, edits)


def other_values(node: object, leaves: list[object], place: int) -> object:
    """The node with the value at that place, counted through all of it, replaced."""
    count = -1

    def walked(part: object) -> object:
        nonlocal count
        count += 1
        if count == place:
            return leaves[0]
        if isinstance(part, dict):
            return {key: walked(value) for key, value in part.items()}
        return [walked(value) for value in part] if isinstance(part, list) else part

    return walked(node)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.builds(list)
    | st.builds(dict)
)


def built(root: Path, place: int, leaf: object) -> None:
    shutil.rmtree(root / "run", ignore_errors=True)
    folder = Path(shutil.copytree(GOLDEN, root / "run" / "checkpoints" / GOLDEN.name))
    node = other_values(json.loads((folder / "config.json").read_text()), [leaf], place)
    (folder / "config.json").write_text(json.dumps(node))
    signed(folder)
    try:
        load_denoiser(find(root / "run"), "ema")
    except (Damaged, UserError) as error:
        assert str(error)


@settings(max_examples=FEW, suppress_health_check=HASTE)
@given(st.integers(0, 150), LEAVES)
@example(103, {})  # facts without any
@example(57, 2**61)  # a width that is beyond 64 bits as a size
def test_any_other_value_in_a_config_is_refused_or_built(tmp_path: Path, place: int, leaf: object) -> None:
    built(tmp_path, place, leaf)


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
@settings(max_examples=MANY, suppress_health_check=HASTE)
@given(st.one_of(st.tuples(FILES, EDITS), st.tuples(NODES, JSON_EDITS), st.tuples(st.integers(0, 150), LEAVES)))
def test_many_changed_checkpoints(tmp_path: Path, change: tuple) -> None:
    first, second = change
    built(tmp_path, first, second) if isinstance(first, int) else read(tmp_path, first, second)


PICTURE = st.sampled_from([_encoded(kind, 12, 9) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF")])


def decoded(data: bytes, edits: list[tuple[int, bytes, int]]) -> None:
    try:
        assert decode(changed(data, edits), size=8, channels=3, resize="crop").shape == (3, 8, 8)
    except Unreadable as error:
        assert str(error)


@settings(max_examples=3 * FEW, suppress_health_check=HASTE)
@given(PICTURE, EDITS)
def test_a_changed_picture_is_unreadable_or_read(data: bytes, edits: list[tuple[int, bytes, int]]) -> None:
    decoded(data, edits)


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
@settings(max_examples=4 * MANY, suppress_health_check=HASTE)
@given(PICTURE | st.binary(max_size=300), EDITS)
def test_many_changed_pictures(data: bytes, edits: list[tuple[int, bytes, int]]) -> None:
    decoded(data, edits)
