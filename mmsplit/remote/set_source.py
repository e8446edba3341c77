"""A place where a partition set is published: a repository on the Hub, a folder on any server, a local directory.

What a user writes for it:

    org/name[@revision][:folder]         a model repository on the Hub, or a folder of it; also hf://org/name…
    https://huggingface.co/org/name/tree/revision/folder      the same, as the browser shows it
    https://host/folder                  a folder on any HTTP server; a query (a signature) goes with every file
    s3://bucket/folder, gs://…           a folder that fsspec reaches
    path/to/folder                       a directory, of a mounted disk perhaps; a path that exists has precedence
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from mmsplit.errors import NetworkError, RequestError
from mmsplit.remote.address import looks_like_path
from mmsplit.remote.local_file import LocalFile
from mmsplit.remote.open_url import UrlFiles
from mmsplit.remote.patience import Clock, Limits
from mmsplit.remote.redaction import without_secrets
from mmsplit.remote.remote_file import GoOn, RemoteFile, never_stop
from mmsplit.remote.repository import hub_endpoint, is_safe_name, open_repository
from mmsplit.remote.source import HubOptions, hub_address_of

#: Written out, because this room stands above the one that knows the format.
_SET_MANIFEST_NAME: Final = "partition_set.json"
_SPELLINGS: Final = "Give org/name[@revision][:folder], the address of a folder, or a directory."


class SetSource:
    """The files of one published folder, by their names relative to it.

    `location` is what messages call it; it holds no secret.  `commit` is the Hub's, None elsewhere.  `directory` is
    where it lies if it lies on this machine.
    """

    def __init__(
        self,
        location: str,
        open_file: Callable[[str], RemoteFile],
        *,
        commit: str | None = None,
        directory: Path | None = None,
    ) -> None:
        self.location = location
        self.commit = commit
        self.directory = directory
        self._open_file = open_file

    def open(self, name: str) -> RemoteFile:
        """Return a file to read by ranges.

        Raises `RemoteNotFoundError` if there is none; on an HTTP server that shows only when it is first read.
        """
        return self._open_file(name)

    def read(self, name: str, limit_bytes: int, go_on: GoOn = never_stop) -> bytes:
        """Return a whole file.  Raises `NetworkError` for one above `limit_bytes`, before any of it is fetched."""
        file = self.open(name)
        if file.size_bytes > limit_bytes:
            raise NetworkError(
                "file is too large for what it is",
                path=file.location,
                expected=f"at most {limit_bytes:,} bytes",
                found=file.size_bytes,
            )
        return file.read(0, file.size_bytes, go_on)


class HubFolder(NamedTuple):
    """A folder of a repository; `folder` is its path with `/`, empty for the repository's top."""

    repository: str
    folder: str


def open_set_source(
    source: str | Path,
    hub: HubOptions | None = None,
    *,
    limits: Limits | None = None,
    clock: Clock | None = None,
) -> SetSource:
    """Find the place that `source` names; on the Hub its revision is pinned to a commit here.

    Raises `RequestError` for what is no place, and the branches of `NetworkError` that `open_repository` raises.
    """
    hub = hub or HubOptions()
    if source == "":
        raise RequestError("no place is given", hint=_SPELLINGS)
    if isinstance(source, Path) or Path(source).exists() or source.startswith("~"):
        return _open_directory(Path(source).expanduser())
    folder = parse_hub_folder(source, hub_endpoint(hub.endpoint))
    address = hub_address_of(folder.repository, hub)
    if address is not None:
        repository = open_repository(
            address.repo_id, address.revision, hub.token, hub.endpoint, limits=limits, clock=clock
        )
        at = f"@{address.revision}" if address.revision else ""
        prefix = f"{folder.folder}/" if folder.folder else ""
        return SetSource(
            f"{address.repo_id}{at}{f':{folder.folder}' if folder.folder else ''}",
            lambda name: repository.open_file(f"{prefix}{name}"),
            commit=repository.commit,
        )
    if "://" in source:
        files = UrlFiles(limits=limits, clock=clock)
        return SetSource(
            without_secrets(source).rstrip("/"), lambda name: files.open(_address_within(source, name), name)
        )
    if looks_like_path(source):
        raise RequestError("no such directory", path=source, hint=_SPELLINGS)
    raise RequestError("neither a directory, nor a model of the Hub, nor an address", path=source, hint=_SPELLINGS)


def parse_hub_folder(text: str, endpoint: str) -> HubFolder:
    """Take the folder off what may be a place on the Hub.  Pure; what is left is for `parse_hub_address` to judge.

    A colon separates it, since neither a repository id nor a revision may hold one.  In an address of the Hub's pages
    it is what follows the revision, in which a `/` is written %2F.
    """
    if text.lower().startswith(("http://", "https://")):
        return _take_off_page(text, endpoint)
    if "://" in text and not text.startswith("hf://"):
        return HubFolder(text, "")
    scheme = "hf://" if text.startswith("hf://") else ""
    repository, colon, folder = text.removeprefix(scheme).partition(":")
    folder = folder.strip("/")
    if colon and not is_safe_name(folder):
        raise RequestError("not a folder of a repository", found=repr(folder), hint=_SPELLINGS)
    return HubFolder(scheme + repository, folder)


def _take_off_page(url: str, endpoint: str) -> HubFolder:
    parts, base = urlsplit(url), urlsplit(endpoint)
    above = base.path.rstrip("/") if parts.netloc == base.netloc else ""
    # org, name, "tree", revision, folder …; whether the host is the Hub is seen when the rest is parsed.
    pieces = parts.path.removeprefix(above).strip("/").split("/")
    if len(pieces) < 5 or pieces[2] not in ("tree", "resolve", "blob") or pieces[3] == "refs":
        return HubFolder(url, "")
    folder = _above_set_manifest(unquote("/".join(pieces[4:])))
    if folder and not is_safe_name(folder):
        return HubFolder(url, "")
    path = "/".join([above, *pieces[:2], "tree", pieces[3]])
    return HubFolder(urlunsplit((parts.scheme, parts.netloc, path, "", "")), folder)


def _open_directory(path: Path) -> SetSource:
    if not path.exists():
        raise RequestError("no such directory", path=path, hint=_SPELLINGS)
    root = path if path.is_dir() else path.parent
    if not path.is_dir() and path.name != _SET_MANIFEST_NAME:
        raise RequestError("not a directory", path=path, hint="Give the directory of a partition set.")
    return SetSource(str(root), lambda name: LocalFile(root / name, name), directory=root)


def _address_within(url: str, name: str) -> str:
    """Return the address of a file in the folder at `url`."""
    if url.lower().startswith(("http://", "https://")):
        parts = urlsplit(url)
        path = f"{_above_set_manifest(parts.path)}/{quote(name)}"
        return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
    return f"{_above_set_manifest(url)}/{name}"


def _above_set_manifest(path: str) -> str:
    """Whoever gives the address of the set manifest means the folder it lies in."""
    head, _, tail = path.rstrip("/").rpartition("/")
    return head if tail == _SET_MANIFEST_NAME else path.rstrip("/")
