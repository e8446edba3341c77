"""The small files that make a model usable: copied beside the partitions, named with their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmsplit.errors import CheckpointError, IntegrityError, OutputExistsError
from mmsplit.sidecar.output_files import output_errors, write_whole_file
from mmsplit.sidecar.set_manifest import FileEntry


def copy_small_files(
    source: Path, names: Sequence[str], target: Path, expected: Mapping[str, str] | None = None
) -> tuple[FileEntry, ...]:
    """Copy files, by relative name, and return their entries.

    With `expected`, SHA-256 by name, a file of another digest raises `IntegrityError` and is not copied.  A file of
    other content that is in the way is not ours to replace: `OutputExistsError`.
    """
    entries = []
    for name in names:
        data = read_small_file(source / name)
        entry = FileEntry(name, len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")
        if expected is not None and expected[name] != entry.sha256:
            raise IntegrityError(
                "file of the model is not as it was written",
                path=source / name,
                expected=expected[name],
                found=entry.sha256,
                hint="Copy it again from where the set came from.",
            )
        entries.append(entry)
        place = target / name
        with output_errors(place):
            if place.exists():
                if place.read_bytes() == data:
                    continue
                raise OutputExistsError(
                    "another file of this name is in the way of one that belongs to the model",
                    path=place,
                    hint="Move it away, or choose another directory.",
                )
            place.parent.mkdir(parents=True, exist_ok=True)
        write_whole_file(place, data)
    return tuple(entries)


def read_small_file(path: Path) -> bytes:
    """Read a small file of a checkpoint."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", path=path) from error
