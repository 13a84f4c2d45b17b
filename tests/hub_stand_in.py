"""A stand-in for the Hugging Face hub on this machine: the few questions that huggingface_hub asks to make a repo and push to
it, in the shapes in which it sends them and reads the answers."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from local_server import serving


class Hub:
    """What the stand-in was asked and what it holds. token: the only one that it knows; owner: whose it is; large: ends of
    names that it wants by LFS, as the hub does for weights; the others come inside the commit."""

    def __init__(self, token: str = "hf_known", owner: str = "me", large: tuple[str, ...] = (".safetensors",)):
        self.token, self.owner, self.large = token, owner, large
        self.asked: list[str] = []
        self.unknown: list[str] = []
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.address = ""

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, dict[str, str], Any]:
        path = path.partition("?")[0]
        self.asked.append(f"{method} {path}")
        if path.startswith("/objects/"):
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}, {}
        if token != f"Bearer {self.token}":
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {}, {"type": "user", "name": self.owner, "orgs": [], "auth": {}}
        if path == "/api/validate-yaml":
            return 200, {}, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        repo, _, rest = path.removeprefix("/api/models/").partition("/" if ".git/" not in path else ".git/")
        name, _, rest = rest.partition("/") if ".git/" not in path else ("", "", rest)
        repo = f"{repo}/{name}".strip("/") if name else repo.strip("/")
        if method == "GET" and not rest:
            known = repo in self.repos
            return (
                (200, {}, {"id": repo, "siblings": []}) if known else (404, {"X-Error-Code": "RepoNotFound"}, {"error": "no"})
            )
        if repo.partition("/")[0] != self.owner:
            return 403, {"X-Error-Message": "You have no right to write here"}, {"error": "You have no right to write here"}
        if rest == "preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = lambda name: "lfs" if name.endswith(self.large) else "regular"  # noqa: E731
            files = [{"path": name, "uploadMode": mode(name), "shouldIgnore": False, "oid": None} for name in names]
            return 200, {}, {"files": files}
        if rest == "info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            actions = lambda oid: {"upload": {"href": f"{self.address}/objects/{oid}"}}  # noqa: E731
            given = [{"oid": o["oid"], "size": o["size"], "authenticated": True, "actions": actions(o["oid"])} for o in wanted]
            return 200, {}, {"transfer": "basic", "objects": given}
        if rest == "commit/main":
            return self._commit(repo, [json.loads(line) for line in body.splitlines() if line.strip()])
        self.unknown.append(f"{method} {path}")
        return 404, {}, {"error": "the stand-in does not know this"}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        owner = wanted.get("organization") or self.owner
        repo = f"{owner}/{wanted['name']}"
        if owner != self.owner:
            return 403, {"X-Error-Message": "You have no right to create here"}, {"error": "You have no right to create here"}
        if repo in self.repos:
            return 409, {}, {"error": "You already created this model repo", "url": f"{self.address}/{repo}"}
        self.repos[repo] = {}
        self.private[repo] = bool(wanted.get("private") or wanted.get("visibility") == "private")
        return 200, {}, {"url": f"{self.address}/{repo}", "name": repo, "id": repo}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, str], Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self.objects[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"] and len(data) == value["size"]
                self.repos[repo][value["path"]] = data
        oid = hashlib.sha1(str(len(self.messages)).encode()).hexdigest()
        return (
            200,
            {},
            {"success": True, "commitOid": oid, "commitUrl": f"{self.address}/{repo}/commit/{oid}", "hookOutput": ""},
        )


@contextmanager
def served(hub: Hub) -> Iterator[Hub]:
    """The hub behind an address of this machine while the block runs."""

    def answer(command: str, path: str, body: bytes, sent: Mapping[str, str]) -> tuple[int, Mapping[str, str], bytes]:
        status, headers, text = hub.answer(command, path, body, sent.get("Authorization") or "")
        return status, {**headers, "Content-Type": "application/json"}, json.dumps(text).encode()

    with serving(answer) as hub.address:
        yield hub
