"""`download`: the files of a model that matter, from the Hub into the Hub cache or a folder, resumed and verified."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

from mmsplit.errors import OfflineError, RequestError
from mmsplit.regular_files import read_regular
from mmsplit.remote.address import parse_hub_address
from mmsplit.remote.choose_files import choose_files
from mmsplit.remote.content_hash import add_nothing
from mmsplit.remote.disk import download_errors, require_space
from mmsplit.remote.downloader import Downloader, Fetched, Found, Presence
from mmsplit.remote.hub_cache import HubCache, LocalFolder, Place
from mmsplit.remote.hub_storage import HubStorage
from mmsplit.remote.remote_file import DEFAULT_CONNECTIONS
from mmsplit.remote.repository import HubRepository, cached_snapshot, hub_endpoint, open_repository
from mmsplit.workers import JobStream, ProgressCallback, ProgressCounter, WorkerGroup

Status = Literal["present", "downloaded"]
_MOST_CONNECTIONS: Final = 64
#: Files up to this long go first: a token or a licence that is wanting shows at once, not after the first shard.
_SMALL_BYTES: Final = 1 << 20


class DownloadedFile(NamedTuple):
    """One file in its place.  `resumed_bytes` of it were left by an earlier run."""

    name: str
    size_bytes: int
    status: Status
    resumed_bytes: int

    def as_json(self) -> dict[str, object]:
        """Return it for `--json`."""
        return self._asdict()


class DownloadResult(NamedTuple):
    """What is in its place now, all of it verified when it arrived.

    `path` is the folder that holds the files, `commit` the revision they are of.  `downloaded_bytes` came over the
    network now, `resumed_bytes` in earlier runs that were cut short, `present_bytes` are of files that were there.
    """

    path: Path
    model_id: str
    commit: str
    files: tuple[DownloadedFile, ...]
    downloaded_bytes: int
    resumed_bytes: int
    present_bytes: int
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Length of all files."""
        return sum(file.size_bytes for file in self.files)

    def as_json(self) -> dict[str, object]:
        """Return it for `--json`."""
        return {
            **self._asdict(),
            "path": str(self.path),
            "files": [file.as_json() for file in self.files],
            "notes": list(self.notes),
        }


def download(
    model_id: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_dir: str | Path | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    connections: int = DEFAULT_CONNECTIONS,
    verify: bool = False,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> DownloadResult:
    """Download `org/name` or `org/name@revision`: its shards, their index and the small files.

    The files go to the Hub cache (`cache_dir`, else HF_HUB_CACHE or HF_HOME), where huggingface_hub finds them, or to
    `local_dir` under their own names.  `include` and `exclude` choose other files, see `choose_files`.  `connections`
    files are fetched at once.  What is there and right is not fetched again: a large file is taken for right when its
    name and length are, and hashed with `verify`; a wrong one is named in the notes and replaced, in `local_dir` only
    if it was downloaded and left alone, or with `force`.

    Stopped in whatever way, the same call continues from the byte reached.  Raises `RequestError`, `CheckpointError`
    for a repository without weights to choose, `NetworkError`, `IntegrityError`, `OutputExistsError`, `NoSpaceError` or
    another `OutputError`.
    """
    if cache_dir is not None and local_dir is not None:
        raise RequestError("cache_dir and local_dir exclude each other", hint="Give one of them")
    if type(connections) is not int or not 1 <= connections <= _MOST_CONNECTIONS:
        raise RequestError(
            f"cannot use {connections!r} connections", hint=f"Give a number from 1 to {_MOST_CONNECTIONS}"
        )
    repository = _open(model_id, revision, token, endpoint, cache_dir)
    place: Place = HubCache(repository, cache_dir)
    if local_dir is not None:
        place = LocalFolder(repository, local_dir, force=force)
    run = _Run(Downloader(repository, place, verify=verify), connections, progress)
    storage = _StorageInPlace(repository, run)
    chosen = choose_files(storage, [file.name for file in repository.files], include, exclude)
    run.fetch(run.look(chosen.names, report=verify))
    place.finish(repository.revision)
    return _result(repository, place, chosen.names, run.fetched, chosen.notes)


def _open(
    model_id: str,
    revision: str | None,
    token: str | bool | None,
    endpoint: str | None,
    cache_dir: str | Path | None,
) -> HubRepository:
    address = parse_hub_address(model_id, hub_endpoint(endpoint))
    if address is None:
        raise RequestError("not a model of the Hub", found=repr(model_id), hint="Give org/name or org/name@revision")
    if revision is not None and address.revision not in (None, revision):
        raise RequestError("two revisions", found=f"{address.revision!r} and {revision!r}", hint="Give one of them")
    revision = revision or address.revision
    try:
        return open_repository(address.repo_id, revision, token, endpoint)
    except OfflineError as error:
        snapshot = cached_snapshot(address.repo_id, revision, cache_dir)
        if snapshot is None:
            raise
        # It may lack files, and only the Hub could say which.
        hint = f"Unset HF_HUB_OFFLINE, or use what was downloaded before: {snapshot}"
        raise OfflineError(error.what, path=error.path, hint=hint) from None


class _Run:
    """Looks at all files, then fetches what is missing, several at once."""

    def __init__(self, downloader: Downloader, connections: int, progress: ProgressCallback | None) -> None:
        self._downloader = downloader
        self._connections = connections
        self._progress = progress
        self._lock = threading.Lock()
        self.fetched: dict[str, Fetched] = {}

    def fetch_at_once(self, name: str) -> Path:
        """Bring one small file to its place, which is needed to choose the others; return where it is."""
        if name not in self.fetched:
            self.fetched[name] = self._downloader.fetch(name)
        return self.fetched[name].path

    def look(self, names: Sequence[str], *, report: bool) -> dict[str, Found]:
        """Say what is there of each file not fetched yet; refuse before anything moves what could not end well."""
        wanted = [name for name in names if name not in self.fetched]
        found: dict[str, Found] = {}
        total_bytes = sum(self._downloader.file(name).size_bytes for name in wanted)
        counter = ProgressCounter("verify", total_bytes, self._progress if report else None)

        def look(name: str, go_on: Callable[[], None]) -> None:
            seen = self._downloader.look(name, counter.add, go_on)
            with self._lock:
                found[name] = seen

        self._each(wanted, look)
        for name in wanted:
            self._downloader.require_replaceable(found[name])
        # Contents are counted once, under whatever names the repository has them.
        missing = {
            self._downloader.place.partial(seen.file): seen.file.size_bytes - seen.resumable_bytes
            for seen in found.values()
            if seen.presence is not Presence.PRESENT
        }
        if missing:
            require_space(self._downloader.place.root, sum(missing.values()))
        return found

    def fetch(self, found: dict[str, Found]) -> None:
        """Bring every file to its place."""
        wanted = sorted(found.values(), key=lambda seen: (seen.file.size_bytes > _SMALL_BYTES, seen.file.name))
        missing_bytes = sum(seen.file.size_bytes for seen in wanted if seen.presence is not Presence.PRESENT)
        counter = ProgressCounter("download", missing_bytes, self._progress)

        def fetch(name: str, go_on: Callable[[], None]) -> None:
            add = add_nothing if found[name].presence is Presence.PRESENT else counter.add
            done = self._downloader.fetch(name, add, go_on, found=found[name])
            with self._lock:
                self.fetched[name] = done

        self._each([seen.file.name for seen in wanted], fetch)

    def _each(self, names: Sequence[str], work: Callable[[str, Callable[[], None]], None]) -> None:
        jobs = JobStream(iter(names))
        with WorkerGroup() as group:
            group.start_many(
                "download", min(self._connections, len(names)), jobs, lambda: lambda name: work(name, group.go_on)
            )


class _StorageInPlace(HubStorage):
    """Reads the weights index from where it is downloaded to, so that it is fetched once, or not at all."""

    def __init__(self, repository: HubRepository, run: _Run) -> None:
        super().__init__(repository)
        self._run = run

    def read_file(self, name: str) -> bytes:
        """Read a small file from its place."""
        path = self._run.fetch_at_once(name)
        with download_errors(path):
            return read_regular(path)


def _result(
    repository: HubRepository,
    place: Place,
    names: Iterable[str],
    fetched: dict[str, Fetched],
    notes: tuple[str, ...],
) -> DownloadResult:
    files = tuple(_file(name, fetched[name]) for name in names)
    return DownloadResult(
        path=place.root,
        model_id=repository.repo_id,
        commit=repository.commit,
        files=files,
        downloaded_bytes=sum(one.moved.received_bytes for one in fetched.values()),
        resumed_bytes=sum(file.resumed_bytes for file in files),
        present_bytes=sum(file.size_bytes for file in files if file.status == "present"),
        notes=(*notes, *(_replaced(one.found) for one in fetched.values() if one.found.presence is Presence.WRONG)),
    )


def _file(name: str, fetched: Fetched) -> DownloadedFile:
    status: Status = "present" if fetched.found.presence is Presence.PRESENT else "downloaded"
    return DownloadedFile(name, fetched.found.file.size_bytes, status, fetched.moved.resumed_bytes)


def _replaced(found: Found) -> str:
    return f"{found.path} was not what the Hub lists (expected {found.expected}, found {found.actual}): replaced"
