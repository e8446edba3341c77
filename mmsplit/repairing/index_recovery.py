"""The chunk index again, from the payload it describes.

Where a chunk begins follows from where the one before it ends, and what it says of itself follows from its bytes: a
planes chunk has a prologue, a zstd frame an end, a raw chunk the length of its raw bytes.  So each record is made
anew; where the old one agrees in place or checksum, it has its say.  The digest of the whole index, which the
manifest has, decides: what does not fit it is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xxhash

from mmsplit.checkpoint import FileReader, Scratch
from mmsplit.codec import LAYOUTS, PLANES, RAW, ZSTD, ChunkDecoder, Encoded, layout_for, planes_end, zstd_end
from mmsplit.digests import chunk_digest, sha256_of
from mmsplit.errors import IntegrityError, MmsplitError
from mmsplit.planning import iter_stored
from mmsplit.repairing.planned_partition import planned_partition
from mmsplit.sidecar.chunk_index import CHUNK_RECORD, ChunkIndex, empty_index
from mmsplit.sidecar.layout import (
    CHUNK_ALIGNMENT,
    DATA_START,
    RECORD_BYTES,
    SLOT_ALIGNMENT,
    aligned,
    iter_slots,
)
from mmsplit.sidecar.manifest import Manifest


class _Chunk(NamedTuple):
    """What the manifest alone says of a chunk; the first of a slot begins on a block."""

    number: int
    tensor: int
    dtype: str
    raw_bytes: int
    is_first_of_slot: bool


def recover_index(manifest: Manifest, reader: FileReader) -> ChunkIndex | None:
    """Return the index that the manifest describes; None if the payload does not give it."""
    recovery = _Recovery(manifest, reader)
    position = DATA_START
    try:
        for chunk in _iter_chunks(manifest):
            begin = aligned(position, SLOT_ALIGNMENT if chunk.is_first_of_slot else CHUNK_ALIGNMENT)
            record = recovery.record_of(chunk, begin)
            if record is None:
                return None
            recovery.index[chunk.number] = record
            position = begin + int(record["stored_bytes"])
    except MmsplitError:  # a disk that fails, or a file that ends too early
        return None
    return recovery.index if is_recorded_index(manifest, recovery.index.tobytes()) else None


def is_recorded_index(manifest: Manifest, data: bytes) -> bool:
    """Whether these are the bytes of the chunk index that the manifest was written with."""
    return sha256_of(data) == manifest.index_sha256


def _iter_chunks(manifest: Manifest) -> Iterator[_Chunk]:
    for slot in iter_slots(iter_stored(planned_partition(manifest))):
        for number, chunk in enumerate(slot.chunks):
            yield _Chunk(
                slot.first_chunk + number, chunk.tensor_index, chunk.tensor.dtype, chunk.raw_bytes, number == 0
            )


class _Recovery:
    def __init__(self, manifest: Manifest, reader: FileReader) -> None:
        self.index = empty_index(manifest.chunk_count)
        self._data_stop = manifest.data_stop
        self._reader = reader
        self._decoder = ChunkDecoder()
        self._scratch, self._raw = Scratch(), Scratch()
        self._old = empty_index(manifest.chunk_count)
        start = min(manifest.data_stop, reader.size_bytes)
        data = reader.read(start, min(start + self._old.nbytes, reader.size_bytes))
        whole = len(data) // RECORD_BYTES
        self._old[:whole] = np.frombuffer(data, CHUNK_RECORD, whole)

    def record_of(self, chunk: _Chunk, begin: int) -> np.void | None:
        """Return the record of a chunk that begins at byte `begin`; None if its bytes do not say where it ends."""
        old: np.void = self._old[chunk.number]
        stop = min(begin + chunk.raw_bytes, self._data_stop)
        made: list[np.void] = []
        with self._reader.borrow(begin, stop, self._scratch) as view:
            for encoded in self._candidates(view, old, chunk):
                record = self._describe(view[: encoded.stored_bytes], encoded, chunk, begin)
                if record is None:
                    continue
                if record["raw_xxh3"] == old["raw_xxh3"] and record["stored_xxh3"] == old["stored_xxh3"]:
                    return record
                made.append(record)
        # One checksum that fits says that the chunk is right, and so what it says of itself.
        for kind in ("raw_xxh3", "stored_xxh3"):
            for record in made:
                if record[kind] == old[kind]:
                    return record
        if self._is_in_place(chunk, begin, old):
            made.insert(0, old)  # then it is the chunk that is damaged
        return made[0] if made else None

    def _candidates(self, view: memoryview, old: np.void, chunk: _Chunk) -> Iterator[Encoded]:
        """Yield what the chunk may be: what its record says, then what its own bytes say."""
        codec = int(old["codec"])
        yield Encoded(codec, int(old["layout"]) if codec == PLANES else 0, int(old["stored_bytes"]))
        # First the layout that the writer uses for the dtype: two of the same width cannot be told apart.
        for layout in (layout_for(chunk.dtype), *LAYOUTS):
            end = planes_end(view, layout)
            if end is not None:
                yield Encoded(PLANES, layout.code, end)
        end = zstd_end(view)
        if end is not None:
            yield Encoded(ZSTD, 0, end)
        yield Encoded(RAW, 0, chunk.raw_bytes)

    def _describe(self, stored: memoryview, encoded: Encoded, chunk: _Chunk, begin: int) -> np.void | None:
        if not 0 < encoded.stored_bytes == len(stored) <= chunk.raw_bytes:
            return None
        raw = self._raw.take(chunk.raw_bytes)
        try:
            self._decoder.decode(stored, encoded, raw)
        except IntegrityError:
            return None
        records = empty_index(1)
        records[0]["stored_offset"] = begin
        records[0]["stored_bytes"] = encoded.stored_bytes
        records[0]["raw_bytes"] = chunk.raw_bytes
        records[0]["stored_xxh3"] = xxhash.xxh3_64_intdigest(stored)
        records[0]["raw_xxh3"] = xxhash.xxh3_64_intdigest(raw)
        records[0]["tensor"] = chunk.tensor
        records[0]["codec"] = encoded.codec
        records[0]["layout"] = encoded.layout
        records[0]["stored_blake3"] = chunk_digest(stored)
        record: np.void = records[0]
        return record

    def _is_in_place(self, chunk: _Chunk, begin: int, old: np.void) -> bool:
        """Whether the old record fits the manifest, and the places before and behind it."""
        if (int(old["stored_offset"]), int(old["tensor"]), int(old["raw_bytes"])) != (
            begin,
            chunk.tensor,
            chunk.raw_bytes,
        ):
            return False
        stop = begin + int(old["stored_bytes"])
        after = chunk.number + 1
        following = int(self._old[after]["stored_offset"]) if after < len(self._old) else self._data_stop
        return following in (aligned(stop, CHUNK_ALIGNMENT), aligned(stop, SLOT_ALIGNMENT))
