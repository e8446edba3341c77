"""Digests, against people: SHA-256 as the text that manifests and messages have of it, BLAKE3 of stored chunks.

Checksums, against accidents, are xxh3 and stand in the records that they belong to.  Which digest is where, and why,
is argued in FORMAT.md.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final, TypeAlias

import blake3

from mmsplit.errors import RequestError

Data: TypeAlias = bytes | bytearray | memoryview

SHA256_PREFIX: Final = "sha256:"
#: Length of the digest of a chunk.
CHUNK_DIGEST_BYTES: Final = 32
_SHA256: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


def sha256_of(data: Data) -> str:
    """Return `sha256:` and 64 hex digits for bytes in memory."""
    return SHA256_PREFIX + hashlib.sha256(data).hexdigest()


def is_sha256(text: str) -> bool:
    """Whether a text is such a digest, in lower case as manifests have it."""
    return _SHA256.fullmatch(text) is not None


def sha256_bytes(text: str) -> bytes:
    """Return the 32 bytes of such a digest."""
    return bytes.fromhex(text.removeprefix(SHA256_PREFIX))


def parse_root_digest(text: str) -> str:
    """Return a root digest that a person gave, as manifests have it: the prefix may be missing, the case be any.

    Raises `RequestError` for what is none.
    """
    digest = text.strip().lower()
    digest = digest if ":" in digest else SHA256_PREFIX + digest
    if not is_sha256(digest):
        raise RequestError(
            "not a root digest", found=repr(text[:80]), hint="Give sha256: and 64 hexadecimal digits, as split prints."
        )
    return digest


def chunk_digest(stored: Data) -> bytes:
    """Return the BLAKE3 of an encoded chunk."""
    return blake3.blake3(stored).digest()
