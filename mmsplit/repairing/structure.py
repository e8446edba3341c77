"""What surrounds a payload's data, as it must be: file header before it; index, manifest copy and trailer behind it.

All of it follows from the manifest but the chunk index, and that has its digest there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmsplit.checkpoint import FileReader
from mmsplit.errors import CheckpointError, IntegrityError
from mmsplit.repairing.index_recovery import is_recorded_index, recover_index
from mmsplit.repairing.ledger import THE_SET, Mended
from mmsplit.repairing.manifest_finder import ForeignPayloadError
from mmsplit.repairing.sources import SetCopy, first_that_has
from mmsplit.sidecar.chunk_index import CHUNK_RECORD, ChunkIndex
from mmsplit.sidecar.framing import HEADER_BYTES, is_sound_header, pack_header
from mmsplit.sidecar.layout import DATA_START, RECORD_BYTES
from mmsplit.sidecar.manifest import Manifest
from mmsplit.sidecar.payload_tail import pack_tail


class Patch(NamedTuple):
    """Bytes to write at `offset`, and what the ledger says of them when they are written."""

    offset: int
    data: bytes
    mended: Mended


class FoundIndex(NamedTuple):
    """The chunk index, and where it is from; None if it lies in the payload as it should."""

    records: ChunkIndex
    source: str | None


class PartitionParts(NamedTuple):
    """What is known of a partition before its payload is looked at: its JSON, and how long the payload must be.

    `payload_bytes` is None where no set manifest says it.
    """

    json: bytes
    manifest: Manifest
    payload_bytes: int | None


def find_index(parts: PartitionParts, reader: FileReader, copies: tuple[SetCopy, ...]) -> FoundIndex | None:
    """Return the chunk index that the manifest describes, from the payload, else a copy, else made again."""
    manifest = parts.manifest
    start, stop = manifest.data_stop, manifest.data_stop + manifest.chunk_count * RECORD_BYTES

    def fits(data: bytes) -> bool:
        return len(data) == stop - start and is_recorded_index(manifest, data)

    there = read_if_there(reader, start, stop)
    if there is not None and fits(there):
        return FoundIndex(np.frombuffer(there, CHUNK_RECORD), None)
    offer = first_that_has(copies, lambda copy: copy.range_of(manifest.payload_file, start, stop), fits)
    if offer is not None:
        return FoundIndex(np.frombuffer(offer[0], CHUNK_RECORD), offer[1])
    made = recover_index(manifest, reader)
    return None if made is None else FoundIndex(made, THE_SET)


def header_patches(parts: PartitionParts, reader: FileReader) -> list[Patch]:
    """Return what puts the file header right.  Raises `ForeignPayloadError` if it is one of another partition."""
    manifest = parts.manifest
    header = pack_header(manifest.part_id, manifest.num_parts, manifest.plan_digest, manifest.source_digest)
    there = read_if_there(reader, 0, DATA_START)
    if there == header:
        return []
    if there is not None and is_sound_header(there) and there[:HEADER_BYTES] != header[:HEADER_BYTES]:
        raise ForeignPayloadError("payload is that of another partition or set")
    return [_patch(parts, reader, 0, header, "file header", THE_SET)]


def tail_patches(parts: PartitionParts, reader: FileReader, found: FoundIndex) -> tuple[list[Patch], int]:
    """Return what puts index, manifest copy and trailer right, and the length of the payload then.

    Raises `IntegrityError` if the set says another length: then its manifests contradict each other.
    """
    manifest, index = parts.manifest, found.records.tobytes()
    tail = pack_tail(index, manifest.data_stop, parts.json)
    trailer = len(index) + len(parts.json)
    size = manifest.data_stop + len(tail)
    if parts.payload_bytes not in (None, size):
        raise IntegrityError(
            "set manifest and partition manifest say other lengths",
            path=reader.path,
            expected=f"{parts.payload_bytes:,} bytes",
            found=f"{size:,}",
        )
    pieces = (
        (0, len(index), "chunk index", found.source or THE_SET),
        (len(index), trailer, "manifest copy", THE_SET),
        (trailer, len(tail), "trailer", THE_SET),
    )
    patches = [
        _patch(parts, reader, manifest.data_stop + start, tail[start:stop], what, source)
        for start, stop, what, source in pieces
        if read_if_there(reader, manifest.data_stop + start, manifest.data_stop + stop) != tail[start:stop]
    ]
    return patches, size


def read_if_there(reader: FileReader, start: int, stop: int) -> bytes | None:
    """Return bytes [start, stop) of a file; None if it ends before that, or its disk fails."""
    if not 0 <= start <= stop <= reader.size_bytes:
        return None
    try:
        return reader.read(start, stop)
    except (CheckpointError, IntegrityError):
        return None


def _patch(parts: PartitionParts, reader: FileReader, offset: int, data: bytes, what: str, source: str) -> Patch:
    mended = Mended(str(reader.path), what, source, offset, offset + len(data), parts.manifest.part_id)
    return Patch(offset, data, mended)
