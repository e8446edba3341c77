"""The loopback Hub with the end points that huggingface_hub uploads through: repositories, branches, LFS, commits.

    with UploadHub(root) as hub:
        hub.received        # SHA-256 of every content that was uploaded, in order

A token of `writers` may write to its namespace `user`, and to `org`.  Xet is not spoken here: HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from loopback_hub import MEMBER_TOKEN, LoopbackHub, _CdnHandler, _HubHandler
from loopback_repository import Repository, StoredFile, _stored

_NAMESPACES = ("user", "org")


class UploadHub(LoopbackHub):
    """`refuse_upload_after` is how many uploads the CDN takes before it refuses; None for all."""

    def __init__(self, root: Path, **options: object) -> None:
        super().__init__(root, **options)  # type: ignore[arg-type]
        self.writers = {MEMBER_TOKEN}
        self.received: list[str] = []
        self.refuse_upload_after: int | None = None
        self.ignored: set[str] = set()
        self._store = root / ".uploads"
        self._store.mkdir()
        for server, handler in zip(self._servers, (_UploadHandler, _UploadCdnHandler), strict=True):
            server.RequestHandlerClass = handler

    def create(self, repo_id: str, *, private: bool) -> None:
        """Make an empty repository, with the one file that the Hub puts into each."""
        folder = self.root / repo_id
        folder.mkdir(parents=True)
        (folder / ".gitattributes").write_bytes(b"*.bin filter=lfs diff=lfs merge=lfs -text\n")
        self.repositories[repo_id] = Repository(repo_id, folder, private)

    def store(self, content: bytes) -> Path:
        """Keep a content under its SHA-256."""
        path = self.content(hashlib.sha256(content).hexdigest())
        path.write_bytes(content)
        return path

    def content(self, sha256: str) -> Path:
        """Where a content is kept, be it there or not."""
        return self._store / sha256

    def commit(self, repository: Repository, branch: str, files: dict[str, StoredFile]) -> str:
        """Put a commit of these files on a branch."""
        main = repository.branches["main"]
        commit = repository._commit(list(files.values()))
        repository.branches["main"] = main
        repository.branches[branch] = commit
        return commit


class _UploadHandler(_HubHandler):
    hub: UploadHub

    def route(self) -> None:
        path = urlsplit(self.path).path
        if self.command != "POST":
            super().route()
        elif path == "/api/validate-yaml":
            self._body()
            self.reply(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create()
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/]+)", path):
            self._write(unquote(match[1]), match[2], unquote(match[3]))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(unquote(match[1]))
        else:
            super().route()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _may_write(self) -> bool:
        if self._token() in self.hub.writers:
            return True
        if self._token() in self.hub.tokens:
            self.refuse(403, message="Forbidden: you must use a write token to upload to a repository.")
        else:
            self.refuse(401, message="Invalid credentials in Authorization header")
        return False

    def _create(self) -> None:
        asked = json.loads(self._body())
        repo_id = f"{asked['organization']}/{asked['name']}"
        if not self._may_write():
            return
        if asked["organization"] not in _NAMESPACES:
            self.refuse(403, message=f"You don't have the rights to create a model under the namespace {repo_id}")
        elif repo_id in self.hub.repositories:
            said = {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{repo_id}"}
            self.reply(409, said, {"X-Error-Message": said["error"]})
        else:
            self.hub.create(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
            self.reply(200, {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id})

    def _write(self, repo_id: str, what: str, branch: str) -> None:
        body = self._body()
        repository = self._repository(repo_id)
        if repository is None or not self._may_write():
            return
        if what == "branch":
            exists = branch in repository.branches
            repository.branches.setdefault(branch, repository.branches["main"])
            self.refuse(409, message="Reference already exists") if exists else self.reply(201, {})
        elif branch not in repository.branches:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        elif what == "preupload":
            self._preupload(repository, branch, json.loads(body))
        else:
            self._commit_onto(repository, branch, [json.loads(line) for line in body.splitlines()])

    def _preupload(self, repository: Repository, branch: str, asked: dict) -> None:
        there = repository.commits[repository.branches[branch]]
        answer = []
        for file in asked["files"]:
            name = file["path"]
            known = there.get(name)
            answer.append(
                {
                    "path": name,
                    "uploadMode": "lfs" if name.endswith(".bin") else "regular",
                    "shouldIgnore": name in self.hub.ignored,
                    **({"oid": known.etag} if known else {}),
                }
            )
        self.reply(200, {"files": answer})

    def _batch(self, repo_id: str) -> None:
        asked = json.loads(self._body())
        if self._repository(repo_id) is None or not self._may_write():
            return
        objects = []
        for wanted in asked["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.hub.content(wanted["oid"]).exists():
                href = f"{self.hub.cdn_endpoint}/upload/{wanted['oid']}?X-Amz-Signature=secret"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def _commit_onto(self, repository: Repository, branch: str, lines: list[dict]) -> None:
        header, *operations = lines
        parent = header["value"].get("parentCommit")
        if parent not in (None, repository.branches[branch]):
            self.refuse(412, message="A commit has happened since. Please refresh and try again.")
            return
        files = dict(repository.commits[repository.branches[branch]])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del files[value["path"]]
                continue
            if operation["key"] == "lfsFile":
                path = self.hub.content(value["oid"])
                if not path.exists():
                    self.refuse(400, message="lfs pointer to an object that was not uploaded")
                    return
            else:
                path = self.hub.store(base64.b64decode(value["content"]))
            files[value["path"]] = _stored(value["path"], path)
        commit = self.hub.commit(repository, branch, files)
        url = f"{self.hub.endpoint}/{repository.repo_id}/commit/{commit}"
        self.reply(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


class _UploadCdnHandler(_CdnHandler):
    hub: UploadHub

    def do_PUT(self) -> None:  # noqa: N802 - a name that the base class looks for
        self._dispatch()

    def route(self) -> None:
        if self.command != "PUT":
            super().route()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        sha256 = urlsplit(self.path).path.rpartition("/")[2]
        if self.seen.authorization or self.hub.refuse_upload_after == len(self.hub.received):
            self.reply(403, {"error": "Request has expired"})
        elif hashlib.sha256(body).hexdigest() != sha256:
            self.reply(400, {"error": "content does not match"})
        else:
            self.hub.store(body)
            self.hub.received.append(sha256)
            self.reply(200)
