"""The one validator of the safetensors header.  Pure: bytes in, records or one `HeaderError` out.

Law: what this accepts, the reference implementation accepts.  The checks follow its order
(`safetensors/src/tensor.rs`: `SafeTensors::read_metadata`, `Metadata::validate`); the format's own README is
followed where it is stricter, and the error then says so:

* the header begins with `{` (README, "the header data MUST begin with a `{` character");
* no key occurs twice (README, "duplicate keys are disallowed"; the reference keeps the last);
* an entry is a JSON object, its dtype text; unknown fields in it nest at most 32 deep (the reference has other
  limits) and hold no `-0` (to the reference a float, to Python the integer 0) and no number beyond 1e308.

Reason for exact coverage, in the format's own words: "The byte buffer needs to be entirely indexed, and
cannot contain holes.  This prevents the creation of polyglot files."
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Final, NoReturn

from mmsplit.checkpoint.tensor import ShardHeader, TensorInfo
from mmsplit.dtypes import DTYPES
from mmsplit.errors import HeaderError

LENGTH_BYTES: Final = 8
#: The reference refuses longer headers (`MAX_HEADER_SIZE`), so that a forged length costs no memory.
MAX_HEADER_BYTES: Final = 100_000_000
_U64_MAX: Final = 2**64 - 1
_MAX_UNKNOWN_DEPTH: Final = 32
#: The reference reads numbers beyond 64 bits as doubles, refuses those beyond a double, and rounds those near the
#: largest in a way of its own: unknown fields may not come near.
_MAX_NUMBER: Final = 10**308
_TRUNCATED_HINT: Final = "The file is truncated, or not a safetensors file. Download it again."


class _DuplicateKeyError(ValueError):
    pass


def parse_header_length(prefix: bytes, file_bytes: int, path: str) -> int:
    """Read the length field from the first 8 bytes of a file of `file_bytes` bytes; N of the format's README."""
    if file_bytes < LENGTH_BYTES or len(prefix) < LENGTH_BYTES:
        raise HeaderError(
            "file is too short for a safetensors header",
            path=path,
            offset=0,
            expected=f"at least {LENGTH_BYTES} bytes",
            found=file_bytes,
            hint=_TRUNCATED_HINT,
        )
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if prefix[:LENGTH_BYTES] == b"version ":
        raise HeaderError(
            "file is a Git LFS pointer, not the weights",
            path=path,
            hint="Fetch the weights with: git lfs pull",
        )
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            "header length is beyond what the format allows",
            path=path,
            offset=0,
            expected=f"at most {MAX_HEADER_BYTES:,} bytes",
            found=length,
            hint="This is probably not a safetensors file.",
        )
    if LENGTH_BYTES + length > file_bytes:
        raise HeaderError(
            "header reaches past the end of the file",
            path=path,
            offset=0,
            expected=f"a file of at least {LENGTH_BYTES + length:,} bytes",
            found=file_bytes,
            hint=_TRUNCATED_HINT,
        )
    return length


def parse_header(
    header: bytes, file_bytes: int, path: str, shard: str, *, allow_unknown_dtypes: bool = False
) -> ShardHeader:
    """Validate the JSON part of a header against a file of `file_bytes` bytes.

    `path` is for messages, `shard` goes into the records.  With `allow_unknown_dtypes` an entry whose dtype is
    not in `mmsplit.dtypes` is carried as opaque bytes: its length is what `data_offsets` say, its shape is
    not checked against it.
    """
    entries = _decode(header, path)
    metadata = _metadata(entries.pop("__metadata__", None), path)
    buffer_start = LENGTH_BYTES + len(header)
    tensors = [_entry(name, entry, path, shard, buffer_start, allow_unknown_dtypes) for name, entry in entries.items()]
    tensors.sort(key=_by_offset)
    _require_exact_cover(tensors, buffer_start, file_bytes, path)
    return ShardHeader(buffer_start, tuple(tensors), metadata)


def _by_offset(tensor: TensorInfo) -> tuple[int, int, str]:
    return tensor.start_offset, tensor.stop_offset, tensor.name


def _decode(header: bytes, path: str) -> dict[str, object]:
    def fail(what: str, offset: int | None = None, hint: str | None = None) -> NoReturn:
        raise HeaderError(what, path=path, offset=offset, hint=hint) from None

    if not header.startswith(b"{"):
        fail(
            f"header begins with {header[:1]!r}; the safetensors format demands '{{'"
            " (its reference implementation tolerates white space, mmsplit does not)",
            LENGTH_BYTES,
        )
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as error:
        fail("header is not UTF-8", LENGTH_BYTES + error.start)
    try:
        # serde reads "-0" as a float, which is no offset; Python reads it as 0.
        parse_int = _refuse_minus_zero if "-" in text and "-0" in text else None
        entries = json.loads(text, parse_constant=_refuse_constant, parse_int=parse_int)
        # As many colons as keys: none occurs twice.  Otherwise (a colon in a text, keys deeper down) each is looked at,
        # which takes twice the time.
        if text.count(":") != _key_count(entries):
            entries = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=parse_int)
    except _DuplicateKeyError as error:
        fail(f"key {error.args[0]!r} occurs twice; the safetensors format forbids it", LENGTH_BYTES)
    except json.JSONDecodeError as error:
        offset = LENGTH_BYTES + len(text[: error.pos].encode("utf-8"))
        fail(f"header is not JSON: {error.msg}", offset)
    except RecursionError:
        fail("header is nested too deep", LENGTH_BYTES)
    except ValueError as error:
        fail(f"header is not JSON: {error}", LENGTH_BYTES)
    if not isinstance(entries, dict):  # pragma: no cover - it begins with "{"
        fail("header is not a JSON object", LENGTH_BYTES)
    # Escaped lone surrogates are not text: serde refuses them, and no file or terminal can hold them.
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(entries, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            fail("header holds a lone surrogate, which is not text", LENGTH_BYTES)
    return entries


def _key_count(entries: object) -> int:
    """Return the number of keys of a JSON object and of the objects that are its values."""
    if not isinstance(entries, dict):
        return 0
    return len(entries) + sum([len(entry) for entry in entries.values() if type(entry) is dict])


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key[:200])
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_minus_zero(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is not an integer")
    return int(text)


def _metadata(value: object, path: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise HeaderError("__metadata__ is not a map from text to text", path=path, offset=LENGTH_BYTES)
    return value


def _fail(
    path: str, tensor: str, what: str, expected: object = None, found: object = None, hint: str | None = None
) -> NoReturn:
    raise HeaderError(what, path=path, tensor=tensor, offset=LENGTH_BYTES, expected=expected, found=found, hint=hint)


def _entry(
    name: str, entry: object, path: str, shard: str, buffer_start: int, allow_unknown_dtypes: bool
) -> TensorInfo:
    if not isinstance(entry, dict):
        _fail(path, name, "entry is not a JSON object")
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except KeyError as error:
        _fail(path, name, f"entry has no field {error.args[0]!r}")
    if len(entry) > 3:
        _require_sane_extras(entry, partial(_fail, path, name))
    if type(dtype) is not str:
        _fail(path, name, "dtype is not text")
    if type(offsets) is not list or len(offsets) != 2:
        _fail(path, name, "data_offsets is not a list of two")
    start, stop = offsets
    if type(start) is not int or type(stop) is not int or not 0 <= start <= _U64_MAX or not 0 <= stop <= _U64_MAX:
        _fail(path, name, "data_offsets are not two unsigned 64-bit integers", found=str(offsets)[:80])
    if stop < start:
        _fail(path, name, "data_offsets run backwards", expected=f"an end of at least {start:,}", found=stop)
    if type(shape) is not list:
        _fail(path, name, "shape is not a list")
    params = 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= _U64_MAX:
            _fail(path, name, "shape is not a list of unsigned 64-bit integers", found=str(shape)[:80])
        params *= size
        if params > _U64_MAX:  # checked step by step, as the reference does: [2**63, 2, 0] overflows
            _fail(path, name, "shape has more than 2**64 elements", found=str(shape)[:80])
    known = DTYPES.get(dtype)
    if known is None:
        if not allow_unknown_dtypes:
            _fail(
                path,
                name,
                f"dtype {dtype[:40]!r} is not known",
                hint="mmsplit can carry it as opaque bytes: allow unknown dtypes (--allow-unknown-dtypes).",
            )
    else:
        bits = params * known.bits
        if bits > _U64_MAX:
            _fail(path, name, "tensor has more than 2**64 bits", found=str(shape)[:80])
        if bits % 8:
            _fail(path, name, f"{params:,} elements of {known.bits} bits do not fill whole bytes")
        if stop - start != bits // 8:
            _fail(path, name, "data_offsets do not fit dtype and shape", expected=bits // 8, found=stop - start)
    return TensorInfo(name, dtype, tuple(shape), shard, buffer_start + start, buffer_start + stop, params)


def _require_sane_extras(entry: dict[str, object], fail: Callable[[str], NoReturn]) -> None:
    """Hold unknown fields to what the reference can read, with a stack of our own: a hostile header must not
    exhaust Python's.
    """
    todo: list[tuple[object, int]] = [(entry, 1)]
    while todo:
        item, depth = todo.pop()
        if depth > _MAX_UNKNOWN_DEPTH:
            fail("unknown fields nest too deep")
        if isinstance(item, int | float) and abs(item) > _MAX_NUMBER:
            fail("unknown field holds a number that is out of range")
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        todo.extend((child, depth + 1) for child in children)


def _require_exact_cover(tensors: list[TensorInfo], start: int, file_bytes: int, path: str) -> None:
    """Each byte after the header belongs to exactly one tensor: no hole, no overlap, nothing left over."""
    position = start
    for tensor in tensors:
        if tensor.start_offset != position:
            kind = "overlaps the tensor before it" if tensor.start_offset < position else "leaves a hole before it"
            raise HeaderError(
                f"byte range {kind}",
                path=path,
                tensor=tensor.name,
                offset=tensor.start_offset,
                expected=f"a start at byte {position:,}",
                found=tensor.start_offset,
            )
        position = tensor.stop_offset
    if position != file_bytes:
        what = "file is shorter than its header says" if position > file_bytes else "file has bytes no tensor covers"
        raise HeaderError(
            what,
            path=path,
            offset=min(position, file_bytes),
            expected=f"{position:,} bytes",
            found=file_bytes,
            hint=_TRUNCATED_HINT if position > file_bytes else None,
        )
