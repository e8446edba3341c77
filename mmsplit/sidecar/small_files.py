"""The small files that make a model usable: copied beside the partitions, named with their digests."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

from mmsplit.checkpoint import Storage
from mmsplit.digests import sha256_of
from mmsplit.durable import make_directory
from mmsplit.errors import CheckpointError, IntegrityError, OutputExistsError, SourceChangedError
from mmsplit.regular_files import read_regular
from mmsplit.sidecar.output_files import output_errors, require_no_links, write_whole_file
from mmsplit.sidecar.set_manifest import FileEntry

_COPY_HINT: Final = "Copy it again from where the set came from."


def read_small_files(
    source: Storage, names: Sequence[str], expected: Mapping[str, str] | None = None
) -> tuple[FileEntry, ...]:
    """Return the entries of files by relative name.

    With `expected`, SHA-256 by name, a file of another digest, or none, raises `IntegrityError`.
    """
    entries = []
    for name in names:
        try:
            data = source.read_file(name)
        except CheckpointError as error:
            if expected is None:
                raise
            # A file that a checkpoint lacks is the checkpoint's fault; one that a set lacks is damage.
            raise IntegrityError(error.what, path=error.path, hint=_COPY_HINT) from error
        entry = FileEntry(name, len(data), sha256_of(data))
        if expected is not None and expected[name] != entry.sha256:
            raise IntegrityError(
                "file of the model is not as it was written",
                path=source.location_of(name),
                expected=expected[name],
                found=entry.sha256,
                hint=_COPY_HINT,
            )
        entries.append(entry)
    return tuple(entries)


def require_free_names(target: Path, entries: Sequence[FileEntry], ours: Mapping[str, Collection[str]] | None) -> None:
    """Raise `OutputExistsError` if a file that is not ours has the name of one to be copied, or a link leads elsewhere.

    `ours` are the files that earlier runs are known to have written, by name the SHA-256 of all they may have: one
    that is still so may be replaced.  With None any file of the right content will do, since none is replaced.
    """
    for entry in entries:
        require_no_links(target, entry.name)
        place = target / entry.name
        if not os.path.lexists(place):
            continue
        with output_errors(place):
            found = sha256_of(read_regular(place)) if place.is_file() else None
        if found is None or found not in ((entry.sha256,) if ours is None else ours.get(entry.name, ())):
            raise OutputExistsError(
                "a file that mmsplit did not write has the name of one that belongs to the model",
                path=place,
                hint="Move it away, or choose another directory.",
            )


def copy_small_files(source: Storage, entries: Sequence[FileEntry], target: Path) -> None:
    """Copy the files whose names are free, or ours to replace (see `require_free_names`)."""
    for entry in entries:
        place = target / entry.name
        data = source.read_file(entry.name)
        if sha256_of(data) != entry.sha256:
            raise SourceChangedError(
                "file of the model changed while it was read", path=source.location_of(entry.name), hint="Run again."
            )
        with output_errors(place):
            if place.is_file() and read_regular(place) == data:
                continue
            if place.parent != target:
                make_directory(place.parent)
        write_whole_file(place, data)
