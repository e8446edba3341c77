"""What follows a payload's data, and what of it can be trusted before it is on this machine.  Pure."""

from __future__ import annotations

import numpy as np
import xxhash
import zstandard

from mmsplit.sidecar.chunk_index import CHUNK_RECORD, ChunkIndex, find_fault
from mmsplit.sidecar.framing import TRAILER_BYTES, parse_trailer
from mmsplit.sidecar.manifest import Manifest

#: A zstd frame of incompressible data is hardly larger than the data.
_FRAME_OVERHEAD_BYTES = 4096


def has_possible_tail(manifest: Manifest, json: bytes, payload_bytes: int) -> bool:
    """Whether index, manifest copy and trailer can take what the manifest leaves for them: it is read into memory."""
    fixed = manifest.chunk_count * CHUNK_RECORD.itemsize + TRAILER_BYTES
    return fixed <= payload_bytes - manifest.data_stop <= fixed + 2 * len(json) + _FRAME_OVERHEAD_BYTES


def find_index(tail: bytes, manifest: Manifest, json: bytes, payload_bytes: int) -> ChunkIndex | None:
    """Return the chunk index that `tail`, a payload's bytes from `data_stop` on, begins with.

    None if anything in it is not right: index, copy of the manifest's text `json`, trailer.
    """
    index_bytes = manifest.chunk_count * CHUNK_RECORD.itemsize
    trailer = parse_trailer(tail[-TRAILER_BYTES:], payload_bytes)
    if (
        trailer is None
        or trailer.index_offset != manifest.data_stop
        or trailer.manifest_offset != manifest.data_stop + index_bytes
        or trailer.manifest_bytes != len(json)
        or trailer.manifest_xxh3 != xxhash.xxh3_64_intdigest(json)
        or xxhash.xxh3_64_hexdigest(tail[:index_bytes]) != manifest.index_xxh3
        or not _is_copy(tail[index_bytes:-TRAILER_BYTES], trailer.copy_xxh3, json)
    ):
        return None
    index = np.frombuffer(tail[:index_bytes], CHUNK_RECORD)
    sizes = [tensor.size_bytes for tensor in manifest.stored_tensors()]
    return index if find_fault(index, sizes, manifest.data_stop) is None else None


def _is_copy(frame: bytes, checksum: int, json: bytes) -> bool:
    if xxhash.xxh3_64_intdigest(frame) != checksum:
        return False
    try:
        if zstandard.frame_content_size(frame) != len(json):
            return False
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False) == json
    except zstandard.ZstdError:
        return False
