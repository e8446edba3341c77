"""File header and trailer: what is damaged, what is foreign, what is of another version."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsplit.errors import FormatError
from mmsplit.sidecar.framing import (
    HEADER_BYTES,
    TRAILER_BYTES,
    Trailer,
    pack_header,
    pack_trailer,
    parse_trailer,
    require_payload_header,
    require_version,
)
from mmsplit.sidecar.layout import DATA_START

_DIGEST = "sha256:" + "0123456789abcdef" * 4
_u64 = st.integers(0, 2**64 - 1)


def test_a_header_fills_the_space_before_the_data() -> None:
    """A page, of which everything after the fields is zero."""
    header = pack_header(3, 7, _DIGEST, _DIGEST)
    assert len(header) == DATA_START
    assert not any(header[HEADER_BYTES:])
    require_payload_header(header[:HEADER_BYTES], "p")


@pytest.mark.parametrize("offset", range(HEADER_BYTES))
def test_a_damaged_header_is_not_taken_for_a_foreign_one(offset: int) -> None:
    """A flipped bit in magic or version is damage as the checksum tells, and passes here to be found by comparison."""
    header = bytearray(pack_header(3, 7, _DIGEST, _DIGEST)[:HEADER_BYTES])
    for bit in range(8):
        header[offset] ^= 1 << bit
        require_payload_header(bytes(header), "p")
        header[offset] ^= 1 << bit


@pytest.mark.parametrize("block", [b"", b"\0" * HEADER_BYTES, b"PK\3\4" * 24, b"MMSPLIT", bytes(range(96))])
def test_what_is_no_payload_is_refused(block: bytes) -> None:
    """Another file, or too little of one, is a format error that says what was there."""
    with pytest.raises(FormatError, match="p, byte 0: not an mmsplit payload"):
        require_payload_header(block, "p")


def test_another_version_is_refused_by_name() -> None:
    """A payload of a later version, whatever its fields are, says which version it would need."""
    block = b"MMSPLIT\0" + (9).to_bytes(4, "little") + b"\1" * 84
    with pytest.raises(FormatError, match=r"expected version 1, found 9.*reads format version 9"):
        require_payload_header(block, "p")


@pytest.mark.parametrize("version", [True, None, "1", 1.5, 0, 2, [1]])
def test_only_the_number_one_is_version_one(version: object) -> None:
    """True is not 1, and "1" is no number."""
    with pytest.raises(FormatError, match="version"):
        require_version(version, "p")


@given(index_bytes=st.integers(0, 2**40), manifest_bytes=st.integers(0, 2**40), manifest_xxh3=_u64)
def test_a_trailer_comes_back(index_bytes: int, manifest_bytes: int, manifest_xxh3: int) -> None:
    """What is packed is parsed, if it fits the size of the payload, and only then."""
    offset = DATA_START + index_bytes
    trailer = Trailer(DATA_START, offset, manifest_bytes, manifest_xxh3)
    size = offset + manifest_bytes + TRAILER_BYTES
    block = pack_trailer(trailer)
    assert len(block) == TRAILER_BYTES
    assert parse_trailer(block, size) == trailer
    assert parse_trailer(block, size + 1) is None
    assert parse_trailer(block, size - 1) is None


def test_any_flipped_bit_of_a_trailer_is_found() -> None:
    """No bit of it is without its checksum."""
    trailer = Trailer(DATA_START, DATA_START + 40, 100, 5)
    size = DATA_START + 140 + TRAILER_BYTES
    block = bytearray(pack_trailer(trailer))
    for offset in range(TRAILER_BYTES):
        for bit in range(8):
            block[offset] ^= 1 << bit
            assert parse_trailer(bytes(block), size) is None
            block[offset] ^= 1 << bit


@pytest.mark.parametrize("index_offset", [0, DATA_START - 1, DATA_START + 41])
def test_a_trailer_that_leads_outside_is_none(index_offset: int) -> None:
    """The index lies between data and manifest copy."""
    trailer = Trailer(index_offset, DATA_START + 40, 100, 5)
    assert parse_trailer(pack_trailer(trailer), DATA_START + 140 + TRAILER_BYTES) is None


@pytest.mark.parametrize("length", [0, 8, TRAILER_BYTES - 1, TRAILER_BYTES + 1])
def test_a_trailer_of_another_length_is_none(length: int) -> None:
    """Too short a payload has no trailer."""
    assert parse_trailer(b"MMSPLEND".ljust(length, b"\0")[:length], 10_000) is None
