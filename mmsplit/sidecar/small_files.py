"""The small files that make a model usable: copied beside the partitions, named with their digests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmsplit.errors import CheckpointError, IntegrityError, MmsplitError, OutputExistsError
from mmsplit.sidecar.output_files import output_errors, write_whole_file
from mmsplit.sidecar.set_manifest import FileEntry


def copy_small_files(
    source: Path,
    names: Sequence[str],
    target: Path,
    *,
    expected: Mapping[str, str] | None = None,
    replaceable: Mapping[str, str] | None = None,
) -> tuple[FileEntry, ...]:
    """Copy files, by relative name, and return their entries.

    With `expected`, SHA-256 by name, a file of another digest raises `IntegrityError` and is not copied.  A file of
    other content that is in the way is not ours to replace, unless it has its digest in `replaceable`:
    `OutputExistsError`, and then nothing is copied.
    """
    # A file that the source lacks is the checkpoint's fault; one that a set lacks is damage.
    kind = CheckpointError if expected is None else IntegrityError
    old = replaceable or {}
    missing = {name for name in names if not _is_there(source / name, target / name, kind, old.get(name))}
    entries = []
    for name in names:
        data = _read(source / name, kind)
        entry = FileEntry(name, len(data), _sha256(data))
        if expected is not None and expected[name] != entry.sha256:
            raise IntegrityError(
                "file of the model is not as it was written",
                path=source / name,
                expected=expected[name],
                found=entry.sha256,
                hint="Copy it again from where the set came from.",
            )
        entries.append(entry)
        if name in missing:
            place = target / name
            with output_errors(place):
                place.parent.mkdir(parents=True, exist_ok=True)
            write_whole_file(place, data)
    return tuple(entries)


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _is_there(source: Path, place: Path, kind: type[MmsplitError], replaceable: str | None) -> bool:
    """Whether a file has been copied already; raises if another one is in its way."""
    if not os.path.lexists(place):
        return False
    with output_errors(place):
        if place.is_file():
            data = place.read_bytes()
            if data == _read(source, kind):
                return True
            if _sha256(data) == replaceable:
                return False
    raise OutputExistsError(
        "another file of this name is in the way of one that belongs to the model",
        path=place,
        hint="Move it away, or choose another directory.",
    )


def _read(path: Path, kind: type[MmsplitError]) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise kind(f"cannot read: {error.strerror}", path=path) from error
