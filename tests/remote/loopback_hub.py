"""A Hub on loopback, with faults on demand: what huggingface_hub's own client works against, read side only.

    with LoopbackHub(root) as hub:      # root/<org>/<name>/<files>
        hub.faults.append(Fault("drop", match="cdn GET *", after_bytes=1000))
        open_repository("org/name", endpoint=hub.endpoint)
        hub.requests                    # all that was asked

Two servers, since an origin is scheme, host and port: the Hub, and the "CDN" that it redirects large files to with a
signature.  The CDN refuses any request that carries a token, and `/static/…` on it are plain files of root/static.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import json
import re
import secrets
import socket
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Literal
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from loopback_repository import Repository, StoredFile

#: May read private repositories, and the gated ones too.
MEMBER_TOKEN = "hf_memberMEMBERmemberMEMBERmember0001"
#: May read private repositories, and has been granted none of the gated.
OUTSIDER_TOKEN = "hf_outsideroutsideroutsideroutsider02"

#: status       the answer is `status` with `headers`
#: drop, reset  the connection ends, in order or not, after `after_bytes` of the body
#: stall        after `after_bytes` nothing comes any more, until the Hub is stopped
#: short        Content-Length and body are `after_bytes` long, whatever was asked for
#: ignore_range 200 and the whole file
#: gzip         200 and the whole file, compressed
#: gzip_range   206 and a range of the compressed file
#: flip         one bit of each block is not what it was
#: wrong_range  206 for a range that begins a byte late, says Content-Range
#: no_length    200 and the whole file, which ends with the connection
Kind = Literal[
    "status",
    "drop",
    "reset",
    "stall",
    "short",
    "ignore_range",
    "gzip",
    "gzip_range",
    "flip",
    "wrong_range",
    "no_length",
]


@dataclass
class Fault:
    """Befalls the next `times` requests (-1 for all) that match `<server> <method> <path?query>`, server hub or cdn."""

    kind: Kind
    match: str = "*"
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    after_bytes: int = 0


@dataclass
class Request:
    """One request that came, and what became of it."""

    server: str
    method: str
    path: str
    headers: dict[str, str]
    status: int | None = None
    sent_bytes: int = 0
    connection: int = 0

    @property
    def range(self) -> str | None:
        return self.headers.get("range")

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")


class LoopbackHub:
    """Both servers, the repositories, the log of requests and the faults to come."""

    def __init__(
        self,
        root: Path,
        *,
        private: Iterable[str] = (),
        gated: Iterable[str] = (),
        xet: Iterable[str] = (),
        page_size: int = 1000,
    ) -> None:
        self.root = root
        self.static = root / "static"
        self.page_size = page_size
        self.tokens = {MEMBER_TOKEN, OUTSIDER_TOKEN}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.renamed: dict[str, str] = {}
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.repositories = {
            repo_id: Repository(repo_id, root / repo_id, repo_id in private, repo_id in gated, repo_id in xet)
            for repo_id in (f"{org.name}/{path.name}" for org in _folders(root) for path in _folders(org))
        }
        self._signed: dict[str, StoredFile] = {}
        self._servers = [_Server(self, "hub", _HubHandler), _Server(self, "cdn", _CdnHandler)]
        self.endpoint, self.cdn_endpoint = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> LoopbackHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def move_main(self, repo_id: str, changes: dict[str, bytes | None]) -> str:
        """Commit `changes` onto main, as somebody who pushes meanwhile; return the new commit."""
        store = self.root / ".blobs"
        store.mkdir(exist_ok=True)
        return self.repositories[repo_id].move_main(changes, store)

    def expire_signatures(self) -> None:
        """Make the CDN refuse every address that was handed out so far."""
        self._signed.clear()

    def static_url(self, name: str) -> str:
        """The address of a plain file of root/static."""
        return f"{self.cdn_endpoint}/static/{quote(name)}"

    def clear(self) -> None:
        """Forget the faults to come and the requests so far."""
        self.faults.clear()
        self.requests.clear()

    def requests_to(self, server: str, path_part: str = "") -> list[Request]:
        """Requests that one server saw, those whose path contains `path_part`."""
        return [request for request in self.requests if request.server == server and path_part in request.path]

    def sign(self, file: StoredFile) -> str:
        """An address on the CDN that is good until `expire_signatures`."""
        signature = secrets.token_hex(16)
        self._signed[signature] = file
        query = urlencode({"X-Amz-Signature": signature, "response-content-disposition": f'filename="{file.name}"'})
        return f"{self.cdn_endpoint}/blobs/{file.sha256}?{query}"

    def signed_file(self, path: str, signature: str) -> StoredFile | None:
        """The file that a signature gives access to at `path`."""
        file = self._signed.get(signature)
        return file if file is not None and path == f"/blobs/{file.sha256}" else None

    def next_fault(self, request: Request) -> Fault | None:
        """The fault that befalls a request, used up once."""
        key = f"{request.server} {request.method} {request.path}"
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and fnmatch.fnmatchcase(key, fault.match):
                    fault.times -= 1 if fault.times > 0 else 0
                    return fault
        return None


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and p.name != "static" and not p.name.startswith("."))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: LoopbackHub, name: str, handler: type[_Handler]) -> None:
        self.hub = hub
        self.name = name
        super().__init__(("127.0.0.1", 0), handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that break are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer on a kept connection waits 40 ms for an acknowledgement
    server: _Server

    def log_message(self, *args: object) -> None:
        pass

    def _dispatch(self) -> None:
        self.hub = self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.seen = Request(self.server.name, self.command, self.path, headers, connection=self.client_address[1])
        self.fault = self.hub.next_fault(self.seen)
        if self.fault is not None and self.fault.kind == "status":
            self.reply(self.fault.status, b'{"error":"injected"}', self.fault.headers)
        else:
            self.route()

    do_GET = do_HEAD = do_POST = _dispatch  # noqa: N815 - names that the base class looks for

    def route(self) -> None:
        raise NotImplementedError

    def reply(self, status: int, body: object = b"", headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.begin(status, {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(content)
            self.seen.sent_bytes = len(content)

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.seen.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def refuse(self, status: int, code: str | None = None, message: str | None = None, **headers: str) -> None:
        said = {name.replace("_", "-"): value for name, value in headers.items()}
        if code:
            said["X-Error-Code"] = code
        if message:
            said["X-Error-Message"] = message
        self.reply(status, {"error": message or code or "error"}, said)

    def send_file(self, path: Path, etag: str, headers: dict[str, str] | None = None) -> None:
        kind = self.fault.kind if self.fault else None
        size = path.stat().st_size
        said = {"Content-Type": "application/octet-stream", "ETag": f'"{etag}"', **(headers or {})}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.seen.range or "")
        start, stop, status = 0, size, 200
        if asked and kind not in ("ignore_range", "gzip", "no_length"):
            start, stop, status = int(asked[1]), min(int(asked[2] or size) + 1, size), 206
            if start >= stop:
                self.reply(416, b"", {"Content-Range": f"bytes */{size}"})
                return
            late = 1 if kind == "wrong_range" else 0
            said["Content-Range"] = f"bytes {start + late}-{stop - 1}/{size}"
        if kind == "gzip_range" and status == 206:
            compressed = gzip.compress(path.read_bytes())
            said |= {"Content-Encoding": "gzip", "Content-Range": f"bytes {start}-{stop - 1}/{len(compressed)}"}
        body = b""
        if self.command != "HEAD":
            with path.open("rb") as file:
                file.seek(start)
                body = file.read(stop - start)
        length = len(body) if self.command != "HEAD" else stop - start
        if kind == "gzip":
            body = gzip.compress(body)
            length = len(body)
            said["Content-Encoding"] = "gzip"
        if kind == "flip" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        if kind == "no_length":
            self.close_connection = True
            said["Connection"] = "close"
        else:
            said["Content-Length"] = str(self.fault.after_bytes if self.fault and kind == "short" else length)
        self.begin(status, said)
        if self.command != "HEAD":
            self.send_body(body)

    def send_body(self, body: bytes) -> None:
        fault = self.fault
        if fault is not None and fault.kind in ("drop", "reset", "stall", "short"):
            body = body[: fault.after_bytes]
        self.wfile.write(body)
        self.seen.sent_bytes = len(body)
        if fault is None or fault.kind not in ("drop", "reset", "stall"):
            return
        self.wfile.flush()
        self.close_connection = True
        if fault.kind == "stall":
            self.hub.stopping.wait(60)
        elif fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)


class _CdnHandler(_Handler):
    def route(self) -> None:
        parts = urlsplit(self.path)
        if (self.seen.authorization or "").startswith("Bearer"):
            self.reply(403, {"error": "a token has no business here"})
        elif parts.path.startswith("/static/"):
            path = self.hub.static / unquote(parts.path.removeprefix("/static/"))
            if path.is_file():
                self.send_file(path, hashlib.sha256(path.read_bytes()).hexdigest()[:16])
            else:
                self.reply(404)
        else:
            file = self.hub.signed_file(parts.path, parse_qs(parts.query).get("X-Amz-Signature", [""])[0])
            if file is None:
                self.reply(403, {"error": "Request has expired"})
            else:
                self.send_file(file.path, file.sha256)


class _HubHandler(_Handler):
    def route(self) -> None:
        parts = urlsplit(self.path)
        path = parts.path
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if path == "/api/whoami-v2":
            self._who()
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            self._route_api(unquote(match[1]), match[2] or "", query)
        elif match := re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
            self._resolve(unquote(match[1]), match[2], unquote(match[3]), direct=True)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(unquote(match[1]), unquote(match[2]), unquote(match[3]))
        else:
            self.refuse(404, message="Not found")

    def _route_api(self, repo_id: str, rest: str, query: dict[str, str]) -> None:
        _, what, *folders = rest.split("/") if rest else ("", "")
        revision = unquote(folders[0]) if folders else "main"
        if what in ("", "revision"):
            self._info(repo_id, revision, query)
        elif what == "tree":
            self._tree(repo_id, revision, unquote("/".join(folders[1:])), query)
        elif what == "paths-info":
            self._paths_info(repo_id, revision)
        elif what == "auth-check":
            repository = self._repository(repo_id)
            if repository and self._pass_gate(repository):
                self.reply(200, {})
        else:
            self.refuse(404, message="Not found")

    def _token(self) -> str | None:
        said = self.seen.authorization
        return said.removeprefix("Bearer ") if said else None

    def _who(self) -> None:
        if self._token() in self.hub.tokens:
            self.reply(200, {"type": "user", "name": "user", "orgs": []})
        else:
            self.refuse(401, message="Invalid username or password.")

    def _repository(self, repo_id: str) -> Repository | None:
        """The repository, or None after a refusal.  Over http the client knows refusals by X-Error-Code only."""
        token = self._token()
        if token is not None and token not in self.hub.tokens:
            self.refuse(401, message="Invalid credentials in Authorization header")
            return None
        if repo_id in self.hub.renamed:
            self.reply(307, b"", {"Location": self.path.replace(repo_id, self.hub.renamed[repo_id], 1)})
            return None
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and token is None):
            status, said = (404, "Repository not found") if token else (401, "Invalid username or password.")
            self.refuse(status, "RepoNotFound", said)
            return None
        return repository

    def _commit(self, repo_id: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and the commit of a revision, or None after a refusal."""
        repository = self._repository(repo_id)
        if repository is None:
            return None
        commit = repository.commit_of(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def _pass_gate(self, repository: Repository) -> bool:
        token = self._token()
        if not repository.gated or token == MEMBER_TOKEN:
            return True
        said = f"Access to model {repository.repo_id} is restricted"
        if token is None:
            self.refuse(401, "GatedRepo", f"{said}. You must have access to it and be authenticated. Please log in.")
        else:
            self.refuse(403, "GatedRepo", f"{said} and you are not in the authorized list.")
        return False

    def _info(self, repo_id: str, revision: str, query: dict[str, str]) -> None:
        found = self._commit(repo_id, revision)
        if found is None:
            return
        repository, commit = found
        siblings = []
        for file in repository.commits[commit].values():
            entry = file.entry(xet=False)
            sibling: dict[str, object] = {"rfilename": file.name}
            if query.get("blobs"):
                sibling |= {"size": file.size_bytes, "blobId": file.blob_id}
                if isinstance(lfs := entry.get("lfs"), dict):
                    sibling["lfs"] = {**lfs, "sha256": file.sha256}
            siblings.append(sibling)
        said = {
            "_id": "0" * 24,
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }
        self.reply(200, said)

    def _tree(self, repo_id: str, revision: str, folder: str, query: dict[str, str]) -> None:
        found = self._commit(repo_id, revision)
        if found is None:
            return
        repository, commit = found
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        recursive = query.get("recursive", "false").lower() == "true"
        entries: dict[str, dict[str, object]] = {}
        for name, file in sorted(repository.commits[commit].items()):
            if not name.startswith(prefix):
                continue
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                path = prefix + "/".join(parts[:depth])
                entries[path] = {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "path": path}
                entries[path]["size"] = 0
            if recursive or len(parts) == 1:
                entries[name] = file.entry(xet=repository.xet)
        if prefix and not entries:
            self.refuse(404, "EntryNotFound", f"{folder} does not exist")
            return
        start = int(query.get("cursor", "0"))
        stop = start + min(int(query.get("limit", self.hub.page_size)), self.hub.page_size)
        headers = {}
        if stop < len(entries):
            following = urlencode({**query, "cursor": stop})
            headers["Link"] = f'<{self.hub.endpoint}{urlsplit(self.path).path}?{following}>; rel="next"'
        self.reply(200, list(entries.values())[start:stop], headers)

    def _paths_info(self, repo_id: str, revision: str) -> None:
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        found = self._commit(repo_id, revision)
        if found is None:
            return
        repository, commit = found
        files = repository.commits[commit]
        self.reply(200, [files[path].entry(xet=repository.xet) for path in form.get("paths", []) if path in files])

    def _resolve(self, repo_id: str, revision: str, name: str, *, direct: bool = False) -> None:
        found = self._commit(repo_id, revision)
        if found is None or not self._pass_gate(found[0]):
            return
        repository, commit = found
        file = repository.commits[commit].get(name)
        if file is None:
            self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
            return
        headers = {"X-Repo-Commit": commit, "RateLimit": '"resolvers";r=2999;t=172'}
        if file.is_lfs:
            linked = {"X-Linked-Size": str(file.size_bytes), "X-Linked-ETag": f'"{file.etag}"'}
            if repository.xet:
                linked["X-Xet-Hash"] = file.sha256[::-1]
            self.reply(302, b"", {**headers, **linked, "ETag": f'"{file.etag}"', "Location": self.hub.sign(file)})
        elif direct or repository.private or not file.size_bytes:
            self.send_file(file.path, file.etag, headers)
        else:
            cache = f"/api/resolve-cache/models/{repo_id}/{commit}/{quote(name)}?etag=%22{file.etag}%22"
            self.reply(307, b"", {**headers, "Location": cache})
