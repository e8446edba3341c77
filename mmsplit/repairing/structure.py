"""What surrounds a payload's data, as it must be: file header before it; index, manifest copy and trailer behind it.

All of it follows from the manifest but the chunk index, and that has its checksum there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xxhash
import zstandard

from mmsplit.checkpoint import FileReader
from mmsplit.errors import CheckpointError, IntegrityError
from mmsplit.repairing.index_recovery import is_recorded_index, recover_index
from mmsplit.repairing.ledger import THE_SET, Mended
from mmsplit.repairing.manifest_finder import ForeignPayloadError
from mmsplit.repairing.sources import SetCopy, first_that_has
from mmsplit.sidecar.chunk_index import CHUNK_RECORD, ChunkIndex
from mmsplit.sidecar.framing import (
    HEADER_BYTES,
    TRAILER_BYTES,
    Trailer,
    is_sound_header,
    pack_header,
    pack_trailer,
    parse_trailer,
)
from mmsplit.sidecar.layout import DATA_START
from mmsplit.sidecar.manifest import Manifest
from mmsplit.sidecar.partition_reader import Fault


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
    start, stop = manifest.data_stop, manifest.data_stop + manifest.chunk_count * CHUNK_RECORD.itemsize

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


def tail_patches(
    parts: PartitionParts, reader: FileReader, found: FoundIndex, copies: tuple[SetCopy, ...]
) -> tuple[list[Patch], int] | Fault:
    """Return what puts index, manifest copy and trailer right, and the length of the payload then.

    A fault is returned where the manifest copy cannot be made as it was: another version of zstd may write other bytes.
    """
    manifest, index = parts.manifest, found.records.tobytes()
    start = manifest.data_stop + len(index)
    size = reader.size_bytes if parts.payload_bytes is None else parts.payload_bytes
    frame_stop = size - TRAILER_BYTES
    last = read_if_there(reader, frame_stop, size)
    trailer = None if last is None else parse_trailer(last, size)
    if trailer is not None and not _leads_to(trailer, parts, start):
        trailer = None

    def fits(frame: bytes) -> bool:
        if parts.payload_bytes is not None and start + len(frame) != frame_stop:
            return False
        if trailer is not None and xxhash.xxh3_64_intdigest(frame) != trailer.copy_xxh3:
            return False
        return _decodes_to(frame, parts.json)

    frame, source = zstandard.ZstdCompressor(level=9).compress(parts.json), THE_SET
    if not fits(frame):
        there = read_if_there(reader, start, frame_stop)
        offer = (there, THE_SET) if there is not None and fits(there) else None
        if offer is None:
            offer = first_that_has(copies, lambda copy: copy.range_of(manifest.payload_file, start, frame_stop), fits)
        if offer is None:
            what = "manifest copy or trailer is damaged, and this version of zstd does not make the copy as it was"
            return Fault(str(reader.path), what, start, reader.size_bytes, manifest.part_id)
        frame, source = offer
    trailer = Trailer(
        index_offset=manifest.data_stop,
        copy_xxh3=xxhash.xxh3_64_intdigest(frame),
        manifest_offset=start,
        manifest_stored_bytes=len(frame),
        manifest_bytes=len(parts.json),
        manifest_xxh3=xxhash.xxh3_64_intdigest(parts.json),
    )
    stop = start + len(frame)
    pieces = (
        (manifest.data_stop, index, "chunk index", found.source or THE_SET),
        (start, frame, "manifest copy", source),
        (stop, pack_trailer(trailer), "trailer", THE_SET),
    )
    patches = [
        _patch(parts, reader, offset, data, what, origin)
        for offset, data, what, origin in pieces
        if read_if_there(reader, offset, offset + len(data)) != data
    ]
    return patches, stop + TRAILER_BYTES


def read_if_there(reader: FileReader, start: int, stop: int) -> bytes | None:
    """Return bytes [start, stop) of a file; None if it ends before that, or its disk fails."""
    if not 0 <= start <= stop <= reader.size_bytes:
        return None
    try:
        return reader.read(start, stop)
    except (CheckpointError, IntegrityError):
        return None


def _leads_to(trailer: Trailer, parts: PartitionParts, start: int) -> bool:
    """Whether the trailer is the one of this manifest, and so what it says of the copy is true."""
    return (trailer.index_offset, trailer.manifest_offset, trailer.manifest_xxh3) == (
        parts.manifest.data_stop,
        start,
        xxhash.xxh3_64_intdigest(parts.json),
    )


def _decodes_to(frame: bytes, json: bytes) -> bool:
    try:
        if zstandard.frame_content_size(frame) != len(json):
            return False
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False) == json
    except zstandard.ZstdError:
        return False


def _patch(parts: PartitionParts, reader: FileReader, offset: int, data: bytes, what: str, source: str) -> Patch:
    mended = Mended(str(reader.path), what, source, offset, offset + len(data), parts.manifest.part_id)
    return Patch(offset, data, mended)
