"""A Hugging Face Hub on loopback: what `HfApi.create_repo` and `upload_folder` call, downloads of files, and nothing
more.

Files travel as in reality: small ones inside the commit, large ones by git LFS (the client needs HF_HUB_DISABLE_XET=1).
Any other call, and any without the right token, is refused, so a test sees it.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0" * 39 + "1"
LARGE = (".safetensors", "tokenizer.json")
"""Endings of files that go by LFS; the Hub decides by size and content."""


def _commit(revision: str) -> str:
    is_commit = re.fullmatch("[0-9a-f]{40}", revision)
    return COMMIT if revision == "main" else revision if is_commit else hashlib.sha1(revision.encode()).hexdigest()


class HubServer:
    """`with HubServer(token) as hub`: serves at `hub.url`; afterwards look at `repositories` and `calls`."""

    def __init__(self, token: str):
        self.token = token
        self.refuse_with: int | None = None
        """Answer every call with this status."""
        self.repositories: dict[str, dict[str, Any]] = {}
        """Repository id -> {"private": bool, "files": {path: bytes}}"""
        self.revisions: dict[tuple[str, str], dict[str, bytes]] = {}
        """Repository id and branch or commit -> files, of all but the main branch."""
        self.calls: list[str] = []
        """"METHOD /path", in order."""
        self.objects: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Adds a branch of a repository with the files of a folder; returns its commit."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        if branch == "main":
            self.repositories[repo] = {"private": False, "files": files}
            return COMMIT
        commit = _commit(branch)
        self.revisions |= {(repo, branch): files, (repo, commit): files}
        return commit

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a branch or a commit; None if there is none."""
        if revision in ("main", COMMIT):
            return self.repositories.get(repo, {"files": {}})["files"]
        return self.revisions.get((repo, revision))

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # the name is http.server's
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self, method: str) -> None:
        self.body = self._read_body()
        path = self.path.partition("?")[0]
        self.hub.calls.append(f"{method} {path}")
        if self.hub.refuse_with is not None:
            return self._answer(self.hub.refuse_with, {"error": "you may not write here"})
        # LFS storage has signed addresses of its own and gets no token
        if method != "PUT" and self.headers["Authorization"] != f"Bearer {self.hub.token}":
            return self._answer(401, {"error": "wrong token"})
        for route_method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if method == route_method and match:
                return answer(self, *match.groups())
        self._answer(404, {"error": f"this Hub knows no {method} {path}"})

    def _read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def _answer(self, status: int, content: Any, code: str | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def create(self) -> None:
        wanted = json.loads(self.body)
        repo = f"{wanted['organization'] or 'someone'}/{wanted['name']}"
        status = 409 if repo in self.hub.repositories else 200
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repositories.setdefault(repo, {"private": private, "files": {}})
        self._answer(status, {"url": f"{self.hub.url}/{repo}", "name": repo, "id": "0"})

    def info(self, repo: str, revision: str | None = None) -> None:
        if repo not in self.hub.repositories:
            return self._answer(404, {"error": "Repository not found"})
        known, files = self.hub.repositories[repo], self.hub.files(repo, revision or "main")
        if files is None:
            return self._answer(404, {"error": "Revision not found"}, code="RevisionNotFound")
        siblings = [{"rfilename": path} for path in files]
        commit = _commit(revision or "main")
        content = {"id": repo, "modelId": repo, "private": known["private"], "sha": commit, "siblings": siblings}
        self._answer(200, {**content, "tags": []})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        """The content of a file, or of its head alone."""
        files = self.hub.files(repo, revision)
        if not files or path not in files:
            self.send_response(404)
            missing = "RevisionNotFound" if files is None else "RepoNotFound"
            self.send_header("X-Error-Code", "EntryNotFound" if files else missing)
            self.send_header("X-Repo-Commit", _commit(revision))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(files[path]).hexdigest()}"')
        self.send_header("X-Repo-Commit", _commit(revision))
        self.send_header("Content-Length", str(len(files[path])))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(files[path])

    def tree(self, repo: str, revision: str) -> None:
        files = self.hub.files(repo, revision) or {}
        self._answer(200, [{"type": "file", "path": p, "size": len(c), "oid": COMMIT} for p, c in files.items()])

    def validate_yaml(self) -> None:
        is_card = json.loads(self.body)["content"].startswith("---\n")
        self._answer(200 if is_card else 400, {"errors": [], "warnings": []})

    def preupload(self, repo: str) -> None:
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = ["lfs" if path.endswith(LARGE) else "regular" for path in paths]
        files = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(paths, modes, strict=True)]
        self._answer(200, {"files": files})

    def lfs_batch(self, repo: str) -> None:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{item['oid']}"}}
        self._answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._answer(400, {"error": "content and address differ"})
        self.hub.objects[oid] = self.body
        self._answer(200, {})

    def commit(self, repo: str) -> None:
        files = self.hub.repositories[repo]["files"]
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        address = f"{self.hub.url}/{repo}/commit/{COMMIT}"
        self._answer(200, {"success": True, "commitUrl": address, "commitOid": COMMIT, "hookOutput": ""})


ROUTES = (
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", "/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", _Handler.info),
    ("GET", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("HEAD", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", "/api/models/([^/]+/[^/]+)/tree/([^/]+)", _Handler.tree),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/models/([^/]+/[^/]+)/preupload/main", _Handler.preupload),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/storage/([0-9a-f]{64})", _Handler.store),
    ("POST", "/api/models/([^/]+/[^/]+)/commit/main", _Handler.commit),
)
