"""Files such as torch.save writes, right or wrong, put together from opcodes and zip records."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from mmsplit.checkpoint.torch_file import TorchFile, read_torch_file
from mmsplit.checkpoint.torch_legacy import MAGIC

PREAMBLE = (MAGIC, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}})
NONE, TRUE, FALSE = b"N", b"\x88", b"\x89"
ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def parse(file: bytes, *, allow_unknown_dtypes: bool = False) -> TorchFile:
    """What mmsplit makes of a file; only ranges within it may be read."""

    def read(start: int, stop: int) -> bytes:
        assert 0 <= start <= stop <= len(file)
        return file[start:stop]

    return read_torch_file(read, len(file), "f", allow_unknown_dtypes=allow_unknown_dtypes)


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    """BININT where it fits, else LONG1."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def named(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def tuple_of(*parts: bytes) -> bytes:
    """MARK, the parts, TUPLE."""
    return b"(" + b"".join(parts) + b"t"


def dict_of(items: dict[str, bytes] | Sequence[tuple[bytes, bytes]]) -> bytes:
    """EMPTY_DICT and its items; texts as keys, or any parts."""
    pairs = [(text(key), value) for key, value in items.items()] if isinstance(items, dict) else items
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def storage_id(key: str = "0", count: int = 4, kind: str = "FloatStorage", *more: bytes) -> bytes:
    """The persistent id of a storage."""
    return tuple_of(text("storage"), named("torch", kind), text(key), text("cpu"), integer(count), *more) + b"Q"


def tensor_of(
    of: bytes | None = None,
    shape: Sequence[int] = (4,),
    stride: Sequence[int] = (1,),
    offset: int = 0,
    *more: bytes,
) -> bytes:
    """`_rebuild_tensor_v2` of a storage; the one of four floats unless told."""
    sizes, steps = tuple_of(*map(integer, shape)), tuple_of(*map(integer, stride))
    arguments = tuple_of(of or storage_id(), integer(offset), sizes, steps, FALSE, ORDERED_DICT, *more)
    return named("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def program(value: bytes) -> bytes:
    """A whole pickle."""
    return b"\x80\x02" + value + b"."


SIMPLE = program(dict_of({"w": tensor_of()}))
FOUR_FLOATS = struct.pack("<4f", 1, 2, 3, 4)


@dataclass
class Entry:
    """One zip entry.  What is None follows from name and data."""

    name: bytes
    data: bytes
    local_name: bytes | None = None
    size: int | None = None
    stored_size: int | None = None
    local_size: int | None = None
    header_offset: int | None = None
    method: int = 0
    flags: int = 0
    local_flags: int | None = None
    local_method: int | None = None
    extra: bytes = b""
    local_extra: bytes = b""
    descriptor: bytes = b""
    disk: int = 0
    attributes: int = 0
    needed_version: int = 20


def zip_file(
    entries: Sequence[Entry], *, count: int | None = None, before_end: bytes = b"", after: bytes = b""
) -> bytes:
    """A zip file of these entries, in this order."""
    body, directory = b"", b""
    for entry in entries:
        offset = len(body) if entry.header_offset is None else entry.header_offset
        size = len(entry.data) if entry.size is None else entry.size
        stored = size if entry.stored_size is None else entry.stored_size
        local_size = size if entry.local_size is None else entry.local_size
        local_name = entry.name if entry.local_name is None else entry.local_name
        local_flags = entry.flags if entry.local_flags is None else entry.local_flags
        method = entry.method if entry.local_method is None else entry.local_method
        local = (b"PK\3\4", 20, local_flags, method, 0, 0, 0, local_size, local_size, len(local_name))
        body += struct.pack("<4s5H3L2H", *local, len(entry.local_extra)) + local_name + entry.local_extra
        body += entry.data + entry.descriptor
        versions = 20, entry.needed_version
        record = (b"PK\1\2", *versions, entry.flags, entry.method, 0, 0, 0, stored, size, len(entry.name))
        directory += struct.pack("<4s6H3L5H2L", *record, len(entry.extra), 0, entry.disk, 0, entry.attributes, offset)
        directory += entry.name + entry.extra
    number = len(entries) if count is None else count
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, number, number, len(directory), len(body), 0)
    return body + directory + before_end + end + after


def entries(pickled: bytes = SIMPLE, storages: dict[str, bytes] | None = None) -> list[Entry]:
    """The entries that torch.save writes."""
    stored = {"0": FOUR_FLOATS} if storages is None else storages
    data = [Entry(f"archive/data/{key}".encode(), value) for key, value in stored.items()]
    return [Entry(b"archive/data.pkl", pickled), Entry(b"archive/byteorder", b"little"), *data]


def saved(pickled: bytes = SIMPLE, storages: dict[str, bytes] | None = None) -> bytes:
    """A zip file with this pickle and these storages."""
    return zip_file(entries(pickled, storages))


def legacy_file(
    pickled: bytes = SIMPLE,
    keys: object = ("0",),
    storages: bytes = struct.pack("<q", 4) + FOUR_FLOATS,
    preamble: Sequence[object] = PREAMBLE,
) -> bytes:
    """A legacy file."""
    head = b"".join(pickle.dumps(value, protocol=2) for value in preamble)
    last = pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, protocol=2)
    return head + pickled + last + storages
