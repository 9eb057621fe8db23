"""A small Hugging Face Hub on loopback: real HTTP, users and tokens, repositories in memory, faults on demand.

By hand: `python tests/hub.py --port 0` prints its address and a token;
`HF_ENDPOINT=<address> HF_TOKEN=<token> HF_HUB_DISABLE_XET=1 python …` then talks to it.
"""

import argparse
import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER, STRANGER = ("hf_" + name * 6 for name in ("writer", "reader", "strange"))
LARGE = (".parquet", ".arrow", ".safetensors", ".bin", ".zip")
FIRST = {".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass
class User:
    """Who a token belongs to, and what it may do."""

    name: str
    role: str = "write"
    organisations: tuple[str, ...] = ()


@dataclass
class Repository:
    """All commits, oldest first, as (id, title, files); files maps a path to its bytes."""

    private: bool
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][2]

    def commit(self, title: str, files: dict[str, bytes]) -> str:
        content = repr([len(self.commits), title, sorted((path, hash_of(data)) for path, data in files.items())])
        self.commits.append((hashlib.sha1(content.encode()).hexdigest(), title, files))
        return self.head

    def at(self, revision: str) -> dict[str, bytes] | None:
        if revision in ("main", "HEAD"):
            return self.files
        return next((files for oid, _, files in self.commits if oid == revision), None)


@dataclass
class Fault:
    """What goes wrong with the next requests of this method whose path matches: `times` of them, after `after`.

    status: answered so, with these headers; drop: the connection closes, of a body after `drop` bytes; lost: the work
    is done and the connection closes instead of the answer; hold: of a body so many bytes are read, then nothing.
    """

    method: str
    path: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: int | None = None
    lost: bool = False
    hold: int | None = None
    times: int = 1
    after: int = 0


class Hub:
    """`with Hub() as hub:` answers at `hub.url`; `hub.repositories["datasets", "writer/name"]` is what is there.

    It knows the tokens WRITER, READER (may only read) and STRANGER. `requests` holds "METHOD /path" of all requests.
    """

    def __init__(self, port: int = 0):
        self.users = {
            WRITER: User("writer", organisations=("lab",)),
            READER: User("writer", role="read"),
            STRANGER: User("stranger"),
        }
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files by their sha256, committed or not
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.before_commit: Callable[[], Any] | None = None  # what others do meanwhile
        self.held, self.released = threading.Event(), threading.Event()
        self.lock = threading.RLock()
        self.server = _Server(("127.0.0.1", port), _Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, token: str | None = WRITER, **more: str) -> dict[str, str]:
        """What a process needs in its environment to talk to this Hub, read when it imports huggingface_hub."""
        known = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return {**known, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **({"HF_TOKEN": token} if token else {}), **more}

    def make(self, name: str, files: dict[str, bytes], private: bool = True, kind: str = "datasets") -> Repository:
        """A repository that somebody made before."""
        repository = Repository(private)
        repository.commit("initial commit", dict(FIRST))
        repository.commit("by hand", {**FIRST, **files})
        self.repositories[kind, name] = repository
        return repository

    def edit(self, name: str, files: dict[str, bytes], kind: str = "datasets") -> str:
        """A commit by hand, as people make them in the browser."""
        with self.lock:
            repository = self.repositories[kind, name]
            return repository.commit("by hand", {**repository.files, **files})

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path) and fault.times > 0:
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, *_: Any) -> None:
        """Clients that go away are no news."""


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        self.hub, parts = self.server.hub, urlsplit(self.path)
        path = unquote(parts.path)
        self.query = parse_qs(parts.query)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
        fault = self.hub.fault_for(self.command, path)
        if fault and (fault.hold is not None or fault.drop is not None):
            self.rfile.read(min(int(self.headers.get("Content-Length", 0)), (fault.hold or 0) + (fault.drop or 0)))
            if fault.hold is not None:
                self.hub.held.set()
                self.hub.released.wait(60)
            return self._hang_up()
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) < size:  # whoever sent it is gone
            return self._hang_up()
        if fault and fault.status is not None:
            return self._answer(fault.status, b'{"error": "as the test wants it"}', fault.headers)
        try:
            self.user = self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
            if "Authorization" in self.headers and self.user is None:
                message = "Invalid credentials in Authorization header"
                raise _Refused(401, message)
            reply = self._route(path, body)
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message, **({"X-Error-Code": refused.code} if refused.code else {})}
            return self._answer(refused.status, json.dumps({"error": refused.message}).encode(), headers)
        if fault and fault.lost:
            return self._hang_up()
        content, headers = reply if isinstance(reply, tuple) else (json.dumps(reply).encode(), {})
        return self._answer(200, content, {"Content-Type": "application/json", **headers})

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and asked and self.command == "GET":
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
            status, content = 206, content[first : last + 1]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, path: str, body: bytes) -> Any:
        if path == "/api/whoami-v2":
            return self._whoami()
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if match := re.fullmatch(r"/objects/(\w+)", path):  # a large file comes in
            if hash_of(body) != match[1]:
                raise _Refused(400, "the content does not agree with its hash")
            self.hub.objects[match[1]] = body
            return {}
        if match := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._repository(match[1] or "models", match[2], write=True)
            return self._batch(json.loads(body))
        if match := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(match[1] or "models", *match.groups()[1:])
        if match := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?", path):
            kind, name, what, revision, rest = match.groups()
            return self._repository_request(kind, name, what or "revision", revision or "main", rest or "", body)
        raise _Refused(404, f"this Hub has no {path}")

    def _whoami(self) -> Any:
        if self.user is None:
            raise _Refused(401, "Invalid username or password.")
        organisations = [{"name": name, "type": "org", "roleInOrg": "write"} for name in self.user.organisations]
        token = {"displayName": "test", "role": self.user.role}
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "name": self.user.name, "orgs": organisations, "auth": auth}

    def _may_write(self, name: str) -> bool:
        user = self.user
        return user is not None and user.role == "write" and name.split("/")[0] in (user.name, *user.organisations)

    def _create(self, asked: dict[str, Any]) -> Any:
        if self.user is None:
            raise _Refused(401, "Invalid username or password.")
        name = f"{asked.get('organization') or self.user.name}/{asked['name']}"
        kind = f"{asked.get('type') or 'model'}s"
        if not self._may_write(name):
            raise _Refused(403, f"You don't have the rights to create a {kind[:-1]} under this namespace")
        url = f"{self.hub.url}/{'datasets/' * (kind == 'datasets')}{name}"
        with self.hub.lock:
            if (kind, name) in self.hub.repositories:
                raise _Refused(409, f"You already created this {kind[:-1]} repo: {name}")
            repository = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
            repository.commit("initial commit", dict(FIRST))
            self.hub.repositories[kind, name] = repository
        return {"url": url, "name": name, "id": name}

    def _repository(self, kind: str, name: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get((kind, name))
        theirs = self.user and name.split("/")[0] in (self.user.name, *self.user.organisations)
        if repository is None or (repository.private and not theirs):
            status = 404 if self.user else 401
            raise _Refused(status, "Repository not found", "RepoNotFound")
        if write and not self._may_write(name):
            raise _Refused(403, "Forbidden: you must use a write token to upload to a repository")
        return repository

    def _repository_request(self, kind: str, name: str, what: str, revision: str, rest: str, body: bytes) -> Any:
        repository = self._repository(kind, name, write=what in ("preupload", "commit"))
        if what == "refs":
            return {"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": repository.head}]} | {
                "converts": [],
                "tags": [],
            }
        files = repository.at(revision)
        if files is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if what == "revision":
            oid = repository.head if revision in ("main", "HEAD") else revision
            siblings = [{"rfilename": path} for path in sorted(files)]
            return {"id": name, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []}
        if what == "preupload":
            return {"files": [_mode(asked["path"], files) for asked in json.loads(body)["files"]]}
        if what == "commit":
            return self._commit(kind, name, repository, [json.loads(line) for line in body.splitlines()])
        if what == "tree":
            return self._tree(files, rest)
        if what == "paths-info":
            asked = parse_qs(body.decode())
            paths = asked.get("paths", []) if asked else json.loads(body)["paths"]
            return [entry for path in paths for entry in _entries(files, path)]
        raise _Refused(404, f"this Hub has no {what} of repositories")

    def _tree(self, files: dict[str, bytes], folder: str) -> Any:
        inside = {path: data for path, data in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise _Refused(404, f"{folder} does not exist", "EntryNotFound")
        depth = len(folder.split("/")) if folder else 0
        found: dict[str, None] = {}
        for path in inside:
            parts = path.split("/")
            for length in range(depth + 1, len(parts) + 1):
                found["/".join(parts[:length])] = None
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            found = dict.fromkeys(path for path in found if len(path.split("/")) == depth + 1)
        return [entry for path in found for entry in _entries(files, path)]

    def _batch(self, asked: dict[str, Any]) -> Any:
        objects = []
        for each in asked["objects"]:
            one = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.objects:  # else it is here and need not be sent again
                one["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{each['oid']}"}}
            objects.append(one)
        return {"transfer": "basic", "objects": objects}

    def _commit(self, kind: str, name: str, repository: Repository, lines: list[dict[str, Any]]) -> Any:
        header, *operations = lines
        if self.hub.before_commit:
            self.hub.before_commit()
        with self.hub.lock:  # all of it or nothing
            parent = header["value"].get("parentCommit")
            if parent is not None and parent != repository.head:
                raise _Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repository.files)
            for operation in operations:
                value, path = operation["value"], operation["value"]["path"]
                if operation["key"] == "file":
                    files[path] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise _Refused(400, f"{path} points to a large file that was not uploaded")
                    files[path] = self.hub.objects[value["oid"]]
                elif path in files:
                    del files[path]
                else:
                    raise _Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            oid = repository.commit(header["value"]["summary"], files)
        url = f"{self.hub.url}/{'datasets/' * (kind == 'datasets')}{name}/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": None}

    def _file(self, kind: str, name: str, revision: str, path: str) -> Any:
        repository = self._repository(kind, name)
        files = repository.at(revision)
        if files is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if path not in files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        oid = repository.head if revision in ("main", "HEAD") else revision
        etag = {"ETag": f'"{hash_of(files[path])}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        return files[path], {**etag, "Content-Type": "application/octet-stream"}


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _blob(data: bytes) -> str:
    """git's own name for a file that is no large one."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _mode(path: str, files: dict[str, bytes]) -> dict[str, Any]:
    mode = "lfs" if path.endswith(LARGE) else "regular"
    name = hash_of if mode == "lfs" else _blob
    oid = name(files[path]) if path in files else None
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _entries(files: dict[str, bytes], path: str) -> list[dict[str, Any]]:
    """The file or the folder of this path; nothing where there is none."""
    path = path.strip("/")
    if path in files:
        data = files[path]
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hash_of(data), "size": len(data), "pointerSize": 130}
        return [entry]
    if any(each.startswith(f"{path}/") for each in files):
        return [{"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}]
    return []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    with Hub(parser.parse_args().port) as hub:
        print(f"HF_ENDPOINT={hub.url} HF_TOKEN={WRITER} HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()
