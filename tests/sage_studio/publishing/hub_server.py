"""A small Hub on loopback, for tests: what `huggingface_hub` and Transformers ask of it, in memory.

    with LoopbackHub() as hub:
        hub.add_user("someone", token="hf_someone")
        ...                                         # HF_ENDPOINT=hub.url HF_HUB_DISABLE_XET=1

Repositories have branches, commits, regular and large files, and may be private or gated. Large files go through the
Git LFS protocol; what came in is counted by file, and `hub.on_bytes` can look at, hold up or break off an upload.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCard

LARGE_BYTES = 100_000  # what is larger, or of a suffix below, is a large file
LARGE_SUFFIXES = (".safetensors", ".wav", ".png", ".mid", ".parquet")


class Rejected(Exception):
    """An answer that is an error; `commit`: the one that was asked for a file."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = ""):
        super().__init__(message)
        self.status, self.code, self.commit = status, code, commit


@dataclass
class Commit:
    oid: str
    files: dict[str, bytes]
    title: str


@dataclass
class Repository:
    """One repository; `refs` are branches and tags by name."""

    name: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes], title: str) -> Commit:
        parent = self.refs.get(ref, "")
        oid = hashlib.sha1(repr((self.name, parent, title, sorted(files), len(self.commits))).encode()).hexdigest()
        self.commits[oid] = Commit(oid, files, title)
        self.refs[ref] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit:
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Rejected(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]


@dataclass
class User:
    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"
    only: str | None = None

    def owns(self, repository: str) -> bool:
        if self.only is not None:
            return repository == self.only
        return repository.split("/")[0] in (self.name, *self.orgs)


def is_large(path: str, data: bytes) -> bool:
    return len(data) > LARGE_BYTES or (path.endswith(LARGE_SUFFIXES) and len(data) > 0)


def blob_id(path: str, data: bytes) -> str:
    """A large file's sha256, another's Git object id."""
    if is_large(path, data):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class LoopbackHub:
    """The server and all that it holds.

    Attributes:
        url: for `HF_ENDPOINT`.
        repositories: by kind and name, `("models", "user/name")`.
        received: bytes of large files that came in, by sha256, whole or not.
        requests: (method, path) of every request.
        on_bytes: called as `on_bytes(sha256, received, size)` while a large file comes in; if it returns False, the
            connection is cut.
    """

    def __init__(self):
        self.users: dict[str, User] = {}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.received: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        self.on_bytes: Callable[[str, int, int], bool | None] = lambda sha256, received, size: True
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def add_user(
        self, name: str, token: str, orgs: tuple[str, ...] = (), role: str = "write", only: str | None = None
    ) -> None:
        """A token of a user; `only`: the one repository that it may read and write, and make none."""
        self.users[token] = User(name, orgs, role, only)

    def repository(self, name: str, kind: str = "models") -> Repository:
        return self.repositories[kind, name]

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        return self.repository(name, kind).at(revision).files


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: LoopbackHub

    def log_message(self, *args):
        pass

    def _serve(self):
        url = urlsplit(self.path)
        path = url.path
        with self.hub.lock:
            self.hub.requests.append((self.command, unquote(path)))
        length = int(self.headers.get("Content-Length") or 0)
        try:
            if self.command == "PUT":
                self._put(path, length)
                return
            body = self._body(length)
            for method, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method.split():
                    with self.hub.lock:
                        answer(self, body, **{key: unquote(value or "") for key, value in found.groupdict().items()})
                    return
            raise Rejected(404, f"no such page: {self.command} {path}")
        except Rejected as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            headers |= {"X-Repo-Commit": error.commit} if error.commit else {}
            self._send(error.status, {"error": str(error)}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _body(self, length: int) -> bytes:
        return self.rfile.read(length)

    def _send(self, status: int, content=b"", headers: dict[str, str] | None = None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ---- who may do what

    def _user(self) -> User | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not given:
            return None
        if given not in self.hub.users:
            raise Rejected(401, "Invalid credentials in Authorization header")
        return self.hub.users[given]

    def _readable(self, kind: str, name: str) -> Repository:
        user, found = self._user(), self.hub.repositories.get((kind, name))
        owner = user is not None and user.owns(name)
        if found is None or (found.private and not owner):
            raise Rejected(404 if user else 401, "Repository not found", "RepoNotFound")
        if found.gated and not owner:
            raise Rejected(403 if user else 401, f"Access to model {name} is restricted.", "GatedRepo")
        return found

    def _writable(self, kind: str, name: str) -> Repository:
        found = self._readable(kind, name)
        self._check_writer(name)
        return found

    def _check_writer(self, name: str) -> User:
        user = self._user()
        if user is None:
            raise Rejected(401, "Invalid username or password.")
        if not user.owns(name) or user.role == "read":
            raise Rejected(403, f"You don't have the rights to write in {name.split('/')[0]}")
        return user

    # ---- the API

    def whoami(self, body):
        user = self._user()
        if user is None:
            raise Rejected(401, "Invalid credentials in Authorization header")
        token = {"displayName": "test", "role": user.role}
        self._send(
            200,
            {
                "type": "user",
                "name": user.name,
                "orgs": [{"name": org} for org in user.orgs],
                "auth": {"type": "access_token", "accessToken": token},
            },
        )

    def create(self, body):
        asked = json.loads(body)
        user = self._user()
        if user is None:
            raise Rejected(401, "Invalid username or password.")
        name, kind = f"{asked.get('organization') or user.name}/{asked['name']}", f"{asked.get('type', 'model')}s"
        if user.only is not None:
            raise Rejected(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
        self._check_writer(name)
        if (kind, name) in self.hub.repositories:
            message = f"You already created this {kind[:-1]} repo: {name}"
            raise Rejected(409, message)
        made = Repository(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        made.commit(
            "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit"
        )
        self.hub.repositories[kind, name] = made
        self._send(200, {"url": f"{self.hub.url}/{name}"})

    def validate(self, body):
        asked, errors = json.loads(body), []
        if asked.get("repoType", "model") == "model":
            try:
                data = ModelCard(asked["content"]).data
                if data.license is not None and not re.fullmatch(r"[a-z0-9.+-]+", data.license):
                    errors.append({"message": '"license" must be one of the known identifiers'})
            except Exception as error:
                errors.append({"message": str(error)})
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, body, kind, name, revision=""):
        found = self._readable(kind, name)
        commit = found.at(revision or "main")
        self._send(
            200,
            {
                "id": name,
                "modelId": name,
                "sha": commit.oid,
                "private": found.private,
                "gated": "auto" if found.gated else False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            },
        )

    def tree(self, body, kind, name, revision, folder=""):
        commit, found, folder = self._readable(kind, name).at(revision), [], folder.strip("/")
        recursive = "recursive=true" in self.path.lower()
        folders = set()
        for path, data in sorted(commit.files.items()):
            if folder and not path.startswith(f"{folder}/"):
                continue
            inner = path[len(folder) + 1 if folder else 0 :]
            if "/" in inner and not recursive:
                folders.add(f"{folder}/{inner.split('/')[0]}".strip("/"))
                continue
            found.append(self._entry(path, data))
        found += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        if folder and not found:
            raise Rejected(404, f"{folder} does not exist", "EntryNotFound")
        self._send(200, found)

    def _entry(self, path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": blob_id(path, data)[:40]}
        if is_large(path, data):
            entry["lfs"] = {"oid": blob_id(path, data), "size": len(data), "pointerSize": 134}
        return entry

    def branch(self, body, kind, name, ref):
        found = self._writable(kind, name)
        if ref in found.refs:
            raise Rejected(409, f"Reference already exists: {ref}")
        found.refs[ref] = found.at(json.loads(body or b"{}").get("startingPoint", "main")).oid
        self._send(200, {})

    def preupload(self, body, kind, name, revision):
        files = self._writable(kind, name).at(revision).files
        answers = []
        for asked in json.loads(body)["files"]:
            path, known = asked["path"], files.get(asked["path"])
            large = asked["size"] > LARGE_BYTES or (path.endswith(LARGE_SUFFIXES) and asked["size"])
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": None if known is None else blob_id(path, known),
                }
            )
        self._send(200, {"files": answers})

    def batch(self, body, name, kind=""):
        self._writable(kind.strip("/") or "models", name)
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
            if asked["oid"] not in self.hub.storage:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{asked['oid']}"}}
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def commit(self, body, kind, name, revision):
        found = self._writable(kind, name)
        parent = found.at(revision)
        files, title = dict(parent.files), ""
        for line in body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise Rejected(400, f"{value['path']}: its content was never uploaded")
                files[value["path"]] = self.hub.storage[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        made = found.commit(revision, files, title)
        self._send(
            200, {"commitOid": made.oid, "commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}", "hookOutput": ""}
        )

    def resolve(self, body, name, revision, path, kind=""):
        commit = self._readable(kind.strip("/") or "models", name).at(revision)
        if path not in commit.files:
            raise Rejected(404, "Entry not found", "EntryNotFound", commit.oid)
        data = commit.files[path]
        headers = {
            "X-Repo-Commit": commit.oid,
            "ETag": f'"{blob_id(path, data)}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if is_large(path, data):
            headers |= {"X-Linked-ETag": f'"{blob_id(path, data)}"', "X-Linked-Size": str(len(data))}
        status, part = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part:
            first, last = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
            if first >= len(data):
                raise Rejected(416, "Range Not Satisfiable")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        self._send(status, data, headers)

    def _put(self, path: str, length: int):
        """Takes a large file in, piece by piece, without the lock."""
        oid, parts, received = path.removeprefix("/storage/"), [], 0
        while received < length:
            piece = self.rfile.read(min(65_536, length - received))
            if not piece:
                break
            parts.append(piece)
            received += len(piece)
            with self.hub.lock:
                self.hub.received[oid] += len(piece)
            if self.hub.on_bytes(oid, received, length) is False:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
        data = b"".join(parts)
        if hashlib.sha256(data).hexdigest() != oid:
            self.close_connection = True
            return
        with self.hub.lock:
            self.hub.storage[oid] = data
        self._send(200)


KIND, NAME = r"(?P<kind>models|datasets|spaces)", r"(?P<name>[^/]+/[^/]+)"
REVISION, PREFIX = r"(?P<revision>[^/]+)", r"/(?P<kind>(?:datasets|spaces)/)?"
ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", rf"/api/{KIND}/{NAME}(?:/revision/{REVISION})?", _Handler.info),
    ("GET", rf"/api/{KIND}/{NAME}/tree/{REVISION}(?P<folder>/.*)?", _Handler.tree),
    ("POST", rf"/api/{KIND}/{NAME}/branch/(?P<ref>[^/]+)", _Handler.branch),
    ("POST", rf"/api/{KIND}/{NAME}/preupload/{REVISION}", _Handler.preupload),
    ("POST", rf"/api/{KIND}/{NAME}/commit/{REVISION}", _Handler.commit),
    ("POST", rf"{PREFIX}{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("GET HEAD", rf"{PREFIX}{NAME}/resolve/{REVISION}/(?P<path>.+)", _Handler.resolve),
]
