"""The fixed-size records of a payload: file header and trailer.  Pure; offsets and types are those of FORMAT.md."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import xxhash

from mmsplit.errors import FormatError
from mmsplit.sidecar.layout import CHUNK_BYTES, DATA_START

FORMAT_VERSION: Final = 1
MAGIC: Final = b"MMSPLIT\0"
TRAILER_MAGIC: Final = b"MMSPLEND"

_HEADER: Final = struct.Struct("<8sIIII32s32s")
_TRAILER: Final = struct.Struct("<8sQQQQQQ")
_CHECKSUM: Final = struct.Struct("<Q")
TRAILER_BYTES: Final = _TRAILER.size + _CHECKSUM.size


class Trailer(NamedTuple):
    """The last bytes of a payload.  Offsets count from its start; `manifest_xxh3` is over the JSON itself.

    The manifest's copy is one zstd frame of `manifest_stored_bytes` at `manifest_offset`.
    """

    index_offset: int
    index_bytes: int
    manifest_offset: int
    manifest_stored_bytes: int
    manifest_bytes: int
    manifest_xxh3: int


def pack_header(part_id: int, num_parts: int, plan_digest: str, source_digest: str) -> bytes:
    """Return the payload's first `DATA_START` bytes."""
    digests = (bytes.fromhex(digest.removeprefix("sha256:")) for digest in (plan_digest, source_digest))
    fields = _HEADER.pack(MAGIC, FORMAT_VERSION, part_id, num_parts, CHUNK_BYTES, *digests)
    return (fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))).ljust(DATA_START, b"\0")


def parse_header_version(block: bytes, path: str) -> int:
    """Return the format version of a payload's first bytes; refuse what is none, or of a version not known here."""
    if block[:8] != MAGIC:
        raise FormatError("not an mmsplit payload", path=path, offset=0, expected=repr(MAGIC), found=repr(block[:8]))
    version = int.from_bytes(block[8:12], "little")
    require_version(version, path)
    return version


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
        trailer.index_offset >= DATA_START
        and trailer.index_offset + trailer.index_bytes == trailer.manifest_offset
        and trailer.manifest_offset + trailer.manifest_stored_bytes + TRAILER_BYTES == payload_bytes
    )
    return trailer if fits else None
