"""The zip archive that `torch.save` writes: where each entry's bytes are.  Pure but for the reads it is given.

Entries are stored, never compressed, so that each one's data is a byte range of the file.  The central directory at
the end says where entries begin; where their data begins only the *local* header knows, since torch pads it to
align the data.  An archive is read only if every reader of zip files would see the same entries in it: the end
record ends the file, both headers of an entry agree, and no two entries share a byte.

Format: PKWARE APPNOTE 6.3.10, sections 4.3 to 4.5.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple, NoReturn

from mmsplit.checkpoint.range_reads import RangeReads
from mmsplit.errors import TorchFileError

ZIP_MAGIC: Final = b"PK\x03\x04"
MAX_DIRECTORY_BYTES: Final = 64 << 20
#: Local headers must be read one by one; a directory of 64 MiB could promise a million.
MAX_ENTRIES: Final = 500_000

_LOCAL: Final = struct.Struct("<4s5H3L2H")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_END: Final = struct.Struct("<4s4H2LH")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR: Final = struct.Struct("<4sLQL")
_TAIL_BYTES: Final = 64 << 10
_U16: Final = 0xFFFF
_U32: Final = 0xFFFFFFFF
_ZIP64_EXTRA: Final = 1
_HAS_DESCRIPTOR: Final = 1 << 3
#: Flags that do not change how stored bytes lie: compression options, data descriptor, names in UTF-8.
_HARMLESS_FLAGS: Final = 1 << 1 | 1 << 2 | _HAS_DESCRIPTOR | 1 << 11
#: MS-DOS's mark of a folder, of which some readers (torch's own) read no data, whatever its size.
_FOLDER_ATTRIBUTE: Final = 1 << 4
_ENCRYPTED_FLAGS: Final = 1 | 1 << 6 | 1 << 13
#: Of the format, in tenths; readers refuse entries that need a newer one.
_NEWEST_VERSION: Final = 63
_DOWNLOAD_HINT: Final = "The file is truncated or damaged. Download it again."
_RESAVE_HINT: Final = "Load the file with PyTorch and save it again."


class ZipEntry(NamedTuple):
    """One entry.  Its header begins at `header_offset`, its data is [`start_offset`, `stop_offset`) of the file."""

    name: str
    header_offset: int
    start_offset: int
    stop_offset: int


class ZipRecord(NamedTuple):
    """What the central directory says of one entry; its own header has not been looked at."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    size_bytes: int
    header_offset: int


class ZipDirectory(NamedTuple):
    """The central directory, which begins at `start_offset`; `records` in the order the entries lie in the file."""

    start_offset: int
    records: tuple[ZipRecord, ...]


def read_zip_directory(reads: RangeReads) -> ZipDirectory:
    """Read the directory at the end of a zip file.  Raises `TorchFileError`."""
    tail_start = max(0, reads.size_bytes - _TAIL_BYTES)
    tail = reads.read(tail_start, reads.size_bytes)
    start, stop, count = _find_directory(tail, tail_start, reads)
    directory = tail[start - tail_start : stop - tail_start] if start >= tail_start else reads.read(start, stop)
    records = sorted(_parse_directory(directory, count, start, reads.path), key=lambda record: record.header_offset)
    return ZipDirectory(start, tuple(records))


def locate_zip_entries(directory: ZipDirectory, reads: RangeReads) -> tuple[ZipEntry, ...]:
    """Find the data of all entries, in the order of the file, by their own headers.

    No entry may reach into what comes after it.  Raises `TorchFileError`.
    """
    records = directory.records
    ends = [*(record.header_offset for record in records), directory.start_offset][1:]
    ranges = []
    for record, end in zip(records, ends, strict=True):
        _require_plain(record, record.flags, record.method, reads.path)
        stop = record.header_offset + _LOCAL.size + len(record.raw_name)
        if stop > end:
            _fail(f"zip entry {_shown(record.name)} overlaps the next", reads.path, record.header_offset)
        ranges.append((record.header_offset, stop))
    entries = []
    for record, end, header in zip(records, ends, reads.read_all(ranges), strict=True):
        start = record.header_offset + len(header) + _parse_local(record, header, reads.path)
        if start + record.size_bytes > end:
            _fail(f"zip entry {_shown(record.name)} overlaps the next", reads.path, record.header_offset)
        entries.append(ZipEntry(record.name, record.header_offset, start, start + record.size_bytes))
    return tuple(entries)


def _fail(what: str, path: str, offset: int | None = None, hint: str | None = _DOWNLOAD_HINT) -> NoReturn:
    raise TorchFileError(what, path=path, offset=offset, hint=hint)


def _find_directory(tail: bytes, tail_start: int, reads: RangeReads) -> tuple[int, int, int]:
    """Return the byte range of the central directory, and the number of its records."""
    end = len(tail) - _END.size
    if end < 0 or tail[end : end + 4] != b"PK\x05\x06":
        _fail("zip file does not end with its end record", reads.path, reads.size_bytes)
    _, disk, first_disk, here, count, size, start, comment = _END.unpack_from(tail, end)
    stop = tail_start + end
    disks: tuple[int, ...] = disk, first_disk
    wide = _find_end64(tail, tail_start, end, reads.path)
    if wide is not None:
        position, *wide_disks, wide_here, wide_count, wide_size, wide_start = wide
        for narrow, saturated, value in (
            (here, _U16, wide_here),
            (count, _U16, wide_count),
            (size, _U32, wide_size),
            (start, _U32, wide_start),
        ):
            if narrow not in (saturated, value):
                _fail("the two end records of the zip file disagree", reads.path, stop)
        stop, disks = position, tuple(wide_disks)
        here, count, size, start = wide_here, wide_count, wide_size, wide_start
    if comment or disks != (0, 0) or here != count:
        _fail("zip file is one of several, or has a comment", reads.path, stop, _RESAVE_HINT)
    if start + size != stop:
        _fail("zip file's directory is not where its end record says", reads.path, stop)
    if size > MAX_DIRECTORY_BYTES or count > MAX_ENTRIES:
        _fail(f"zip file's directory is too large: {count:,} entries, {size:,} bytes", reads.path, start, None)
    return start, stop, count


def _find_end64(tail: bytes, tail_start: int, end: int, path: str) -> tuple[int, ...] | None:
    """Return position and fields of the zip64 end record, from the disk numbers on; None if there is none."""
    locator = end - _LOCATOR.size
    if locator < 0 or tail[locator : locator + 4] != b"PK\x06\x07":
        return None
    _, disk, offset, disk_count = _LOCATOR.unpack_from(tail, locator)
    position = locator - _END64.size
    # The locator must lead to the record right before it: elsewhere another one could hide.
    if position < 0 or tail[position : position + 4] != b"PK\x06\x06" or offset != tail_start + position:
        _fail("zip64 end record is not where its locator says", path, tail_start + locator)
    _, size, _, _, *fields = _END64.unpack_from(tail, position)
    if size != _END64.size - 12 or disk or disk_count > 1:
        _fail("zip64 end record is of a kind not known here", path, tail_start + position, _RESAVE_HINT)
    return (tail_start + position, *fields)


def _parse_directory(directory: bytes, count: int, start: int, path: str) -> list[ZipRecord]:
    records = []
    position = 0
    for _ in range(count):
        if directory[position : position + 4] != b"PK\x01\x02" or len(directory) - position < _CENTRAL.size:
            _fail("zip file's directory ends early or is damaged", path, start + position)
        fields = _CENTRAL.unpack_from(directory, position)
        _, _, needed, flags, method, _, _, _, stored, size, *lengths, disk, _, attributes, offset = fields
        name_length, extra_length, comment_length = lengths
        name_start = position + _CENTRAL.size
        extra_start = name_start + name_length
        extra = directory[extra_start : extra_start + extra_length]
        stop = extra_start + extra_length + comment_length
        if stop > len(directory):
            _fail("zip file's directory ends early or is damaged", path, start + position)
        raw_name = directory[name_start:extra_start]
        name = _decode_name(raw_name, path, start + position)
        size, stored, offset, disk = _widen((size, stored, offset, disk), extra, path, start + position)
        if disk != 0 or (method == 0 and stored != size):
            _fail(f"zip entry {_shown(name)} has two sizes, or lies in another file", path, start + position)
        if needed & 0xFF > _NEWEST_VERSION:
            what = f"zip entry {_shown(name)} needs version {(needed & 0xFF) / 10} of the format"
            _fail(what, path, start + position, _RESAVE_HINT)
        if attributes & _FOLDER_ATTRIBUTE and size:
            _fail(f"zip entry {_shown(name)} is a folder that holds data", path, start + position)
        records.append(ZipRecord(name, raw_name, flags, method, size, offset))
        position = stop
    if position != len(directory):
        _fail("zip file's directory holds more than its entries", path, start + position)
    if len({record.name for record in records}) != count:
        _fail("two entries of the zip file have the same name", path, start, _RESAVE_HINT)
    return records


def _require_plain(record: ZipRecord, flags: int, method: int, path: str) -> None:
    what = None
    if flags & _ENCRYPTED_FLAGS:
        what = "is encrypted"
    elif method != 0:
        what = f"is compressed (method {method})"
    elif flags & ~_HARMLESS_FLAGS:
        what = f"has flags not known here ({flags:#06x})"
    if what is not None:
        hint = f"torch.save never writes such entries. {_RESAVE_HINT}"
        _fail(f"zip entry {_shown(record.name)} {what}", path, record.header_offset, hint)


def _widen(fields: tuple[int, int, int, int], extra: bytes, path: str, offset: int) -> tuple[int, ...]:
    """Replace saturated fields (size, stored size, header offset, disk) by those of the zip64 extra field."""
    widths = [8 if index < 3 else 4 for index, value in enumerate(fields) if value == (_U32 if index < 3 else _U16)]
    wide = _zip64_extra(extra, path, offset)
    if not widths:
        return fields
    if wide is None or len(wide) < sum(widths):
        _fail("zip entry is larger than its directory can say", path, offset)
    values = []
    position = 0
    for index, value in enumerate(fields):
        if value == (_U32 if index < 3 else _U16):
            width = 8 if index < 3 else 4
            value = int.from_bytes(wide[position : position + width], "little")
            position += width
        values.append(value)
    return tuple(values)


def _zip64_extra(extra: bytes, path: str, offset: int) -> bytes | None:
    """Return the body of the one zip64 field among the extra fields, or None."""
    found = None
    position = 0
    while position < len(extra):
        kind = int.from_bytes(extra[position : position + 2], "little")
        length = int.from_bytes(extra[position + 2 : position + 4], "little")
        body = extra[position + 4 : position + 4 + length]
        if len(extra) - position < 4 or len(body) != length or (kind == _ZIP64_EXTRA and found is not None):
            _fail("extra fields of a zip entry are damaged", path, offset)
        if kind == _ZIP64_EXTRA:
            found = body
        position += 4 + length
    return found


def _parse_local(record: ZipRecord, header: bytes, path: str) -> int:
    """Hold a local header to its entry's record; return the length of its extra fields, which come after the name."""
    magic, _, flags, method, _, _, _, stored, size, name_length, extra_length = _LOCAL.unpack_from(header)
    offset = record.header_offset
    if magic != ZIP_MAGIC:
        _fail(f"zip entry {_shown(record.name)} is not where the directory says", path, offset)
    if name_length != len(record.raw_name) or header[_LOCAL.size :] != record.raw_name:
        _fail(f"zip entry {_shown(record.name)} has another name in its own header", path, offset)
    _require_plain(record, flags, method, path)
    # With a data descriptor the sizes come after the data; beyond 4 GiB they are in the zip64 extra field.
    unsaid = {0, _U32} if flags & _HAS_DESCRIPTOR else {_U32}
    if not {stored, size} <= {record.size_bytes, *unsaid} or (flags ^ record.flags) & _HAS_DESCRIPTOR:
        _fail(f"zip entry {_shown(record.name)} has another size in its own header", path, offset)
    return int(extra_length)


def _decode_name(raw_name: bytes, path: str, offset: int) -> str:
    try:
        name = raw_name.decode("utf-8")
    except UnicodeDecodeError:
        name = "\0"
    if "\0" in name:  # C strings end there, and other readers would see another name
        _fail("name of a zip entry is not text", path, offset)
    return name


def _shown(name: str) -> str:
    return repr(name[:80])
