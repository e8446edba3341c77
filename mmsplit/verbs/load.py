"""`open_partition` and `open_set`: tensors out of partitions, one by one or all at once, as numpy arrays."""

from __future__ import annotations

from pathlib import Path

from mmsplit.errors import RequestError
from mmsplit.loading.partition import Partition
from mmsplit.loading.partition_set import PartitionSet
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.sidecar.set_reader import entry_of_file, read_set_manifest, resolve_set_path
from mmsplit.workers import thread_count


def open_partition(
    path: str | Path, *, verify: bool = True, root_digest: str | None = None, threads: int | None = None
) -> Partition:
    """Open one partition by its manifest or payload.

    With `verify` (the default) every tensor's checksum is compared when it is read, also that of a view.  With
    `root_digest`, of which the set manifest beside the partition must be, everything is held to its digest, whatever
    `verify` says, and each chunk before it is decoded; no other partition is needed for that.
    `threads` decode one large tensor together (default: all processors).  Raises `FormatError`, `IntegrityError`.
    """
    resolved = resolve_set_path(Path(path))
    if resolved.only is None:
        raise RequestError(
            "this is a whole set; name one partition of it, or use open_set",
            path=path,
            hint="For example: " + str(resolved.root / "partition_0.json"),
        )
    # Views outlive any call, so the file is mapped plainly: as with every loader, do not truncate it meanwhile.
    if root_digest is None:
        files = open_partition_files(resolved.only, "view")
    else:
        entry = entry_of_file(read_set_manifest(resolved.root, root_digest), resolved.only)
        files = open_partition_files(resolved.only, "view", entry, is_bound=True)
    return Partition(files, verify=verify, threads=thread_count(threads))


def open_set(
    path: str | Path, *, verify: bool = True, root_digest: str | None = None, threads: int | None = None
) -> PartitionSet:
    """Open a partition set by its directory or set manifest; the arguments are those of `open_partition`."""
    root, _ = resolve_set_path(Path(path))
    manifest = read_set_manifest(root, root_digest)
    return PartitionSet(root, manifest, verify=verify, threads=threads, is_bound=root_digest is not None)
