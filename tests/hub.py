"""A stand-in for the hub's HTTP endpoint: what huggingface_hub calls to make a repository and commit files to it.

It keeps what arrives, by repository and branch, and counts requests, so that a test can hold what was sent against the
folder it came from. It listens on 127.0.0.1 only. What it answers is written after the calls of huggingface_hub 2.4;
the real hub checks more.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard

TOKEN = "hf_test"
LARGE = 10_000  # bytes from which a file goes by LFS


@dataclass
class Repository:
    """One repository: whether it is private, and the files of its branches."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What the endpoint holds and saw; ``fail`` maps the beginning of a request to a status that it answers with."""

    url: str = ""
    token: str = TOKEN
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    uploaded: list[str] = field(default_factory=list)  # SHA-256 of each object that was sent
    fail: dict[str, int] = field(default_factory=dict)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repo].branches[branch]


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        return None

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        asked = f"{method} {address.path}"
        self.hub.requests.append(asked)
        status = next((code for start, code in self.hub.fail.items() if asked.startswith(start)), 0)
        signed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if status:
            self._send({"error": "out of order"}, status)
        elif not signed and not address.path.startswith(("/objects/", "/api/validate-yaml")):
            self._send({"error": "Invalid credentials"}, 401)
        else:
            self._route(method, address.path.strip("/").split("/"), parse_qs(address.query), body)

    def _route(self, method: str, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
        match method, *parts:
            case "GET", "api", "whoami-v2":
                self._send({"type": "user", "name": "me", "fullname": "Me", "orgs": []})
            case "POST", "api", "validate-yaml":
                self._validate(json.loads(body))
            case "POST", "api", "repos", "create":
                self._create(json.loads(body))
            case "POST", "api", "models", owner, name, "branch", branch:
                branches = self.hub.repositories[f"{owner}/{name}"].branches
                made = branch not in branches
                branches.setdefault(branch, dict(branches["main"]))
                self._send({} if made else {"error": "there already"}, 200 if made else 409)
            case "POST", "api", "models", owner, name, "preupload", revision:
                self._preupload(f"{owner}/{name}", unquote(revision), json.loads(body))
            case "POST", owner, name, "info", "lfs", "objects", "batch":
                self._batch(json.loads(body))
            case "PUT", "objects", oid:
                assert hashlib.sha256(body).hexdigest() == oid, "the bytes are not those that were announced"
                self.hub.objects[oid] = body
                self.hub.uploaded.append(oid)
                self._send({})
            case "POST", "api", "models", owner, name, "commit", revision:
                self._commit(f"{owner}/{name}", unquote(revision), body, "create_pr" in query)
            case "GET", "api", "models", owner, name, *_:
                repository = self.hub.repositories.get(f"{owner}/{name}")
                if repository is None:
                    self._send({"error": "Repository not found"}, 404)
                    return
                self._send({"id": f"{owner}/{name}", "sha": "0" * 40, "private": repository.private, "siblings": []})
            case _:
                self._send({"error": f"the stand-in does not know {method} {'/'.join(parts)}"}, 404)

    def _validate(self, asked: dict[str, Any]) -> None:
        """As the hub does, roughly: YAML that is a mapping, and a model-index with what the spec requires."""
        data = ModelCard(asked["content"]).data.to_dict()
        for entry in data.get("model-index", []):
            for result in entry["results"]:
                assert all([result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]])
                assert all("type" in metric and "value" in metric for metric in result["metrics"])
        wrong = [] if data.get("license") != "no-such-licence" else [{"message": '"license" must be one of the known'}]
        self._send({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        if repo in self.hub.repositories:
            self._send({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}, 409)
            return
        self.hub.repositories[repo] = Repository(private=asked.get("visibility") == "private")
        self._send({"url": f"{self.hub.url}/{repo}", "name": repo, "id": "1"})

    def _preupload(self, repo: str, revision: str, asked: dict[str, Any]) -> None:
        there = self.hub.files(repo, revision)
        answer = []
        for file in asked["files"]:
            large = file["size"] >= LARGE
            record = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in there:
                data = there[file["path"]]
                record["oid"] = hashlib.sha256(data).hexdigest() if large else git_oid(data)
            answer.append(record)
        self._send({"files": answer})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for wanted in asked["objects"]:
            record = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                record["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}
            objects.append(record)
        self._send({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _commit(self, repo: str, revision: str, body: bytes, as_pull_request: bool) -> None:
        branch = "refs/pr/1" if as_pull_request else revision
        repository = self.hub.repositories[repo]
        files = repository.branches.setdefault(branch, dict(repository.branches["main"]))
        for line in body.splitlines():
            record = json.loads(line)
            value = record["value"]
            match record["key"]:
                case "header":
                    repository.messages.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
        url = f"{self.hub.url}/{repo}"
        pull = f"{url}/discussions/1" if as_pull_request else None
        self._send({"commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40, "pullRequestUrl": pull})

    def _send(self, value: Any, status: int = 200, kind: str = "application/json") -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
