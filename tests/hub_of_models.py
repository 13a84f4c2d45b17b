"""A stand-in for the Hugging Face hub on this machine that serves models to huggingface_hub: what it is asked to fetch one."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from local_server import serving

COMMIT = "c" * 40


@dataclass
class Models:
    """repos: folders by OWNER/NAME; gated: names that want terms to be accepted. fetched: files that were asked for."""

    repos: dict[str, Path]
    gated: tuple[str, ...] = ()
    fetched: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    address: str = ""

    def files(self, repo: str) -> list[Path]:
        return sorted(path for path in self.repos[repo].rglob("*") if path.is_file())

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0]
        api = path.startswith("/api/models/")
        owner, name, *rest = path.removeprefix("/api/models/").strip("/").split("/")
        repo = f"{owner}/{name}"
        if repo not in self.repos:
            return 404, {"X-Error-Code": "GatedRepo" if repo in self.gated else "RepoNotFound"}, b"{}"
        named = {path.relative_to(self.repos[repo]).as_posix(): path for path in self.files(repo)}
        if api and rest[:1] in ([], ["revision"]):
            if rest and rest[1] not in ("main", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            return (
                200,
                {},
                json.dumps({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in named]}).encode(),
            )
        if api and rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": _sha1(p)} for n, p in named.items()]
            return 200, {}, json.dumps(tree).encode()
        if rest[:1] == ["resolve"] and (file := named.get("/".join(rest[2:]))) is not None:
            self.fetched.append("/".join(rest[2:]))
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{_sha1(file)}"'}, file.read_bytes()
        self.unknown.append(path)
        return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"{}"


def _sha1(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def served(models: Models) -> Iterator[Models]:
    """The models behind an address of this machine while the block runs."""
    with serving(lambda command, path, body, headers: models.answer(path)) as models.address:
        yield models


def reach(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets huggingface_hub ask these models, as nobody in particular."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", models.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/no/token")
    address = models.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
