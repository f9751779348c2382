"""A hub on this machine: the few calls of the Hugging Face hub that an upload makes, over HTTP."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml

TOKENS = {"writes": "write", "reads": "read", "fine": "fineGrained"}
_COMMIT = "1" * 40


class FakeHub(ThreadingHTTPServer):
    """The user is alice, who may write in acme, and only read in museum.

    Attributes:
        repositories: What was created, and whether it is private.
        files: The content of files by repository and path.
        calls: Method and path of every request.
        fails: Path of a request that is answered with 500, as an expression.
        forbidden: Repositories that exist, and to which alice may not write.
        models: Repositories of others, and their cards.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.calls: list[str] = []
        self.fails = "$^"
        self.forbidden: set[str] = set()
        self.models: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, bytes] = {}


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        body = self._body()
        hub.calls.append(f"{self.command} {path}")
        if re.search(hub.fails, f"{self.command} {path}"):
            return self._answer(500, {"error": "the disk is full"})
        role = TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if path.startswith("/storage/"):
            hub.stored[path.rpartition("/")[2]] = body
            return self._answer(200, {})
        if role is None:
            return self._answer(401, {"error": "Invalid token"})
        if path == "/api/whoami-v2":
            orgs = [{"name": "acme", "roleInOrg": "write"}, {"name": "museum", "roleInOrg": "read"}]
            auth = {"type": "access_token", "accessToken": {"displayName": "x", "role": role}}
            return self._answer(200, {"type": "user", "name": "alice", "orgs": orgs, "auth": auth})
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'alice'}/{asked['name']}"
            private = asked.get("visibility") == "private" or asked.get("private") is True
            hub.repositories.setdefault(name, private)
            return self._answer(200, {"url": f"{hub.url}/{name}"})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            return self._repository(found[1], found[2] or "", body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        return self._answer(404, {"error": "no such route"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_POST = do_PUT = _handle

    def _repository(self, name: str, rest: str, body: bytes) -> None:
        hub = self.server
        if name in hub.models and not rest:
            card = {"id": name, "sha": _COMMIT, "siblings": [], "cardData": hub.models[name]}
            return self._answer(200, card)
        if rest == "/auth-check/write" and name in hub.forbidden:
            return self._answer(403, {"error": "Forbidden"})
        if name not in hub.repositories and name not in hub.models:
            return self._answer(404, {"error": "not found"}, "RepoNotFound")
        if rest == "/auth-check/write":
            return self._answer(200, {})
        if rest == "/preupload/main":
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if rest == "/commit/main":
            held = hub.files.setdefault(name, {})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    held[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    content = hub.stored[value["oid"]]
                    assert hashlib.sha256(content).hexdigest() == value["oid"]
                    held[value["path"]] = content
            url = f"{hub.url}/{name}/commit/{_COMMIT}"
            return self._answer(200, {"commitUrl": url, "commitOid": _COMMIT})
        return self._answer(404, {"error": "no such route"})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {
                "oid": one["oid"],
                "size": one["size"],
                "actions": {"upload": {"href": f"{self.server.url}/storage/{one['oid']}"}},
            }
            for one in asked["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _validate(self, content: str) -> None:
        """What the hub checks: a base model must have the form of an id on the hub."""
        found = yaml.safe_load(content.split("---")[1])
        base = found.get("base_model", "owner/name")
        errors = []
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            errors = [{"message": f'"base_model" with value "{base}" is not valid'}]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _answer(self, status: int, content: dict[str, Any], code: str = "") -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serve one, and have huggingface_hub use it, logged in as alice."""
    from huggingface_hub import constants

    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Its storage protocol has a library of its own, in which the hub cannot be replaced.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "writes")
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
