"""to=hub, against a stand-in of it: what arrives there is the folder, and what fails is a line."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stand_in import Hub, served
from test_storage import contents
from tiny import compose, train

from diffusion_cli import config
from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.exporting import export


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs"), "trainer.steps=2")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in in place of the hub, with somebody logged in."""
    from huggingface_hub import constants

    with served(Hub()) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


def push(run: Path, *words: str) -> Path:
    return export(config.check_export(compose(f"ckpt={run}", "to=hub", *words, primary="export")))


@pytest.mark.parametrize("form", ["folder", "safetensors"])
def test_what_is_pushed_is_the_folder(
    form: str, run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = push(run, "repo=me/it", f"form={form}", f"out={tmp_path / 'it'}")
    (folder / "generated").mkdir()
    (folder / "generated" / "picture.png").write_bytes(b"mine")  # of the user's own: it stays here
    assert hub.repos == {"me/it": {name: data for name, data in contents(folder).items() if "generated" not in name}}
    assert "README.md" in hub.repos["me/it"] and "export.json" in hub.repos["me/it"]
    assert hub.private == {"me/it": True} and not hub.unknown
    assert hub.objects, "the weights went by LFS"
    assert f"pushed to {hub.address}/me/it by me: {hub.address}/me/it/commit/" in capsys.readouterr().out
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmy own words\n")
    push(run, "repo=me/it", f"form={form}", f"out={folder}")  # once more: a second commit, of the card as it is now
    assert len(hub.messages) == 2 and hub.repos["me/it"]["README.md"] == (folder / "README.md").read_bytes()
    assert "generated/picture.png" not in hub.repos["me/it"]


def test_a_public_repo_is_said(run: Path, hub: Hub, tmp_path: Path) -> None:
    push(run, "repo=me/open", "private=false", f"out={tmp_path / 'it'}")
    assert hub.private == {"me/open": False}


def test_the_installed_command_pushes(run: Path, tmp_path: Path) -> None:
    with served(Hub()) as hub:
        environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
        words = [f"ckpt={run}", "to=hub", "repo=me/it", "private=true", "out=it"]
        code = "from diffusion_cli.commands.export import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=tmp_path,
            env={**os.environ, **environment, "HF_HOME": str(tmp_path / "hf")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "pushed to" in done.stdout and hub.token not in done.stdout + done.stderr
        assert json.loads(hub.repos["me/it"]["manifest.json"])["files"].keys() == {
            "average.safetensors",
            "config.json",
            "state.json",
        }


# -- what fails --------------------------------------------------------------------------------------------------------


def refused(run: Path, folder: Path, *words: str) -> tuple[type[Exception], str]:
    with pytest.raises((ConfigError, StorageError)) as caught:
        push(run, f"out={folder}", *words)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 400
    return caught.type, text


def test_nobody_is_logged_in(run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    kind, said = refused(run, tmp_path / "it", "repo=me/it")
    assert kind is ConfigError and "nobody is logged in to the hub here: run hf auth login, or set HF_TOKEN" in said
    assert not hub.asked and not (tmp_path / "it").exists(), "known before anything is made"


def test_an_unknown_token(run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    kind, said = refused(run, tmp_path / "it", "repo=me/it")
    assert kind is ConfigError and "does not know this token" in said and "hf_wrong" not in said
    assert not (tmp_path / "it").exists()


def test_no_right_to_write(run: Path, hub: Hub, tmp_path: Path) -> None:
    kind, said = refused(run, tmp_path / "it", "repo=you/it")
    assert kind is ConfigError and "me may not write to you/it: take a token" in said and "repo=me/it" in said
    hub.repos["you/it"] = {}  # there already, and readable
    _, said = refused(run, tmp_path / "it", "repo=you/it")
    assert "me may not write to you/it" in said and not hub.repos["you/it"]


def test_no_network(run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    kind, said = refused(run, tmp_path / "it", "repo=me/it")
    assert kind is StorageError and said.startswith("cannot reach the hub for me/it (")
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode" in refused(run, tmp_path / "it", "repo=me/it")[1]
    assert not hub.asked


def test_a_push_that_fails_half_way_is_tried_again(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_commit", lambda repo, lines: (413, {}, {"error": "too much for today"}))
    kind, said = refused(run, tmp_path / "it", "repo=me/it")
    assert kind is StorageError and "status 413: too much for today" in said
    assert f"{tmp_path / 'it'} is whole, and the same command tries again" in said
    with monkeypatch.context() as patch:
        patch.setattr(hub, "_commit", Hub._commit.__get__(hub))
        push(run, "repo=me/it", f"out={tmp_path / 'it'}")
    assert hub.repos["me/it"] == contents(tmp_path / "it")
