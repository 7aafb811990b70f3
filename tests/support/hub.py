"""A Hugging Face hub on this machine, for tests: the endpoints that huggingface_hub and datasets ask, over real HTTP.

Repositories are kept in memory, with branches and commits. Large files go the way of LFS and are given out by a second
port, as those of the real hub are by another machine, which must not see a token. Xet is not offered: clients fall back
to LFS, the newest where HF_HUB_DISABLE_XET is set. What goes wrong has the codes and headers of the real hub.
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_writeToken0123456789", "hf_readToken0123456789"
"""Tokens of the user ``ci``: one that may write under ``ci/``, and one that may not."""

LARGE = (".safetensors", ".bin", ".gguf", ".png", ".parquet")


class File(NamedTuple):
    """Content of a file, and whether it goes the way of LFS."""

    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        """SHA-256 of a large file, and git's number of another one."""
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


class Commit(NamedTuple):
    """What a branch holds after a commit, and what was said of it."""

    files: dict[str, File]
    message: str

    @property
    def oid(self) -> str:
        text = repr((self.message, sorted((name, file.oid) for name, file in self.files.items())))
        return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Repository:
    """Branches by name, each a list of commits, the newest last."""

    private: bool = False
    gated: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((one for commits in self.branches.values() for one in commits if one.oid == revision), None)


class Request(NamedTuple):
    """A request that was answered; ``ranges`` is its header of that name, or None."""

    method: str
    path: str
    status: int | str
    ranges: str | None
    agent: str
    token: str | None


@dataclass
class Fault:
    """What is to go wrong: an HTTP status, ``cut`` in the middle of the content, or ``reset`` there."""

    method: str
    part: str
    kind: int | str
    times: int
    message: str
    code: str


class Hub:
    """The hub; see :func:`running_hub`."""

    def __init__(self) -> None:
        self.address = self.store = ""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()

    def add(self, name: str, files: Mapping[str, bytes] | Path, kind: str = "model", **options: Any) -> Repository:
        """Puts a repository there, with the files of a folder or those given."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir() if path.is_file()}
        stored = {path: File(data, is_large(path, data)) for path, data in files.items()}
        self.objects |= {file.oid: file.data for file in stored.values() if file.large}
        repository = Repository(**options)
        repository.branches["main"] = [Commit(stored, "initial commit")]
        self.repositories[kind, name] = repository
        return repository

    def files(self, name: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Contents of a repository's files by name, but for ``.gitattributes``, which the hub itself writes."""
        commit = self.repositories[kind, name].at(revision)
        assert commit is not None
        return {path: file.data for path, file in commit.files.items() if path != ".gitattributes"}

    def fail(
        self, part: str, kind: int | str, times: int = 1, method: str = "", message: str = "", code: str = ""
    ) -> None:
        """Lets the next ``times`` requests whose path has ``part`` go wrong."""
        self.faults.append(Fault(method, part, kind, times, message, code))

    def asked(self, method: str, part: str) -> list[Request]:
        """Requests so far of a method, whose path has ``part``."""
        return [request for request in self.log if request.method == method and part in request.path]

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """The environment of a process that knows this hub and no other, with caches of its own in ``home``."""
        hidden = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
        kept = {name: value for name, value in os.environ.items() if name not in hidden}
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        return kept | own | ({"HF_TOKEN": token} if token else {})


def is_large(path: str, data: bytes) -> bool:
    return path.endswith(LARGE) or len(data) > 10_000_000


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Runs a hub on two ports of the loopback: one that is asked, and one that gives large files out."""
    hub = Hub()
    handler = type("Handler", (Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.address, hub.store = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    """Answers a request; subclasses name the hub."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    ROUTES: tuple[tuple[str, str, str], ...] = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", "describe"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)", "paths"),
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("POST", r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/objects/([0-9a-f]{64})", "put_object"),
        ("POST", r"/objects/([0-9a-f]{64})/verify", "verify_object"),
        ("GET", r"/objects/([0-9a-f]{64})", "get_object"),
        ("GET", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), parts.path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.fault, self.told = self.due(path), False
        try:
            if self.fault and isinstance(self.fault.kind, int):
                raise Refused(self.fault.kind, self.fault.message or "as the test wants it", self.fault.code)
            if self.token not in (None, WRITER, READER):
                raise Refused(401, "Invalid credentials in Authorization header")
            with self.hub.lock:
                answer = self.route(path)
            answer()
        except Refused as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            if refused.status == 429 or refused.status >= 500:
                headers["Retry-After"] = "0"  # clients would wait half a minute
            content = b"<html>" if refused.status == 200 else {"error": refused.message}  # as a page in between
            self.send(content, refused.status, headers)

    def due(self, path: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times > 0 and fault.part in path and fault.method in ("", self.command):
                fault.times -= 1
                return fault
        return None

    def route(self, path: str) -> Callable[[], None]:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, name in self.ROUTES:
            if wanted == method and (match := re.fullmatch(pattern, path)):
                answer: Callable[[], None] = getattr(self, name)(*(part and unquote(part) for part in match.groups()))
                return answer
        raise Refused(404, f"no endpoint {method} {path} here")

    # What a request is answered with

    def send(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        self.note(status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.kind in ("cut", "reset"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if self.fault.kind == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(data)

    def note(self, status: int) -> None:
        agent, ranges = self.headers.get("User-Agent") or "", self.headers.get("Range")
        kind = self.fault.kind if self.fault else status
        self.hub.log.append(Request(self.command, self.path, kind, ranges, agent, self.token))

    def finish(self) -> None:
        with suppress(OSError):  # it was cut on purpose, or the client has gone
            super().finish()

    def later(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Callable[[], None]:
        return lambda: self.send(content, status, headers)

    # Who may do what

    def repository(self, kind: str, name: str, write: bool = False) -> Repository:
        kind = {"models": "model", "datasets": "dataset", "datasets/": "dataset"}.get(kind or "", "model")
        found = self.hub.repositories.get((kind, name))
        hidden = found is not None and found.private and (self.token is None or not name.startswith("ci/"))
        if found is None or hidden:
            raise Refused(404 if self.token else 401, "Repository not found", "RepoNotFound")
        if found.gated:
            raise Refused(403 if self.token else 401, f"Access to model {name} is restricted", "GatedRepo")
        if write:
            self.check_writes(name.partition("/")[0], "write to this repository")
        return found

    def check_writes(self, owner: str, what: str) -> None:
        if self.token is None:
            raise Refused(401, "Invalid username or password.")
        if self.token != WRITER or owner != "ci":
            raise Refused(403, f"You don't have the rights to {what}")

    def commit_of(self, repository: Repository, revision: str) -> Commit:
        commit = repository.at(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Endpoints

    def whoami(self) -> Callable[[], None]:
        if self.token is None:
            raise Refused(401, "Invalid username or password.")
        return self.later({"type": "user", "name": "ci", "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> Callable[[], None]:
        told = json.loads(self.body)
        owner, kind = told.get("organization") or "ci", told.get("type") or "model"
        name = f"{owner}/{told['name']}"
        self.check_writes(owner, f'create a {kind} under the namespace "{owner}"')
        url = f"{self.hub.address}/{name}"
        if (kind, name) in self.hub.repositories:
            headers = {"X-Error-Message": "You already created this model repo"}
            return self.later({"error": headers["X-Error-Message"], "url": url}, 409, headers)
        private = told.get("private", told.get("visibility") == "private")
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, kind, private=private)
        return self.later({"url": url, "name": name})

    def validate_card(self) -> Callable[[], None]:
        import yaml

        found = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        fields = yaml.safe_load(found[1]) if found else {}
        base = fields.get("base_model") or "a/b"
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
            return self.later({"errors": [{"message": f'"base_model" with value "{base}" is not valid'}]}, 400)
        return self.later({"errors": [], "warnings": []})

    def describe(self, kind: str, name: str, revision: str | None) -> Callable[[], None]:
        repository = self.repository(kind, name)
        commit = self.commit_of(repository, revision or "main")
        siblings = [{"rfilename": path} for path in commit.files]
        return self.later(
            {
                "id": name, "modelId": name, "sha": commit.oid, "private": repository.private, "gated": False,
                "disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings,
                "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
            }
        )  # fmt: skip

    def preupload(self, kind: str, name: str, revision: str) -> Callable[[], None]:
        commit = self.commit_of(self.repository(kind, name, write=True), revision)
        ignored = commit.files[".gitignore"].data.decode().split() if ".gitignore" in commit.files else []
        answers = []
        for one in json.loads(self.body)["files"]:
            path, sample = one["path"], base64.b64decode(one["sample"])
            large = is_large(path, sample) or one["size"] > 10_000_000
            there = commit.files.get(path)
            skip = any(fnmatch.fnmatch(path, pattern) for pattern in ignored)
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": skip, "oid": there and there.oid})
        return self.later({"files": answers})

    def batch(self, kind: str, name: str) -> Callable[[], None]:
        self.repository(kind, name, write=True)
        answers = []
        for one in json.loads(self.body)["objects"]:
            answer: dict[str, Any] = {"oid": one["oid"], "size": one["size"], "authenticated": True}
            if one["oid"] not in self.hub.objects:
                href = f"{self.hub.store}/objects/{one['oid']}"
                verify = {"href": f"{self.hub.address}/objects/{one['oid']}/verify"}
                answer["actions"] = {"upload": {"href": href}, "verify": verify}
            answers.append(answer)
        headers = {"Content-Type": "application/vnd.git-lfs+json"}
        return self.later({"transfer": "basic", "objects": answers}, headers=headers)

    def put_object(self, oid: str) -> Callable[[], None]:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content is not that of its number")
        self.hub.objects[oid] = self.body
        return self.later(b"", headers={"ETag": f'"{oid}"'})

    def verify_object(self, oid: str) -> Callable[[], None]:
        told = json.loads(self.body)
        if told != {"oid": oid, "size": len(self.hub.objects.get(oid, b""))}:
            raise Refused(404, "no such object")
        return self.later({})

    def commit(self, kind: str, name: str, revision: str) -> Callable[[], None]:
        repository = self.repository(kind, name, write=True)
        before = self.commit_of(repository, revision)
        files, header = dict(before.files), {}
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, f"{value['path']} points to an object that was not uploaded")
                files[value["path"]] = File(self.hub.objects[value["oid"]], large=True)
            elif key == "deletedFile":
                if value["path"] not in files:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
            else:
                raise Refused(400, f"no operation {key}")
        if header.get("parentCommit", before.oid) != before.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        commit = Commit(files, header["summary"])
        repository.branches[revision].append(commit)
        url = f"{self.hub.address}/{name}/commit/{commit.oid}"
        return self.later({"success": True, "commitUrl": url, "commitOid": commit.oid, "hookOutput": ""})

    def branch(self, kind: str, name: str, revision: str) -> Callable[[], None]:
        repository = self.repository(kind, name, write=True)
        if revision in repository.branches:
            raise Refused(409, "Reference already exists")
        repository.branches[revision] = [repository.branches["main"][-1]]
        return self.later({})

    def entries(self, commit: Commit, paths: list[str] | None = None) -> list[dict[str, Any]]:
        found = []
        for path, file in commit.files.items():
            if paths is None or path in paths:
                entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
                found.append(
                    entry
                    | ({"lfs": {"oid": file.oid, "size": len(file.data), "pointerSize": 134}} if file.large else {})
                )
        return found

    def paths(self, kind: str, name: str, revision: str) -> Callable[[], None]:
        commit = self.commit_of(self.repository(kind, name), revision)
        form = (self.headers.get("Content-Type") or "").startswith("application/json")
        told = json.loads(self.body) if form else parse_qs(self.body.decode())
        return self.later(self.entries(commit, told.get("paths", [])))

    def tree(self, kind: str, name: str, revision: str, folder: str | None) -> Callable[[], None]:
        commit = self.commit_of(self.repository(kind, name), revision)
        inside = [one for one in self.entries(commit) if one["path"].startswith(f"{folder}/" if folder else "")]
        if folder and not inside:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return self.later(inside)

    def resolve(self, kind: str, name: str, revision: str, path: str) -> Callable[[], None]:
        commit = self.commit_of(self.repository(kind, name), revision)
        headers = {"X-Repo-Commit": commit.oid}
        file = commit.files.get(path)
        if file is None:
            message = "Entry not found"
            told = {"X-Error-Code": "EntryNotFound", "X-Error-Message": message, **headers}
            return self.later({"error": message}, 404, told)
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
            headers["Location"] = f"{self.hub.store}/objects/{file.oid}"
            return self.later(b"", 302, headers)
        return self.content(file.data, headers | {"ETag": f'"{file.oid}"'})

    def get_object(self, oid: str) -> Callable[[], None]:
        if self.token is not None:
            raise Refused(400, "the store of large files must see no token")
        return self.content(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def content(self, data: bytes, headers: dict[str, str]) -> Callable[[], None]:
        headers |= {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            if start >= len(data):
                raise Refused(416, "the range is beyond the end")
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.later(data[start : end + 1], 206, headers)
        return self.later(data, 200, headers)
