"""A source by what a user wrote for it: a path of this machine, or a model of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mmsplit.checkpoint import Checkpoint, LocalStorage, choose_checkpoint_files, open_checkpoint, read_checkpoint
from mmsplit.checkpoint.directory import CheckpointFiles
from mmsplit.errors import OfflineError, RequestError
from mmsplit.remote.address import HubAddress, parse_hub_address
from mmsplit.remote.remote_file import DEFAULT_CONNECTIONS


class HubOptions(NamedTuple):
    """How to reach the Hub; what is None is found as huggingface_hub finds it, in the environment.

    `revision` is a branch, a tag or a commit; `token` False sends none; `endpoint` is the address of a mirror;
    `connections` is how many ranges are fetched at once, 8 MiB of memory each.  With `keep_source` whole shards are
    downloaded to the cache (`cache_dir`), and stay there; otherwise ranges are fetched, and nothing is kept.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    endpoint: str | None = None
    connections: int = DEFAULT_CONNECTIONS
    keep_source: bool = False

    def __repr__(self) -> str:
        return f"HubOptions({self.revision!r}, token={'…' if isinstance(self.token, str) else self.token!r})"


def open_source(
    source: str | Path | Checkpoint, hub: HubOptions | None = None, *, allow_unknown_dtypes: bool = False
) -> Checkpoint:
    """Read the headers of a source: a path as `open_checkpoint` takes it, or a model of the Hub.

    A `str` that is no path of this machine and is written as `org/name`, `org/name@revision` or an address of the Hub
    stands for a model there; a `Path` never does.  No weight is fetched.  Raises branches of `CheckpointError`
    and `NetworkError`.
    """
    if isinstance(source, Checkpoint):
        return source
    address = hub_address_of(source, hub)
    if address is None:
        return open_checkpoint(source, allow_unknown_dtypes=allow_unknown_dtypes)
    return _open_on_hub(address, hub or HubOptions(), allow_unknown_dtypes)


def hub_address_of(source: str | Path, hub: HubOptions | None = None) -> HubAddress | None:
    """Return the model of the Hub that `source` stands for, with the revision asked for; None if it is a path."""
    if not isinstance(source, str) or Path(source).exists():
        return None
    from mmsplit.remote.repository import hub_endpoint

    hub = hub or HubOptions()
    address = parse_hub_address(source, hub_endpoint(hub.endpoint))
    if address is None:
        return None
    if hub.revision is not None and address.revision not in (None, hub.revision):
        raise RequestError(
            "two revisions are asked for", expected="one", found=f"{address.revision} and {hub.revision}"
        )
    return address._replace(revision=hub.revision or address.revision)


def _open_on_hub(address: HubAddress, hub: HubOptions, allow_unknown_dtypes: bool) -> Checkpoint:
    # Here, so that whoever has a path does not wait for what reaches the Hub.
    from mmsplit.remote.cached_storage import CachedHubStorage
    from mmsplit.remote.hub_storage import HubStorage
    from mmsplit.remote.repository import cached_snapshot, open_repository

    if hub.connections < 1:
        raise RequestError("cannot work without a connection", found=hub.connections)
    try:
        repository = open_repository(address.repo_id, address.revision, hub.token, hub.endpoint)
    except OfflineError:
        snapshot = cached_snapshot(address.repo_id, address.revision, hub.cache_dir)
        if snapshot is None:
            raise
        return open_checkpoint(snapshot, allow_unknown_dtypes=allow_unknown_dtypes)
    storage = (
        CachedHubStorage(repository, hub.cache_dir, hub.connections)
        if hub.keep_source
        else HubStorage(repository, hub.connections)
    )
    files = choose_checkpoint_files(storage)
    snapshot = cached_snapshot(address.repo_id, repository.commit, hub.cache_dir)
    if snapshot is not None and _holds(snapshot, files):
        return open_checkpoint(snapshot, allow_unknown_dtypes=allow_unknown_dtypes)
    storage.fetch_heads(files.shards, files.weight_map)
    checkpoint = read_checkpoint(files, allow_unknown_dtypes=allow_unknown_dtypes)
    moved = storage.traffic
    checkpoint.notes += (
        f"{moved.received_bytes / 1e6:,.1f} MB fetched in {moved.request_count:,} requests to read the headers of"
        f" {repository.repo_id}, commit {repository.commit[:12]}",
    )
    return checkpoint


def _holds(snapshot: Path, files: CheckpointFiles) -> bool:
    """Whether the cache has all files of the checkpoint, at their length."""
    local = LocalStorage(snapshot)
    names = (*files.shards, *files.small_files, *((files.index_name,) if files.index_name else ()))
    return all(local.file_bytes(name) == files.storage.file_bytes(name) for name in names)
