"""Finding and reading the set manifest, and what a path given by a person stands for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mmsplit.checkpoint import IoMode
from mmsplit.digests import parse_root_digest
from mmsplit.errors import FormatError, IntegrityError
from mmsplit.regular_files import read_regular
from mmsplit.sidecar.manifest import manifest_name, parse_manifest
from mmsplit.sidecar.output_directory import STATE_NAME, UNFINISHED_MERGE_NAME
from mmsplit.sidecar.part_ids import part_ids_in
from mmsplit.sidecar.partition_reader import (
    MAX_MANIFEST_BYTES,
    OpenPartition,
    open_partition_files,
    require_partition,
)
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME, PartitionEntry, SetManifest, parse_set_manifest


class SetPath(NamedTuple):
    """A directory that holds partitions; `only` is the manifest of the one partition the path named, if it did."""

    root: Path
    only: Path | None


def resolve_set_path(path: Path) -> SetPath:
    """Decide whether `path` names a set (a directory, its set manifest) or one partition (manifest or payload)."""
    if path.is_dir():
        return SetPath(path, None)
    if not path.exists():
        raise FormatError(
            "no such file or directory",
            path=path,
            hint="Check the path: a partition is a partition_K.json or .bin, a set the directory with them.",
        )
    if path.name == SET_MANIFEST_NAME:
        return SetPath(path.parent, None)
    if path.suffix in (".json", ".bin"):
        return SetPath(path.parent, path.with_suffix(".json"))
    raise FormatError(
        "neither a partition set nor a partition", path=path, hint="Give a directory or a partition_K.json."
    )


def read_set_manifest(root: Path, root_digest: str | None = None, *, may_be_begun: bool = False) -> SetManifest:
    """Read the set manifest in `root`; with `root_digest`, as a person writes it, only the one that it stands for.

    Raises `FormatError` where there is none, saying why if it can be told, `IntegrityError` for another one,
    `RequestError` for what is no digest; `FormatError` also for a set that a merge has begun to delete, unless it
    `may_be_begun`.
    """
    path = root / SET_MANIFEST_NAME
    wanted = None if root_digest is None else parse_root_digest(root_digest)
    if not may_be_begun and (root / UNFINISHED_MERGE_NAME).exists():
        raise FormatError(
            "this set is no more whole: mmsplit merge --consume has begun to delete it, and is not finished",
            path=root,
            hint="Run that merge again with --resume.",
        )
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise IntegrityError("set manifest is too large", path=path, found=path.stat().st_size)
        return parse_set_manifest(read_regular(path), str(path), wanted)
    except FileNotFoundError:
        if (root / STATE_NAME).exists():
            raise FormatError(
                "the split into this directory is not finished",
                path=root,
                hint="Run the same split again with --resume.",
            ) from None
        if wanted is not None and _manifests_in(root):
            raise FormatError(
                f"nothing here ties a partition to the root digest: {SET_MANIFEST_NAME} is missing",
                path=root,
                hint="Fetch that file from where the partition came from; it is small, and no other is needed.",
            ) from None
        raise _no_set(root) from None
    except OSError as error:
        raise FormatError(f"set manifest cannot be read: {error.strerror}", path=path) from error


def _no_set(root: Path) -> FormatError:
    """Say what is missing: no more than the set manifest, some partitions, too, or all of it."""
    names = _manifests_in(root)
    what = f"no partition set here: {SET_MANIFEST_NAME} is missing"
    hint = "Give the directory that mmsplit split wrote."
    if names:
        wanted, here = _num_parts(root / names[0]), sum((root / name).with_suffix(".bin").is_file() for name in names)
        if here == wanted:
            what = f"{SET_MANIFEST_NAME} is missing; the {here} partitions are here"
            hint = f"Bring it back: mmsplit repair {root} --from COPY, or the same mmsplit split again with --resume."
        else:  # a node may have fetched just its own
            hint = (
                "Partitions that were made one at a time are no set before all are here; to verify, load or export"
                f" one, name one of them: {root / names[0]}."
            )
    return FormatError(what, path=root, hint=hint)


def _num_parts(path: Path) -> int | None:
    """Return how many partitions there are to be beside this one; None if its manifest cannot be read."""
    try:
        return (
            None
            if path.stat().st_size > MAX_MANIFEST_BYTES
            else parse_manifest(read_regular(path), path.name).num_parts
        )
    except (OSError, FormatError, IntegrityError):
        return None


def _manifests_in(root: Path) -> list[str]:
    return [manifest_name(part_id) for part_id in part_ids_in(root, [".json"])]


def entry_of_file(manifest: SetManifest, path: Path) -> PartitionEntry:
    """Return what a set says of the partition whose manifest is at `path`.  Raises `FormatError` if it has none."""
    for entry in manifest.partitions:
        if entry.manifest_file == path.name:
            return entry
    last = len(manifest.partitions) - 1
    raise FormatError("the set has no partition of this name", path=path, expected=f"partition_0 to partition_{last}")


def missing_partitions(root: Path, manifest: SetManifest) -> tuple[int, ...]:
    """Return the ids of the partitions whose files are not in `root`."""
    return tuple(
        entry.part_id
        for entry in manifest.partitions
        if not ((root / entry.manifest_file).is_file() and (root / entry.payload_file).is_file())
    )


def open_partition_of_set(
    root: Path, manifest: SetManifest, part_id: int, io: IoMode, *, is_bound: bool = False
) -> OpenPartition:
    """Open a partition and hold it to the set; a sound partition of another set raises `IntegrityError`.

    `is_bound` says that the set manifest was read by a root digest that the caller trusts.  Raises
    `MissingPartitionError` if the partition is not there.
    """
    require_partition(root, part_id)
    entry = manifest.partitions[part_id]
    return open_partition_files(root / entry.manifest_file, io, entry, is_bound=is_bound)
