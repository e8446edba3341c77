"""Repositories as the loopback Hub keeps them: commits of files that lie on disk, addressed as git and LFS do."""

from __future__ import annotations

import fnmatch
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5")


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit; `path` is where its bytes lie."""

    name: str
    path: Path
    size_bytes: int
    sha256: str
    blob_id: str
    is_lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id

    def entry(self, *, xet: bool) -> dict[str, object]:
        """What a listing says of it."""
        said: dict[str, object] = {"type": "file", "oid": self.blob_id, "size": self.size_bytes, "path": self.name}
        if self.is_lfs:
            said["lfs"] = {"oid": self.sha256, "size": self.size_bytes, "pointerSize": len(self._pointer())}
            if xet:
                said["xetHash"] = self.sha256[::-1]
        return said

    def _pointer(self) -> bytes:
        return _pointer(self.sha256, self.size_bytes)


@dataclass
class Repository:
    """Every commit that a repository ever had, and where its branches point."""

    repo_id: str
    folder: Path
    private: bool = False
    gated: bool = False
    xet: bool = False
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.branches:
            files = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
            self._commit([_stored(path.relative_to(self.folder).as_posix(), path) for path in files])

    def commit_of(self, revision: str) -> str | None:
        """The commit that a branch or a commit's own name stands for."""
        return revision if revision in self.commits else self.branches.get(revision)

    def move_main(self, changes: dict[str, bytes | None], store: Path) -> str:
        """Commit `changes` (None removes a file) onto main and return the commit; earlier ones stay as they were."""
        files = dict(self.commits[self.branches["main"]])
        for name, content in changes.items():
            files.pop(name, None)
            if content is not None:
                path = store / hashlib.sha256(content).hexdigest()
                path.write_bytes(content)
                files[name] = _stored(name, path)
        return self._commit(list(files.values()))

    def _commit(self, files: list[StoredFile]) -> str:
        commit = hashlib.sha1(
            "".join(f"{file.name} {file.blob_id}\n" for file in sorted(files, key=lambda file: file.name)).encode()
        ).hexdigest()
        self.commits[commit] = {file.name: file for file in files}
        self.branches["main"] = commit
        return commit


def _stored(name: str, path: Path) -> StoredFile:
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    is_lfs = any(fnmatch.fnmatch(name, pattern) for pattern in LFS_PATTERNS)
    blob = _pointer(sha256, len(content)) if is_lfs else content
    blob_id = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
    return StoredFile(name, path, len(content), sha256, blob_id, is_lfs)


def _pointer(sha256: str, size_bytes: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size_bytes}\n".encode()
