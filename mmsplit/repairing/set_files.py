"""What belongs to the set and to no partition: the set manifest, and the small files of the model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from mmsplit.digests import sha256_of
from mmsplit.errors import CheckpointError, FormatError, IntegrityError, NetworkError, OutputExistsError
from mmsplit.regular_files import read_regular
from mmsplit.repairing.ledger import THE_SET, Ledger, Mended
from mmsplit.repairing.sources import RepairSource, SetCopy
from mmsplit.sidecar.manifest import parse_manifest
from mmsplit.sidecar.output_directory import STATE_NAME
from mmsplit.sidecar.output_files import output_errors, require_no_links, write_whole_file
from mmsplit.sidecar.partition_reader import Fault, read_manifest_copy
from mmsplit.sidecar.receiving_directory import read_published_set
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME, SetManifest, is_as_written, require_root
from mmsplit.sidecar.set_reader import read_set_manifest


class FoundSet(NamedTuple):
    """The set manifest, its bytes as they were written, and where they are from; None for where they belong."""

    manifest: SetManifest
    data: bytes
    source: str | None


def find_set_manifest(root: Path, copies: tuple[SetCopy, ...], root_digest: str | None) -> FoundSet | str:
    """Return the set manifest of the partitions in `root`, from its file or a copy of the set, or why there is none.

    With `root_digest` it must be that one.  Raises `FormatError` for a version not known here and an unfinished split,
    `IntegrityError` if the set here is sound, but not the one asked for.
    """
    path = root / SET_MANIFEST_NAME
    try:
        manifest = read_set_manifest(root)
    except FormatError:
        # What is missing can be brought back; what is not finished, or of another version, is not damaged.
        if os.path.lexists(path) or (root / STATE_NAME).exists():
            raise
    except IntegrityError:
        pass
    else:
        require_root(manifest.root_digest, root_digest, str(path))
        data = read_regular(path)
        if is_as_written(data):
            return FoundSet(manifest, data, None)
        return FoundSet(manifest, (json.dumps(json.loads(data), indent=1) + "\n").encode(), THE_SET)
    reasons = []
    for copy in copies:
        try:
            published = read_published_set(copy.open(SET_MANIFEST_NAME), root_digest)
            if root_digest is None:
                _require_fit(root, published.manifest, published.location)
        except (NetworkError, FormatError, IntegrityError) as error:
            reasons.append(f"{copy.location}: {error.what}")
            continue
        return FoundSet(published.manifest, published.data, copy.location)
    if not path.exists():
        reasons.insert(0, "set manifest is missing")
    else:
        reasons.insert(0, "set manifest is damaged")
    return "; ".join(
        (
            *reasons,
            "what brings it back is another copy of the set, or the split it came from, run again with --resume",
        )
    )


def _require_fit(root: Path, manifest: SetManifest, location: str) -> None:
    """Raise `IntegrityError` unless the set manifest is that of the partitions here, by their manifests' digests."""
    fitting = 0
    for entry in manifest.partitions:
        found = _digests_here(root / entry.manifest_file)
        if entry.manifest_sha256 in found:
            fitting += 1
        elif found:
            raise IntegrityError(f"its partition {entry.part_id} is another than the one here", path=location)
    if not fitting:
        raise IntegrityError("nothing here says that it is the same set", path=location)


def _digests_here(path: Path) -> set[str]:
    """Digests of a partition's manifest here: of its payload's copy, or where that is lost its file, if sound."""
    try:
        return {sha256_of(read_manifest_copy(path.with_suffix(".bin")))}
    except (OSError, IntegrityError, CheckpointError, FormatError):
        pass
    try:
        data = read_regular(path)
        parse_manifest(data, str(path))
        return {sha256_of(data)}
    except (OSError, IntegrityError, FormatError):
        return set()


def write_set_manifest(root: Path, found: FoundSet, ledger: Ledger, *, dry_run: bool) -> None:
    """Give the set manifest its name again, if it is not there as it should be.  Raises `OutputError`."""
    if found.source is None:
        return
    path = root / SET_MANIFEST_NAME
    if not dry_run:
        write_whole_file(path, found.data)
    ledger.mend(Mended(str(path), "set manifest", found.source, 0, len(found.data)))


def repair_small_files(
    root: Path, manifest: SetManifest, sources: tuple[RepairSource, ...], ledger: Ledger, *, dry_run: bool
) -> None:
    """Bring back small files that are missing or not as they were written.  Raises `OutputError`."""
    for entry in manifest.files:
        path = root / entry.name
        what = _what_is_wrong(path, entry.sha256)
        if what is None:
            continue
        if os.path.lexists(path) and not path.is_file():
            ledger.leave(Fault(str(path), "not a regular file, but in the place of one: move it away"))
            continue
        try:
            require_no_links(root, entry.name)
        except OutputExistsError as error:
            ledger.leave(Fault(str(path), error.what))
            continue
        reasons = []
        for source in sources:
            if dry_run:
                ledger.mend(Mended(str(path), "file of the model", source.location, 0, entry.size_bytes))
                break
            try:
                data = b"" if entry.size_bytes == 0 else source.small_file(entry.name, entry.size_bytes)
            except (NetworkError, CheckpointError) as error:
                reasons.append(f"{source.location}: {error.what}")
                continue
            if data is None or sha256_of(data) != entry.sha256:
                reasons.append(f"{source.location}: {'has another' if data else 'has no such file'}")
                continue
            with output_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_whole_file(path, data)
            ledger.mend(Mended(str(path), "file of the model", source.location, 0, entry.size_bytes))
            break
        else:
            reason = "; ".join(reasons) or "no source was given"
            ledger.leave(Fault(str(path), f"{what} ({reason})", 0, entry.size_bytes))


def _what_is_wrong(path: Path, sha256: str) -> str | None:
    try:
        if not path.is_file():
            return "file of the model is missing"
        return None if sha256_of(read_regular(path)) == sha256 else "file of the model is not as it was written"
    except OSError as error:
        return f"file of the model cannot be read: {error.strerror}"
