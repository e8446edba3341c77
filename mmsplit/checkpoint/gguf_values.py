"""The beginning of a GGUF file: a cursor over it, and the metadata.  Pure but for the reads it is given.

All numbers are little-endian.  A text is its length (8 bytes), then UTF-8.  Metadata are pairs: the key, a text; the
number of the value's type (4 bytes); the value.  An array is the number of its elements' type, their count (8 bytes),
then the elements, which may be arrays again.

Most of it is the tokenizer: hundreds of thousands of texts, which nobody here needs.  They are passed over in a window,
so that memory does not grow with them; what is kept of the metadata is bounded, too.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, NoReturn

from mmsplit.checkpoint.range_reads import RangeReads
from mmsplit.errors import GgufFileError

#: No header that anybody wrote is near this; tokenizers take 5 to 30 MB.
MAX_HEADER_BYTES: Final = 256 << 20
MAX_PAIRS: Final = 1 << 16
DOWNLOAD_HINT: Final = "The file is truncated or damaged. Download it again."
#: The window grows with each read: over a network each is a request, and small files need one.
_FIRST_WINDOW_BYTES: Final = 1 << 20
_MAX_WINDOW_BYTES: Final = 16 << 20
#: The format's own limit.
_MAX_KEY_BYTES: Final = (1 << 16) - 1
#: Values longer than this are passed over; and all of them from where they add up to that.
_MAX_VALUE_BYTES: Final = 64 << 10
_MAX_KEPT_VALUES_BYTES: Final = 4 << 20
_MAX_NESTING: Final = 4

_TEXT: Final = 8
_ARRAY: Final = 9
#: Types of fixed size, as `struct` has them.
_SCALARS: Final = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_U64: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Omitted:
    """Stands for a value that was passed over: an array of `length` elements, or a text of `length` bytes."""

    length: int


Scalar = bool | int | float
#: A value of the metadata.  Of arrays only short ones of numbers are kept.
Value = Scalar | str | tuple[Scalar, ...] | Omitted


class HeaderCursor:
    """Goes through the beginning of a file, in few reads and bounded memory.  `at` is the next byte's offset.

    All methods raise `GgufFileError` where the file, or what a header may take, ends too early.
    """

    def __init__(self, reads: RangeReads) -> None:
        self.at = 0
        self._reads = reads
        self._window = b""
        self._window_start = 0
        self._next_window_bytes = _FIRST_WINDOW_BYTES

    def fail(self, what: str, *, expected: object = None, found: object = None, hint: str = DOWNLOAD_HINT) -> NoReturn:
        """Raise an error about the bytes at the cursor."""
        raise GgufFileError(
            what, path=self._reads.path, offset=self.at, expected=expected, found=found, hint=hint
        ) from None

    def peek(self, count: int) -> bytes:
        """Return the next `count` bytes, fewer at the end of the file, and stay."""
        count = min(count, self._reads.size_bytes - self.at)
        self._require_window(count)
        begin = self.at - self._window_start
        return self._window[begin : begin + count]

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes and go on behind them; the caller sees to it that they are few."""
        start = self.at
        self._require_room(count)
        self._require_window(count)
        self.at = start + count
        begin = start - self._window_start
        return self._window[begin : begin + count]

    def skip(self, count: int) -> None:
        """Go on behind the next `count` bytes."""
        self._require_room(count)
        self.at += count

    def u32(self) -> int:
        """Take a number of 4 bytes."""
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        """Take a number of 8 bytes."""
        return int.from_bytes(self.take(8), "little")

    def text(self, what: str, max_bytes: int) -> str:
        """Take a text."""
        length = self.u64()
        if length > max_bytes:
            self.fail(f"{what} is too long", expected=f"at most {max_bytes:,} bytes", found=length)
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def skip_texts(self, count: int) -> None:
        """Go on behind the next `count` texts.  This is where the time goes: a tokenizer has 10**5 to 10**6."""
        self._require_room(count * _U64.size)
        while count:
            self._require_room(_U64.size)
            self._require_window(_U64.size)
            window, position = self._window, self.at - self._window_start
            last = len(window) - _U64.size
            while count and position <= last:
                position += _U64.size + _U64.unpack_from(window, position)[0]
                count -= 1
            self.skip(self._window_start + position - self.at)

    def _require_room(self, count: int) -> None:
        stop = self.at + count
        if stop > self._reads.size_bytes:
            self.fail(
                "header reaches past the end of the file",
                expected=f"a file of at least {stop:,} bytes",
                found=self._reads.size_bytes,
            )
        if stop > MAX_HEADER_BYTES:
            self.fail("header is too long", expected=f"at most {MAX_HEADER_BYTES:,} bytes")

    def _require_window(self, count: int) -> None:
        """See to it that the next `count` bytes, which are in the file, are in the window."""
        begin = self.at - self._window_start
        if begin + count <= len(self._window):
            return
        rest = self._window[begin:]
        start = self.at + len(rest)
        stop = min(self._reads.size_bytes, max(self.at + count, start + self._next_window_bytes))
        self._window = rest + self._reads.read(start, stop)
        self._window_start = self.at
        self._next_window_bytes = min(4 * self._next_window_bytes, _MAX_WINDOW_BYTES)


def read_metadata(cursor: HeaderCursor, pair_count: int) -> dict[str, Value]:
    """Take the metadata.  Raises `GgufFileError`."""
    if pair_count > MAX_PAIRS:
        cursor.fail("file has too many metadata pairs", expected=f"at most {MAX_PAIRS:,}", found=pair_count)
    metadata: dict[str, Value] = {}
    left_bytes = _MAX_KEPT_VALUES_BYTES
    for _ in range(pair_count):
        key = cursor.text("metadata key", _MAX_KEY_BYTES)
        if not key:
            cursor.fail("metadata key is empty")
        if key in metadata:
            cursor.fail(f"metadata key {key[:80]!r} occurs twice")
        value, size_bytes = _value(cursor, key, cursor.u32(), min(left_bytes, _MAX_VALUE_BYTES))
        metadata[key] = value
        left_bytes -= size_bytes
    return metadata


def _value(cursor: HeaderCursor, key: str, kind: int, max_bytes: int) -> tuple[Value, int]:
    """Take a value of at most `max_bytes` bytes, or pass it over; return it, and how much of that it has used."""
    if kind in _SCALARS:
        return _scalars(cursor, kind, 1)[0], 0
    if kind == _TEXT:
        length = cursor.u64()
        if length <= max_bytes:
            return cursor.take(length).decode("utf-8", "backslashreplace"), length
        cursor.skip(length)
        return Omitted(length), 0
    if kind != _ARRAY:
        _fail_for_kind(cursor, key, kind)
    inner, count = cursor.u32(), cursor.u64()
    if inner in _SCALARS:
        size_bytes = count * struct.calcsize(_SCALARS[inner])
        if size_bytes <= max_bytes:
            return _scalars(cursor, inner, count), size_bytes
        cursor.skip(size_bytes)
    else:
        _skip_elements(cursor, key, inner, count, nesting=1)
    return Omitted(count), 0


def _scalars(cursor: HeaderCursor, kind: int, count: int) -> tuple[Scalar, ...]:
    layout = f"<{count}{_SCALARS[kind]}"
    return struct.unpack(layout, cursor.take(struct.calcsize(layout)))


def _skip_elements(cursor: HeaderCursor, key: str, kind: int, count: int, nesting: int) -> None:
    if kind in _SCALARS:
        cursor.skip(count * struct.calcsize(_SCALARS[kind]))
    elif kind == _TEXT:
        cursor.skip_texts(count)
    elif kind != _ARRAY:
        _fail_for_kind(cursor, key, kind)
    elif nesting == _MAX_NESTING:
        cursor.fail(f"metadata {key[:80]!r} is nested too deep", expected=f"at most {_MAX_NESTING} arrays")
    else:
        for _ in range(count):  # each takes 12 bytes or more, so that the end of the file ends this
            _skip_elements(cursor, key, cursor.u32(), cursor.u64(), nesting + 1)


def _fail_for_kind(cursor: HeaderCursor, key: str, kind: int) -> NoReturn:
    cursor.fail(f"metadata {key[:80]!r} has a value of a type that is not known", expected="0 to 12", found=kind)
