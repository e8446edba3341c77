"""Finding and reading the set manifest, and what a path given by a person stands for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from mmsplit.checkpoint import IoMode
from mmsplit.errors import FormatError, IntegrityError
from mmsplit.sidecar.output_directory import STATE_NAME, UNFINISHED_MERGE_NAME
from mmsplit.sidecar.partition_reader import (
    MAX_MANIFEST_BYTES,
    OpenPartition,
    open_partition_files,
    require_partition,
)
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME, SetManifest, parse_set_manifest


class SetPath(NamedTuple):
    """A directory that holds partitions; `only` is the manifest of the one partition the path named, if it did."""

    root: Path
    only: Path | None


def resolve_set_path(path: Path) -> SetPath:
    """Decide whether `path` names a set (a directory, its set manifest) or one partition (manifest or payload)."""
    if path.is_dir():
        return SetPath(path, None)
    if not path.exists():
        raise FormatError("no such file or directory", path=path, hint="Give the directory of a partition set.")
    if path.name == SET_MANIFEST_NAME:
        return SetPath(path.parent, None)
    if path.suffix in (".json", ".bin"):
        return SetPath(path.parent, path.with_suffix(".json"))
    raise FormatError(
        "neither a partition set nor a partition", path=path, hint="Give a directory or a partition_K.json."
    )


def read_set_manifest(root: Path, *, may_be_begun: bool = False) -> SetManifest:
    """Read the set manifest in `root`.  Raises `FormatError` where there is none, saying why if it can be told.

    Also for a set that a merge has begun to delete, unless it `may_be_begun`.
    """
    path = root / SET_MANIFEST_NAME
    if not may_be_begun and (root / UNFINISHED_MERGE_NAME).exists():
        raise FormatError(
            "this set is no more whole: mmsplit merge --consume has begun to delete it, and is not finished",
            path=root,
            hint="Run that merge again with --resume.",
        )
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise IntegrityError("set manifest is too large", path=path, found=path.stat().st_size)
        return parse_set_manifest(path.read_bytes(), str(path))
    except FileNotFoundError:
        if (root / STATE_NAME).exists():
            raise FormatError(
                "the split into this directory is not finished",
                path=root,
                hint="Run the same split again with --resume.",
            ) from None
        raise FormatError(
            f"no partition set here: {SET_MANIFEST_NAME} is missing",
            path=root,
            hint=_no_set_hint(root),
        ) from None
    except OSError as error:
        raise FormatError(f"set manifest cannot be read: {error.strerror}", path=path) from error


def _no_set_hint(root: Path) -> str:
    """Say what single partitions lack, where there are any: a node may have fetched just its own."""
    names = sorted(path.name for path in root.glob("partition_*.json"))
    if not names:
        return "Give the directory that mmsplit split wrote."
    return (
        f"Partitions that were made one at a time are no set before all are here; name one of them: {root / names[0]}."
    )


def missing_partitions(root: Path, manifest: SetManifest) -> tuple[int, ...]:
    """Return the ids of the partitions whose files are not in `root`."""
    return tuple(
        entry.part_id
        for entry in manifest.partitions
        if not ((root / entry.manifest_file).is_file() and (root / entry.payload_file).is_file())
    )


def open_partition_of_set(root: Path, manifest: SetManifest, part_id: int, io: IoMode) -> OpenPartition:
    """Open a partition and hold it to the set; a sound partition of another set raises `IntegrityError`.

    Raises `MissingPartitionError` if it is not there.
    """
    require_partition(root, part_id)
    entry = manifest.partitions[part_id]
    partition = open_partition_files(root / entry.manifest_file, io)
    try:
        try:
            found = f"sha256:{hashlib.sha256(partition.path.read_bytes()).hexdigest()}"
        except OSError as error:
            raise IntegrityError(f"manifest cannot be read: {error.strerror}", path=partition.path) from error
        if found != entry.manifest_sha256:
            raise IntegrityError(
                "partition is not of this set",
                path=partition.path,
                expected=entry.manifest_sha256,
                found=found,
                hint="Copy the right partition into the set.",
            )
    except BaseException:
        partition.close()
        raise
    return partition
