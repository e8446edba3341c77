"""Changes to files that know what they are: safetensors, zip archives with pickles, GGUF."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from random import Random

from mutators import EDGES, NAMES, mutate_bytes, mutate_json
from torch_builder import Entry, zip_file

from mmsplit.checkpoint.torch_legacy import MAGIC_BYTES
from mmsplit.dtypes import DTYPES

_DTYPES = (*DTYPES, "Q4_K", "f32")


def mutate_safetensors(data: bytes, random: Random) -> bytes:
    """Change the JSON, mostly with a length that fits it; else any byte."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8 or random.random() < 0.2:
        return mutate_bytes(data, random)
    header, rest = (
        mutate_json(data[8 : 8 + length], random, (*_DTYPES, [0, 0], [2**63, 2], [0, 2**64 - 1])),
        data[8 + length :],
    )
    if random.random() < 0.1:
        header += random.choice((b" ", b"\0", b"\n" * 100, b"{}"))
    if random.random() < 0.1:
        rest = mutate_bytes(rest, random)
    claimed = len(header) if random.random() < 0.95 else random.choice(EDGES)
    return claimed.to_bytes(8, "little") + header + rest


def mutate_pickle(data: bytes, random: Random) -> bytes:
    """Change a pickle opcode by opcode: leave out, repeat, exchange, put in, give another argument."""
    try:
        places = [place for _, _, place in pickletools.genops(data) if place is not None]
    except Exception:  # whatever pickletools says of a pickle that is damaged already
        return mutate_bytes(data, random)
    pieces = [data[start:stop] for start, stop in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(pieces))
        kind = random.random()
        if kind < 0.15 and len(pieces) > 1:
            del pieces[at]
        elif kind < 0.3:
            pieces.insert(at, random.choice(pieces))
        elif kind < 0.4:
            pieces[at] = random.choice(pieces)
        elif kind < 0.65:
            pieces.insert(at, random.choice(_OPCODES))
        elif kind < 0.8:
            pieces[at] = random.choice(_OPCODES)
        elif len(pieces[at]) > 1:
            pieces[at] = pieces[at][:1] + mutate_bytes(pieces[at][1:], random)
    return b"".join(pieces)


def _push(value: object) -> bytes:
    """The opcodes that put a value on the stack."""
    return pickle.dumps(value, protocol=2)[2:-1]


_OPCODES = (
    b"(", b".", b"0", b"1", b"2", b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f", b"a", b"e", b"s", b"u", b"t",
    b"l", b"d",
    b"\x85", b"\x86", b"\x87", b"R", b"b", b"Q", b"o", b"\x81", b"\x92", b"\x93", b"\x94", b"\x90", b"\x91", b"\x97",
    b"\x98",
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\ngetattr\n", b"ctorch\nload\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n", b"ctorch\nQInt8Storage\n", b"ccollections\nOrderedDict\n", b"ios\nsystem\n", b"P0\n",
    b"V../x\n", b"S'x'\n", b"I01\n", b"I00\n", b"I999999999999999999999999\n", b"L5L\n", b"F1e999\n", b"Fnan\n",
    b"g0\n", b"p0\n",
    b"q\x00", b"h\x00", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff", b"r\x00\x00\x00\x7f", b"\x82\x01", b"\x83\x01\x00",
    b"\x84\x01\x00\x00\x00", b"\x80\x02", b"\x80\x05", b"\x80\xff", b"\x95" + struct.pack("<Q", 2**63),
    b"\x95" + bytes(8),
    b"X" + struct.pack("<I", 2**32 - 1), b"\x8d" + struct.pack("<Q", 2**64 - 1), b"\x8e" + struct.pack("<Q", 2**40),
    b"B" + struct.pack("<I", 2**31), b"T" + struct.pack("<i", -1), b"\x8b" + struct.pack("<i", -1),
    b"\x8b" + struct.pack("<i", 2**31 - 1), b"\x8a\xff" + b"\xff" * 255, b"(" * 1000, b"]" * 300 + b"a" * 299,
    b"2" * 1000,
    *(_push(value) for value in (2**31, -(2**31), 2**63 - 1, 2**63, -1, 2**64, 10**100, 1.5, "", "0", "storage",
    "cpu", *NAMES[:4])),
    *(_push(value) for value in ((), (2**62, 4), (0,) * 70, (-1,), [1], {"a": 1}, b"x", {1: 2})),
)  # fmt: skip


def mutate_torch(data: bytes, random: Random) -> bytes:
    """Change a zip archive entry by entry or a legacy file pickle by pickle; else any byte."""
    kind = random.random()
    if kind < 0.25:
        return mutate_bytes(data, random)
    if MAGIC_BYTES in data[:32]:
        return _mutate_legacy(data, random)
    try:
        entries = _entries(data)
    except Exception:  # no archive any more
        return mutate_bytes(data, random)
    if kind < 0.65:
        entries = [
            Entry(entry.name, mutate_pickle(entry.data, random)) if entry.name.endswith(b"/data.pkl") else entry
            for entry in entries
        ]
        return zip_file(entries)
    for _ in range(random.choice((1, 1, 2)) if entries else 0):
        _change_entry(entries, random)
    file = zip_file(entries, before_end=_end64(random) if random.random() < 0.15 else b"")
    return file[:-100] + mutate_bytes(file[-100:], random) if random.random() < 0.2 else file


def _entries(data: bytes) -> list[Entry]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [Entry(info.filename.encode(), archive.read(info)) for info in archive.infolist()]


def _end64(random: Random) -> bytes:
    numbers = [random.choice(EDGES) for _ in range(5)]
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *numbers[:4])
    return record + struct.pack("<4sLQL", b"PK\6\7", 0, numbers[4], 1)


def _change_entry(entries: list[Entry], random: Random) -> None:
    entry = random.choice(entries)
    number = random.choice((*EDGES[:29], len(entry.data) - 1, len(entry.data) + 1))
    short, wide = number % 2**16, number % 2**32
    kind = random.randrange(16)
    if kind == 0:
        entry.name = random.choice(
            (entry.name.upper(), entry.name + b"/", b"archive/../x", b"/etc/x", b"", b"a" * 300, b"\xff")
        )
    elif kind == 1:
        entry.local_name = random.choice((b"archive/other", entry.name.upper(), entry.name + b"\0", b""))
    elif kind == 2:
        entry.size = wide
    elif kind == 3:
        entry.local_size = wide
    elif kind == 4:
        entry.stored_size = wide
    elif kind == 5:
        entry.header_offset = wide
    elif kind == 6:
        entry.method = random.choice((0, 8, 9, 12, 14, 93, 99, short))
    elif kind == 7:
        entry.flags = random.choice((1, 8, 1 << 5, 1 << 6, 1 << 11, 1 << 13, short))
    elif kind == 8:
        entry.local_flags, entry.local_method = short, random.choice((None, 8))
    elif kind == 9:
        body = b"".join(struct.pack("<Q", random.choice(EDGES)) for _ in range(random.randrange(4)))
        entry.extra = struct.pack("<HH", random.choice((1, 1, 2)), random.choice((len(body), len(body), short))) + body
        entry.size = random.choice((entry.size, 2**32 - 1))
    elif kind == 10:
        entry.local_extra = random.choice((bytes(63), b"\1\0\x10\0" + bytes(16), b"FB\xff\xff", bytes(4096)))
    elif kind == 11:
        entry.descriptor = struct.pack("<4sLLL", b"PK\7\x08", 0, wide, wide)
    elif kind == 12:
        entry.disk, entry.attributes = random.choice(((1, 0), (2**16 - 1, 0), (0, 16), (0, 2**32 - 1)))
    elif kind == 13:
        entries.append(random.choice(entries))
    elif kind == 14 and len(entries) > 1:
        entries.remove(entry)
    else:
        entry.data = mutate_bytes(entry.data, random)


def _mutate_legacy(data: bytes, random: Random) -> bytes:
    """A legacy file is five pickles, then storages."""
    stream = io.BytesIO(data)
    pieces = []
    try:
        for _ in range(5):
            start = stream.tell()
            for _ in pickletools.genops(stream):
                pass
            pieces.append(data[start : stream.tell()])
    except Exception:  # no pickle any more
        return mutate_bytes(data, random)
    rest = data[stream.tell() :]
    at = random.choice((0, 1, 2, 3, 3, 3, 3, 4, 4, 5))
    if at == 5:
        rest = mutate_bytes(rest, random)
    else:
        pieces[at] = mutate_pickle(pieces[at], random)
    return b"".join(pieces) + rest


def mutate_gguf(data: bytes, random: Random) -> bytes:
    """Change what the header says: counts, lengths, types, offsets are where edge values hurt."""
    if random.random() < 0.25:
        return mutate_bytes(data, random)
    head = min(len(data), 2048)
    for _ in range(random.choice((1, 1, 2))):
        kind = random.random()
        if kind < 0.3:  # version and counts
            at, width = random.choice(((4, 4), (8, 8), (16, 8)))
        else:  # a length or a number is most often 4 or 8 bytes, the upper ones of which are zero
            spots = [
                at for at in range(24, head - 8) if data[at : at + 2] != b"\0\0" and data[at + 2 : at + 4] == b"\0\0"
            ]
            at, width = (random.choice(spots) if spots else 8), random.choice((4, 8))
        old = int.from_bytes(data[at : at + width], "little")
        value = random.choice((random.choice(EDGES), random.choice(EDGES), old + 1, old - 1, old + 32, 9, 8, 12, 13))
        data = data[:at] + (value % (1 << 8 * width)).to_bytes(width, "little") + data[at + width :]
    return data
