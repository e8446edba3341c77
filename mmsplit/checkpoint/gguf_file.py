"""GGUF files: where the bytes of each tensor lie.  Pure but for the reads it is given.

    4 bytes   "GGUF"
    4 bytes   version, 2 or 3
    8 bytes   count of tensors
    8 bytes   count of metadata pairs
              the pairs (`gguf_values`): architecture, sizes, tokenizer
              per tensor: name, count of dimensions (4 bytes), dimensions (8 bytes each, fastest first),
              type (4 bytes), offset (8 bytes) from the start of the data
              padding up to a multiple of the alignment: start of the data
              tensors, each at a multiple of the alignment

Source: docs/gguf.md of ggml, and its reader, ggml/src/gguf.cpp.  This accepts what that reader accepts, but for texts
that are not UTF-8 where names are meant, and headers larger than anybody writes.  It accepts more where nothing is
lost by it: tensors in any order, and whatever bytes lie between them.

Law: the tensors and `GgufFile.kept` cover the file exactly, each byte once, so that the file can be put together
again byte for byte.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final, NamedTuple, NoReturn

from mmsplit.checkpoint.gguf_types import GGML_TYPES
from mmsplit.checkpoint.gguf_values import DOWNLOAD_HINT, HeaderCursor, Value, read_metadata
from mmsplit.checkpoint.range_reads import RangeReads, Read
from mmsplit.checkpoint.tensor import TensorInfo
from mmsplit.errors import GgufFileError

GGUF_MAGIC: Final = b"GGUF"
#: Bounds on memory: a model of 256 experts in each of 61 blocks, all of them apart, has 50,000 tensors.
MAX_TENSORS: Final = 1 << 18
MAX_KEPT_BYTES: Final = 256 << 20
_MAX_NAME_BYTES: Final = 4096
_MAX_DIMENSIONS: Final = 4
_DEFAULT_ALIGNMENT: Final = 32
_VERSIONS: Final = (2, 3)
_INT64_MAX: Final = 2**63 - 1
#: How files of before GGUF begin: GGML, GGMF, GGJT, GGLA, as little-endian numbers.
_OLDER_MAGICS: Final = (b"lmgg", b"fmgg", b"tjgg", b"algg")
_CONVERT_HINT: Final = "Convert the original model again, with a llama.cpp of today."


class GgufSplit(NamedTuple):
    """Says that a file is number `file_index` (from 0) of `file_count` that hold `tensor_count` tensors together.

    `tensor_count` is None where the file does not say.
    """

    file_index: int
    file_count: int
    tensor_count: int | None


class GgufFile(NamedTuple):
    """What a GGUF file holds.

    `tensors` are in file order.  Their shapes are in the order of numpy and safetensors, slowest first, so that a
    linear weight is (out, in); their dtypes are safetensors' names where it has the type, else ggml's.  `kept` are the
    half-open ranges of the file that belong to no tensor, none empty.  `split` is set in one of several files.
    """

    version: int
    alignment: int
    tensors: tuple[TensorInfo, ...]
    kept: tuple[tuple[int, int], ...]
    metadata: dict[str, Value]
    split: GgufSplit | None
    notes: tuple[str, ...]


class _Record(NamedTuple):
    """A tensor as the header has it: `shape` slowest first, [`start`, …) in the file; `size_bytes` None: unknown."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int | None


def is_gguf_file(head: bytes) -> bool:
    """Whether a file that begins with these bytes, 4 needed, is a GGUF file (of whatever version)."""
    return head.startswith(GGUF_MAGIC)


def read_gguf_file(
    read: Read, file_bytes: int, path: str, shard: str, *, allow_unknown_dtypes: bool = False
) -> GgufFile:
    """Read the header of a file of `file_bytes` bytes; `path` is for messages, `shard` goes into the records.

    With `allow_unknown_dtypes` a tensor of a type that is not known is carried as opaque bytes, up to the start of
    the next tensor or the end of the file: its own size cannot be told, so that padding may be part of it.
    Raises `GgufFileError`, and whatever the reads raise.
    """
    cursor = HeaderCursor(RangeReads(read, file_bytes, path))
    _require_magic(cursor)
    version = _version(cursor)
    tensor_count, pair_count = cursor.u64(), cursor.u64()
    if tensor_count > MAX_TENSORS:
        cursor.fail("file has too many tensors", expected=f"at most {MAX_TENSORS:,}", found=tensor_count)
    metadata = read_metadata(cursor, pair_count)
    alignment = _alignment(metadata, path)
    rows = [_row(cursor) for _ in range(tensor_count)]
    data_start = -(-cursor.at // alignment) * alignment
    records = [_record(row, data_start, alignment, path, allow_unknown_dtypes) for row in rows]
    tensors = _place(records, file_bytes, path, shard)
    kept = _cover(tensors, file_bytes, path)
    return GgufFile(version, alignment, tensors, kept, metadata, _split(metadata, path), _notes(records))


def _require_magic(cursor: HeaderCursor) -> None:
    head = cursor.peek(64)
    if head.startswith(b"version https://git-lfs"):
        cursor.fail("file is a Git LFS pointer, not the weights", hint="Fetch the weights with: git lfs pull")
    if head.startswith(_OLDER_MAGICS):
        cursor.fail("file has a form from before GGUF, which is not read", found=repr(head[:4]), hint=_CONVERT_HINT)
    if not is_gguf_file(head):
        cursor.fail(
            "file is not a GGUF file",
            expected=f"{GGUF_MAGIC.decode()} at its start",
            found=f"bytes {head[:8].hex(' ')}" if head else "nothing",
        )
    cursor.skip(len(GGUF_MAGIC))


def _version(cursor: HeaderCursor) -> int:
    found = cursor.u32()
    if found == 1:
        cursor.fail("file is of GGUF version 1, which is not read", expected="version 2 or 3", hint=_CONVERT_HINT)
    if found and not found & 0xFFFF:
        hint = "Convert it with gguf-convert-endian, of the Python package gguf."
        cursor.fail("file is big-endian, which is not read", expected="a little-endian file", hint=hint)
    if found not in _VERSIONS:
        hint = "A newer mmsplit may read it." if found > max(_VERSIONS) else DOWNLOAD_HINT
        cursor.fail("GGUF version is not known", expected="version 2 or 3", found=found, hint=hint)
    return found


def _alignment(metadata: dict[str, Value], path: str) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(value) is not int or value < 1 or value & (value - 1):
        raise GgufFileError(
            "general.alignment is no power of two", path=path, found=repr(value)[:80], hint=DOWNLOAD_HINT
        )
    return value


class _Row(NamedTuple):
    """What the header says of a tensor, as it says it; `sizes` are fastest first."""

    name: str
    sizes: tuple[int, ...]
    type_number: int
    offset: int


def _row(cursor: HeaderCursor) -> _Row:
    name = cursor.text("name of a tensor", _MAX_NAME_BYTES)
    dimension_count = cursor.u32()
    if dimension_count > _MAX_DIMENSIONS:
        what = f"tensor {name[:200]!r} has too many dimensions"
        cursor.fail(what, expected=f"at most {_MAX_DIMENSIONS}", found=dimension_count)
    sizes = tuple([cursor.u64() for _ in range(dimension_count)])
    return _Row(name, sizes, cursor.u32(), cursor.u64())


def _record(row: _Row, data_start: int, alignment: int, path: str, allow_unknown_dtypes: bool) -> _Record:
    """Hold one tensor's row to what its type allows."""
    start = data_start + row.offset

    def fail(what: str, expected: object, found: object, hint: str = DOWNLOAD_HINT) -> NoReturn:
        raise GgufFileError(what, path=path, tensor=row.name, offset=start, expected=expected, found=found, hint=hint)

    shape = row.sizes[::-1]
    params = math.prod(shape)
    if max(shape, default=0) > _INT64_MAX or params > _INT64_MAX:
        fail("tensor has too many elements", f"at most {_INT64_MAX:,}", str(shape))
    if row.offset % alignment:
        fail("offset is not aligned", f"a multiple of {alignment}", row.offset)
    known = GGML_TYPES.get(row.type_number)
    if known is None:
        if not allow_unknown_dtypes:
            fail(
                f"tensor type {row.type_number} is not known",
                None,
                None,
                "A fork of llama.cpp may have written the file. mmsplit can carry it as opaque bytes: allow unknown"
                " dtypes (--allow-unknown-dtypes).",
            )
        return _Record(row.name, f"GGML_{row.type_number}", shape, start, None if params else 0)
    row_elements = shape[-1] if shape else 1
    if row_elements % known.block_elements:
        fail(
            f"rows do not divide into the blocks of {known.name}", f"a multiple of {known.block_elements}", row_elements
        )
    return _Record(row.name, known.name, shape, start, params // known.block_elements * known.block_bytes)


def _place(records: Sequence[_Record], file_bytes: int, path: str, shard: str) -> tuple[TensorInfo, ...]:
    """Return the tensors in file order; no two of them overlap, and all lie in the file."""
    starts = sorted({record.start for record in records})
    tensors = []
    names: set[str] = set()
    for record in records:
        if record.name in names:
            raise GgufFileError("tensor occurs twice", path=path, tensor=record.name, hint=DOWNLOAD_HINT)
        names.add(record.name)
        if record.size_bytes is None:
            following = bisect_right(starts, record.start)
            stop = starts[following] if following < len(starts) else max(file_bytes, record.start + 1)
        else:
            stop = record.start + record.size_bytes
        params = math.prod(record.shape)
        tensors.append(TensorInfo(record.name, record.dtype, record.shape, shard, record.start, stop, params))
    tensors.sort(key=lambda tensor: (tensor.start_offset, tensor.stop_offset, tensor.name))
    position = 0
    for tensor in tensors:
        if tensor.stop_offset > file_bytes:
            raise GgufFileError(
                "tensor reaches past the end of the file",
                path=path,
                tensor=tensor.name,
                offset=tensor.start_offset,
                expected=f"a file of at least {tensor.stop_offset:,} bytes",
                found=file_bytes,
                hint=DOWNLOAD_HINT,
            )
        if tensor.start_offset < position:
            raise GgufFileError(
                "tensor overlaps the one before it",
                path=path,
                tensor=tensor.name,
                offset=tensor.start_offset,
                expected=f"a start at or behind byte {position:,}",
                found=tensor.start_offset,
                hint="The file is damaged, or a fork of llama.cpp means something else by its tensor types.",
            )
        position = tensor.stop_offset
    return tuple(tensors)


def _cover(tensors: Sequence[TensorInfo], file_bytes: int, path: str) -> tuple[tuple[int, int], ...]:
    """Return the ranges of no tensor: the header, padding, and what comes behind the last tensor."""
    kept = []
    position = 0
    for tensor in tensors:
        if tensor.size_bytes:
            if tensor.start_offset > position:
                kept.append((position, tensor.start_offset))
            position = tensor.stop_offset
    if file_bytes > position:
        kept.append((position, file_bytes))
    kept_bytes = sum(stop - start for start, stop in kept)
    if kept_bytes > MAX_KEPT_BYTES:
        raise GgufFileError(
            "too much of the file lies outside its tensors",
            path=path,
            expected=f"at most {MAX_KEPT_BYTES:,} bytes",
            found=kept_bytes,
            hint=DOWNLOAD_HINT,
        )
    return tuple(kept)


def _split(metadata: dict[str, Value], path: str) -> GgufSplit | None:
    """Return which of several files this is; one that was put together again says that it is one of none."""
    values = [metadata.get(f"split.{key}", default) for key, default in (("no", 0), ("count", 0))]
    index, count = (value if type(value) is int else -1 for value in values)
    total = metadata.get("split.tensors.count")
    if count == 0:
        return None
    if not 0 <= index < count or not (total is None or (type(total) is int and total >= 0)):
        raise GgufFileError(
            "file says it is one of several, but not which",
            path=path,
            expected="split.no below split.count",
            found=f"split.no {values[0]!r:.80}, split.count {values[1]!r:.80}, split.tensors.count {total!r:.80}",
            hint=DOWNLOAD_HINT,
        )
    return GgufSplit(index, count, total if type(total) is int else None)


def _notes(records: Sequence[_Record]) -> tuple[str, ...]:
    unknown = [record for record in records if record.dtype.startswith("GGML_")]
    if not unknown:
        return ()
    types = ", ".join(sorted({record.dtype for record in unknown})[:5])
    return (f"{len(unknown)} tensor(s) of types that are not known ({types}) are carried as opaque bytes with padding",)
