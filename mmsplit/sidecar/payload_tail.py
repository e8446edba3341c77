"""What follows a payload's data, and what of it can be trusted before it is on this machine.  Pure."""

from __future__ import annotations

import numpy as np
import xxhash

from mmsplit.digests import sha256_of
from mmsplit.sidecar.chunk_index import CHUNK_RECORD, ChunkIndex, find_fault
from mmsplit.sidecar.framing import TRAILER_BYTES, Trailer, pack_trailer
from mmsplit.sidecar.layout import RECORD_BYTES
from mmsplit.sidecar.manifest import Manifest


def has_possible_tail(manifest: Manifest, json: bytes, payload_bytes: int) -> bool:
    """Whether index, manifest copy and trailer take just what the manifest leaves for them: it is read into memory."""
    return payload_bytes == manifest.data_stop + manifest.chunk_count * RECORD_BYTES + len(json) + TRAILER_BYTES


def pack_tail(index: bytes, index_offset: int, json: bytes) -> bytes:
    """Return all that follows a payload's data: the index, which begins at `index_offset`, manifest copy, trailer."""
    trailer = Trailer(index_offset, index_offset + len(index), len(json), xxhash.xxh3_64_intdigest(json))
    return index + json + pack_trailer(trailer)


def find_index(tail: bytes, manifest: Manifest, json: bytes) -> ChunkIndex | None:
    """Return the chunk index that `tail`, a payload's bytes from `data_stop` on, begins with.

    None unless it is the index that the manifest binds, and what follows it is what follows from the manifest, which
    is `json` as text.
    """
    data = tail[: manifest.chunk_count * RECORD_BYTES]
    if sha256_of(data) != manifest.index_sha256 or tail != pack_tail(data, manifest.data_stop, json):
        return None
    index = np.frombuffer(data, CHUNK_RECORD)
    sizes = [tensor.size_bytes for tensor in manifest.stored_tensors()]
    return index if find_fault(index, sizes, manifest.data_stop) is None else None
