"""The fixed-size records of a payload: file header and trailer.  Pure; offsets and types are those of FORMAT.md."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import xxhash

from mmsplit.digests import sha256_bytes
from mmsplit.errors import FormatError
from mmsplit.sidecar.layout import CHUNK_BYTES, DATA_START

FORMAT_VERSION: Final = 1
MAGIC: Final = b"MMSPLIT\0"
TRAILER_MAGIC: Final = b"MMSPLEND"

_HEADER: Final = struct.Struct("<8sIIII32s32s")
_TRAILER: Final = struct.Struct("<8sQQQQ")
_IDENTITY: Final = struct.Struct("<8sI")
_CHECKSUM: Final = struct.Struct("<Q")
HEADER_BYTES: Final = _HEADER.size + _CHECKSUM.size
TRAILER_BYTES: Final = _TRAILER.size + _CHECKSUM.size


class Trailer(NamedTuple):
    """The last bytes of a payload.  Offsets count from its start; `manifest_xxh3` is over the JSON itself.

    The chunk index ends at `manifest_offset`, where the manifest's copy begins; the trailer follows that.
    """

    index_offset: int
    manifest_offset: int
    manifest_bytes: int
    manifest_xxh3: int


def pack_header(part_id: int, num_parts: int, plan_digest: str, source_digest: str) -> bytes:
    """Return the payload's first `DATA_START` bytes."""
    digests = (sha256_bytes(digest) for digest in (plan_digest, source_digest))
    fields = _HEADER.pack(MAGIC, FORMAT_VERSION, part_id, num_parts, CHUNK_BYTES, *digests)
    return (fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))).ljust(DATA_START, b"\0")


def require_payload_header(block: bytes, path: str) -> None:
    """Refuse the first `HEADER_BYTES` of a file that is no payload, or one of a version not known here.

    Bytes whose checksum says that they were such a header pass: they are damaged, not foreign, and whoever compares
    the header with the manifest finds that.
    """
    fields = _IDENTITY.pack(MAGIC, FORMAT_VERSION) + block[_IDENTITY.size : _HEADER.size]
    if _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields)) == block[_HEADER.size : HEADER_BYTES]:
        return
    if block[:8] != MAGIC:
        raise FormatError("not an mmsplit payload", path=path, offset=0, expected=repr(MAGIC), found=repr(block[:8]))
    require_version(int.from_bytes(block[8:12], "little"), path)


def is_sound_header(block: bytes) -> bool:
    """Whether the first `HEADER_BYTES` of a file are such a header, whichever partition it is of."""
    checksum = _CHECKSUM.pack(xxhash.xxh3_64_intdigest(block[: _HEADER.size]))
    return block.startswith(MAGIC) and checksum == block[_HEADER.size : HEADER_BYTES]


def require_version(version: object, path: str) -> None:
    """Refuse a format version that this mmsplit does not read."""
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise FormatError(
            "format version is not known here",
            path=path,
            expected=f"version {FORMAT_VERSION}",
            found=repr(version)[:40],
            hint=f"Use an mmsplit that reads format version {repr(version)[:40]}.",
        )


def pack_trailer(trailer: Trailer) -> bytes:
    """Return the payload's last `TRAILER_BYTES` bytes."""
    fields = _TRAILER.pack(TRAILER_MAGIC, *trailer)
    return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))


def parse_trailer(block: bytes, payload_bytes: int) -> Trailer | None:
    """Return the trailer, or None if these bytes are none or do not fit a payload of that size."""
    if len(block) != TRAILER_BYTES or block[:8] != TRAILER_MAGIC:
        return None
    if _CHECKSUM.pack(xxhash.xxh3_64_intdigest(block[: _TRAILER.size])) != block[_TRAILER.size :]:
        return None
    trailer = Trailer(*_TRAILER.unpack_from(block)[1:])
    fits = (
        DATA_START <= trailer.index_offset <= trailer.manifest_offset
        and trailer.manifest_offset + trailer.manifest_bytes + TRAILER_BYTES == payload_bytes
    )
    return trailer if fits else None
