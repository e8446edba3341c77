"""GGUF files, right or wrong, put together from their parts."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from mmsplit.checkpoint.gguf_file import GgufFile, read_gguf_file
from mmsplit.checkpoint.tensor import TensorInfo

U8, I8, U16, I16, U32, I32, F32, BOOL, TEXT, ARRAY, U64, I64, F64 = range(13)
CODES = dict(zip((U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64), "BbHhIif?Qqd", strict=True))

#: A value of the metadata: the number of its type, and its bytes.
Packed = tuple[int, bytes]


class Row(NamedTuple):
    """A tensor as the header has it, `sizes` fastest first; `offset` None: behind the one before, aligned."""

    name: str | bytes
    sizes: Sequence[int] = (4,)
    type_number: int = 0
    offset: int | None = None
    data: bytes | None = None


def parse(file: bytes, *, allow_unknown_dtypes: bool = False) -> GgufFile:
    """What mmsplit makes of a file; only ranges within it may be read."""

    def read(start: int, stop: int) -> bytes:
        assert 0 <= start <= stop <= len(file)
        return file[start:stop]

    return read_gguf_file(read, len(file), "f", "s", allow_unknown_dtypes=allow_unknown_dtypes)


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A text; `length`, if given, is a lie."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def number(kind: int, value: float) -> Packed:
    """A number, or BOOL."""
    return kind, struct.pack(f"<{CODES[kind]}", value)


def array(kind: int, elements: Sequence[bytes], count: int | None = None) -> Packed:
    """An array of packed elements; `count`, if given, is a lie."""
    head = struct.pack("<IQ", kind, len(elements) if count is None else count)
    return ARRAY, head + b"".join(elements)


def pair(key: str | bytes, value: Packed) -> bytes:
    """A metadata pair."""
    return text(key) + struct.pack("<I", value[0]) + value[1]


def gguf_file(
    rows: Sequence[Row] = (),
    metadata: Mapping[str, Packed] | Sequence[bytes] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    pair_count: int | None = None,
    dimension_count: int | None = None,
    alignment: int = 32,
    data: bytes | None = None,
    tail: bytes = b"",
) -> bytes:
    """A file; counts that are given are lies.  Data are zeros of four bytes an element unless told."""
    pairs = [pair(key, value) for key, value in metadata.items()] if isinstance(metadata, Mapping) else list(metadata)
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(rows) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    head += b"".join(pairs)
    body = b""
    for row in rows:
        content = bytes(4 * _product(row.sizes)) if row.data is None else row.data
        offset = len(body) if row.offset is None else row.offset
        if row.offset is None:
            body += content + bytes(-len(content) % alignment)
        dimensions = len(row.sizes) if dimension_count is None else dimension_count
        head += text(row.name) + struct.pack("<I", dimensions) + struct.pack(f"<{len(row.sizes)}Q", *row.sizes)
        head += struct.pack("<IQ", row.type_number, offset)
    if rows:
        head += bytes(-len(head) % alignment)
    return head + (body if data is None else data) + tail


def require_cover(found: GgufFile, file: bytes) -> None:
    """The law: tensors and kept ranges together are every byte of the file, once; shapes say how many elements."""
    spans = sorted([*found.kept, *((t.start_offset, t.stop_offset) for t in found.tensors if t.size_bytes)])
    assert b"".join(file[start:stop] for start, stop in spans) == file
    assert all(start < stop for start, stop in spans)
    for (_, stop), (start, _) in pairwise(spans):
        assert stop == start
    assert all(stop < start for (_, stop), (start, _) in pairwise(found.kept))
    for tensor in found.tensors:
        assert 0 <= tensor.start_offset <= tensor.stop_offset <= len(file)
        assert tensor.params == _product(tensor.shape)
    assert [t.start_offset for t in found.tensors] == sorted(t.start_offset for t in found.tensors)


def contents(tensor: TensorInfo, file: bytes) -> bytes:
    """A tensor's bytes."""
    return file[tensor.start_offset : tensor.stop_offset]


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
