"""A model repository on the Hub at one commit: what files it has, and each of them by ranges.

The revision that was asked for is resolved to a commit by one request, and only the commit is used from then on, so
that a branch that moves meanwhile changes nothing.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from mmsplit.errors import NetworkError, RemoteNotFoundError, RequestError
from mmsplit.remote.address import is_repo_id
from mmsplit.remote.failures import Asked, ask_hub, host_of, network_errors
from mmsplit.remote.http_client import HttpClient, not_a_hub
from mmsplit.remote.http_file import Expected, HttpFile
from mmsplit.remote.patience import Clock, Limits
from mmsplit.remote.remote_file import GoOn, never_stop
from mmsplit.remote.transfer_log import Traffic

_COMMIT: Final = re.compile(r"[0-9a-f]{40}", re.ASCII)
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_MOST_PAGES: Final = 10_000


class HubFile(NamedTuple):
    """One file of a repository, as its listing says.

    `sha256` is that of the content, 64 hexadecimal digits, and known for large (LFS) files only; `blob_id` is git's.
    The Hub's ETag, and the file's name in the Hub cache, is `etag`.
    """

    name: str
    size_bytes: int
    sha256: str | None
    blob_id: str
    xet: bool

    @property
    def etag(self) -> str:
        """What the Hub calls this content."""
        return self.sha256 or self.blob_id


class HubRepository:
    """Files of one repository at one commit; safe to share between threads."""

    def __init__(
        self,
        repo_id: str,
        revision: str | None,
        commit: str,
        files: tuple[HubFile, ...],
        *,
        endpoint: str,
        client: HttpClient,
    ) -> None:
        self.repo_id = repo_id
        self.revision = revision
        self.commit = commit
        self.files = files
        self.endpoint = endpoint
        self._client = client
        self._by_name = {file.name: file for file in files}
        self._lock = threading.Lock()
        self._opened: dict[str, HttpFile] = {}

    @property
    def traffic(self) -> Traffic:
        """What moved so far for this repository."""
        return self._client.traffic

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def file(self, name: str) -> HubFile:
        """Return what the listing says of a file.  Raises `RemoteNotFoundError` for one it does not have."""
        found = self._by_name.get(name)
        if found is None:
            raise RemoteNotFoundError(
                f"no file {name!r} in this revision", path=f"{self.repo_id}@{self.revision or self.commit}"
            )
        return found

    def open_file(self, name: str) -> HttpFile:
        """Return a file to read by ranges, the same object each time: it knows the address it was redirected to.

        Nothing is requested before the first range.
        """
        file = self.file(name)
        with self._lock:
            if name not in self._opened:
                self._opened[name] = HttpFile(
                    self._client,
                    f"{self.endpoint}/{self.repo_id}/resolve/{self.commit}/{quote(name)}",
                    name=name,
                    asked=ask_hub(self.endpoint, self.repo_id, self.revision or self.commit[:12], name),
                    expected=Expected(file.size_bytes, file.etag, self.commit),
                )
            return self._opened[name]

    def read_file(self, name: str, limit_bytes: int, go_on: GoOn = never_stop) -> bytes:
        """Return a whole small file.  Raises `NetworkError` for one above `limit_bytes`."""
        file = self.open_file(name)
        if file.size_bytes > limit_bytes:
            raise NetworkError(
                "file is too large for what it is",
                path=file.location,
                expected=f"at most {limit_bytes:,} bytes",
                found=f"{file.size_bytes:,} bytes",
            )
        return file.read(0, file.size_bytes, go_on)


def open_repository(
    repo_id: str,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    *,
    limits: Limits | None = None,
    clock: Clock | None = None,
    traffic: Traffic | None = None,
    go_on: GoOn = never_stop,
) -> HubRepository:
    """Pin a revision to its commit and list its files: two requests, and one more per thousand files.

    `token` None finds HF_TOKEN or the login of `hf auth login`, False sends none.  `endpoint` None is HF_ENDPOINT.
    Raises `RequestError` for an id that cannot be one, and the branches of `NetworkError`.
    """
    if not is_repo_id(repo_id):
        raise RequestError("not a repository id", found=repr(repo_id), hint="Give org/name, as on the Hub's page")
    endpoint = hub_endpoint(endpoint)
    asked = ask_hub(endpoint, repo_id, revision)
    client = HttpClient(endpoint=endpoint, token=find_token(token, asked), traffic=traffic, limits=limits, clock=clock)
    commit = _resolve_commit(client, endpoint, asked, go_on)
    return HubRepository(
        repo_id, revision, commit, _list_files(client, endpoint, asked, commit, go_on), endpoint=endpoint, client=client
    )


def hub_endpoint(endpoint: str | None = None) -> str:
    """Return the Hub's address without a slash at its end: the one given, or HF_ENDPOINT, or the public Hub."""
    from huggingface_hub import constants

    return (endpoint or constants.ENDPOINT).rstrip("/")


def find_token(token: str | bool | None, asked: Asked) -> str | None:
    """Return the token to use, by huggingface_hub's rules: the one given, HF_TOKEN, or that of `hf auth login`."""
    if isinstance(token, str):
        return token.strip() or None
    from huggingface_hub import constants, get_token

    if token is False or (token is None and constants.HF_HUB_DISABLE_IMPLICIT_TOKEN):
        return None
    with network_errors(asked):
        return get_token()


def cached_snapshot(repo_id: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path | None:
    """Return the folder of a revision in the Hub cache, as huggingface_hub finds it without the network; or None.

    The folder may lack files that were never downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except LocalEntryNotFoundError as error:
        known = getattr(error, "snapshot_path", None)  # there, but incomplete (huggingface_hub 2)
        return Path(known) if known else None


def _resolve_commit(client: HttpClient, endpoint: str, asked: Asked, go_on: GoOn) -> str:
    url = f"{endpoint}/api/models/{asked.repo_id}"
    if asked.revision is not None:
        url += f"/revision/{quote(asked.revision, safe='')}"
    answer, _ = client.read_json(url, asked, go_on)
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise not_a_hub(asked, host_of(endpoint), "no commit")
    return commit


def _list_files(client: HttpClient, endpoint: str, asked: Asked, commit: str, go_on: GoOn) -> tuple[HubFile, ...]:
    base = f"{endpoint}/api/models/{asked.repo_id}/tree/{commit}"
    query: dict[str, str] | None = {"recursive": "true", "expand": "false"}
    files: dict[str, HubFile] = {}
    for _ in range(_MOST_PAGES):
        if query is None:
            return tuple(files[name] for name in sorted(files))
        page, next_url = client.read_json(f"{base}?{urlencode(query)}", asked, go_on)
        if not isinstance(page, list):
            raise not_a_hub(asked, host_of(endpoint), "no listing of files")
        for entry in page:
            if isinstance(entry, dict) and entry.get("type") == "directory":
                continue
            file = _parse_file(entry)
            if file is None or file.name in files:
                raise not_a_hub(asked, host_of(endpoint), f"an entry that is none: {str(entry)[:200]!r}")
            files[file.name] = file
        # A mirror may give the Hub's own address for the next page: only what is asked there is taken over.
        query = {key: values[-1] for key, values in parse_qs(urlsplit(next_url).query).items()} if next_url else None
    raise not_a_hub(asked, host_of(endpoint), "a listing without end")


def _parse_file(entry: object) -> HubFile | None:
    if not isinstance(entry, dict):
        return None
    name, size, blob_id, lfs = entry.get("path"), entry.get("size"), entry.get("oid"), entry.get("lfs")
    if not isinstance(name, str) or not is_safe_name(name) or type(size) is not int or size < 0:
        return None
    if not isinstance(blob_id, str) or not _COMMIT.fullmatch(blob_id):
        return None
    sha256 = None
    if lfs is not None:
        sha256 = lfs.get("oid") if isinstance(lfs, dict) else None
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256) or lfs.get("size", size) != size:
            return None
    return HubFile(name, size, sha256, blob_id, bool(entry.get("xetHash")))


def is_safe_name(name: str) -> bool:
    """Return whether a name from a listing stays within its folder wherever it is written."""
    return (
        name.isprintable()
        and "\\" not in name
        and ":" not in name.partition("/")[0]
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )
