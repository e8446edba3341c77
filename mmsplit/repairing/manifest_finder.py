"""The JSON of a partition, byte for byte: from its file, its payload, or another copy of the set.

With an entry of the set manifest, the SHA-256 there decides.  Without one, what the payload carries is the truth: it
was written with it, and has its own checksums.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from mmsplit.checkpoint import FileReader
from mmsplit.digests import sha256_of
from mmsplit.errors import CheckpointError, FormatError, IntegrityError
from mmsplit.regular_files import read_regular
from mmsplit.repairing.index_recovery import is_recorded_index
from mmsplit.repairing.ledger import THE_SET
from mmsplit.repairing.sources import SetCopy, first_that_has
from mmsplit.sidecar.framing import HEADER_BYTES, pack_header
from mmsplit.sidecar.layout import RECORD_BYTES
from mmsplit.sidecar.manifest import MANIFEST_START, MANIFEST_STOP, Manifest, parse_manifest, refuse_other_version
from mmsplit.sidecar.output_files import output_errors
from mmsplit.sidecar.partition_reader import MAX_MANIFEST_BYTES, read_manifest_copy
from mmsplit.sidecar.set_manifest import PartitionEntry

#: A manifest copy whose trailer is lost is looked for in so many last bytes of a payload.
_SEARCHED_BYTES: Final = 256 << 20


class FoundManifest(NamedTuple):
    """A partition's JSON, where it is from, and whether its file has other bytes, or is not there."""

    data: bytes
    manifest: Manifest
    source: str
    is_lost: bool


class ForeignPayloadError(Exception):
    """The payload is a sound one of another partition, and perhaps the only copy of it: not to be written over."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


def find_manifest(path: Path, entry: PartitionEntry | None, copies: tuple[SetCopy, ...]) -> FoundManifest | None:
    """Return the manifest that belongs at `path`; None if there is nothing that can be held to be it.

    Raises `ForeignPayloadError`, `FormatError` for a version not known here, `OutputError`.
    """
    payload = path.with_suffix(".bin")
    there = _read(path)
    carried = _carried(payload)
    if carried is not None and entry is not None and sha256_of(carried) != entry.manifest_sha256:
        raise ForeignPayloadError(_name_of(carried, payload))
    if there is not None:
        refuse_other_version(there, str(path))

    def fits(data: bytes) -> bool:
        if entry is not None:
            return sha256_of(data) == entry.manifest_sha256
        return data == carried if carried is not None else _describes(data, payload)

    def found(data: bytes, source: str) -> FoundManifest:
        return FoundManifest(data, parse_manifest(data, str(path)), source, data != there)

    if there is not None and fits(there):
        return found(there, str(path))
    if carried is not None:
        return found(carried, THE_SET)
    astray = _find_copy(payload)
    if astray is not None and fits(astray):
        return found(astray, THE_SET)
    offer = first_that_has(copies, lambda copy: copy.whole_file(path.name, MAX_MANIFEST_BYTES), fits)
    return None if offer is None else found(*offer)


def _read(path: Path) -> bytes | None:
    with output_errors(path):
        if not path.is_file() or path.stat().st_size > MAX_MANIFEST_BYTES:
            return None
    try:
        return read_regular(path)
    except OSError:
        return None  # a disk that fails: its bytes are lost


def _carried(payload: Path) -> bytes | None:
    """Return the manifest copy of a payload, None where it is not sound."""
    try:
        return read_manifest_copy(payload)
    except (OSError, IntegrityError, CheckpointError, FormatError):
        return None


def _name_of(data: bytes, payload: Path) -> str:
    try:
        manifest = parse_manifest(data, str(payload))
    except (IntegrityError, FormatError):
        return "payload is not that of this set"
    return f"payload is that of partition {manifest.part_id} of {manifest.model_id}, in another set or out of place"


def _describes(data: bytes, payload: Path) -> bool:
    """Whether a manifest is that of the payload: the index it promises is there, or the file header it implies."""
    try:
        manifest = parse_manifest(data, str(payload))
        with FileReader(payload, io="pread", changed_error=IntegrityError) as reader:
            stop = manifest.data_stop + manifest.chunk_count * RECORD_BYTES
            if stop > reader.size_bytes:
                return False
            index = is_recorded_index(manifest, reader.read(manifest.data_stop, stop))
            identity = (manifest.part_id, manifest.num_parts, manifest.plan_digest, manifest.source_digest)
            return index and reader.read(0, HEADER_BYTES) == pack_header(*identity)[:HEADER_BYTES]
    except (OSError, IntegrityError, CheckpointError, FormatError):
        return False


def _find_copy(payload: Path) -> bytes | None:
    """Return what looks like a manifest copy in the payload's last bytes, its trailer being lost; None for nothing."""
    try:
        with FileReader(payload, io="pread", changed_error=IntegrityError) as reader:
            end = reader.read(max(0, reader.size_bytes - _SEARCHED_BYTES), reader.size_bytes)
    except (OSError, IntegrityError, CheckpointError):
        return None
    start = end.rfind(MANIFEST_START)
    stop = end.find(MANIFEST_STOP, start)
    return None if start < 0 or stop < 0 else end[start : stop + len(MANIFEST_STOP)]
