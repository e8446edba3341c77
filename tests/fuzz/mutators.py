"""Changes to bytes and to JSON.  Each takes a `Random`, so that a seed says everything about a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

#: Integers at which code goes wrong, as far as a field holds them.
EDGES = (0, 1, 2, 7, 8, 31, 127, 128, 255, 256, 4095, 4096, 2**15, 2**16 - 1, 2**16, 2**22, 2**31 - 1, 2**31, 2**32 - 1)
EDGES += (2**32, 2**33, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 4096, 2**64 - 8, 2**64 - 2, 2**64 - 1)
BYTES = (b"\0", b"\xff", b"\xed\xa0\x80", b"\xc3", b"\xef\xbb\xbf", b"\n", b'"', b"\\", b"{", b"[", b"..", b"/")

#: Names that mean another place, or another file, to some system or other.
NAMES = (
    "../x", "..", ".", "", "/", "/etc/x", "//x", "a/../../x", "a/..", "a//b", "./x", "a/./x", "a/", "C:\\x", "C:x",
    "..\\x", "\\\\host\\share\\x", "NUL", "nul.txt", "CON", "x.", "x ", " x", "x:stream", "a\0b", "a\nb", "a\rb",
    "\x1b[2J", "\u202ex", "\ufeffx", "\ud800", "é", "e\u0301", "É", "config.JSON", "Config.json", "ﬁle", "n" * 300,
    "é" * 200, "d/" * 200 + "x", "partition_0.bin", "PARTITION_0.bin", "partition_set.json",
    "partition_set.json.partial",
    "unfinished_split.json", ".mmsplit.lock", "partition_0.bin.journal", "x.partial", "~", "~/x", "$HOME/x", "-rf", "*",
    ".git/config", ".bashrc", "model.safetensors", "%2e%2e%2fx", "..%2fx", "?", "#", "x?y", "x#y",
)  # fmt: skip

#: JSON texts that no `json.dumps` writes.
_RAW_JSON = (
    "NaN", "Infinity", "-Infinity", "-0", "1e999", "1E400", "0.1", "1e-999", "9" * 5000, "-1", "1.0", "01", "+1", ".5",
    "[" * 900 + "]" * 900, "[" * 200_000, '{"a":' * 5_000 + "1" + "}" * 5_000, '"\\ud800"', '"\\udc00\\ud800"',
    '"\\u0000"',
    '"\ud800"', "'x'", "nul", '{"a":1,"a":2}', "[1,]", "/*x*/1", "\u00a0", "\ufeff1", '"a\nb"', "18446744073709551616",
)  # fmt: skip

Mutation = Callable[[bytes, Random], bytes]


def edge_bytes(data: bytes, random: Random, width: int | None = None) -> bytes:
    """Overwrite 1, 2, 4 or 8 bytes with an edge value, little-endian or, seldom, big-endian."""
    width = width or random.choice((1, 2, 4, 8))
    at = random.randrange(max(1, len(data) - width + 1))
    value = random.choice(EDGES) % (1 << 8 * width)
    order = "little" if random.random() < 0.9 else "big"
    return data[:at] + value.to_bytes(width, order) + data[at + width :]


def nudged_integer(data: bytes, random: Random) -> bytes:
    """Add a little to the integer that some bytes are."""
    width = random.choice((1, 2, 4, 8))
    at = random.randrange(max(1, len(data) - width + 1))
    value = int.from_bytes(data[at : at + width], "little") + random.choice((-4096, -8, -1, 1, 8, 64, 4096))
    return data[:at] + (value % (1 << 8 * width)).to_bytes(width, "little") + data[at + width :]


def flipped(data: bytes, random: Random) -> bytes:
    """Flip one bit."""
    changed = bytearray(data or b"\0")
    changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(data: bytes, random: Random) -> bytes:
    """Leave out the end, or a piece of the middle."""
    start, stop = sorted((random.randint(0, len(data)), random.randint(0, len(data))))
    return data[:start] if random.random() < 0.5 else data[:start] + data[stop:]


def spliced(data: bytes, random: Random) -> bytes:
    """Repeat or move a piece of the data, or put in bytes that mean something somewhere."""
    at = random.randint(0, len(data))
    if random.random() < 0.3:
        return data[:at] + random.choice(BYTES) + data[at:]
    start = random.randint(0, len(data))
    piece = data[start : start + random.choice((1, 4, 8, 40, 64, 256))]
    return data[:at] + piece + data[at + (len(piece) if random.random() < 0.6 else 0) :]


def overwritten(data: bytes, random: Random) -> bytes:
    """Overwrite some bytes by chance."""
    at = random.randint(0, len(data))
    piece = random.randbytes(random.choice((1, 2, 4, 8)))
    return data[:at] + piece + data[at + len(piece) :]


BYTE_MUTATIONS: tuple[Mutation, ...] = (edge_bytes, nudged_integer, flipped, cut, spliced, overwritten)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Change bytes without knowing what they are, a few times."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = random.choice(BYTE_MUTATIONS)(data, random)
    return data


def joined(data: bytes, other: bytes, random: Random) -> bytes:
    """The beginning of one file and the end of another."""
    return data[: random.randint(0, len(data))] + other[random.randint(0, len(other)) :]


def places_in(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a JSON value."""
    found = [prefix] if prefix else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places_in(item, (*prefix, key))
    return found


def mutate_values(value: Any, random: Random, odd: Sequence[Any] = ()) -> Any:
    """Change a JSON value, in place where it can be: another value, no value, another key, twice the same item."""
    places = places_in(value)
    if not places:
        return random.choice(({}, [], None, 1, "x"))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        *way, last = random.choice(places)
        inner = value
        try:
            for key in way:
                inner = inner[key]
            _change_one(inner, last, random, odd)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took it away
    return value


def _change_one(inner: Any, last: Any, random: Random, odd: Sequence[Any]) -> None:
    kind = random.random()
    if kind < 0.12:
        del inner[last]
    elif kind < 0.2 and isinstance(inner, dict):
        inner[random.choice((*NAMES[:8], "new", "__metadata__", "é"))] = inner.pop(last)
    elif kind < 0.3 and isinstance(inner, list):
        inner.insert(random.randint(0, len(inner)), inner[last])
    elif kind < 0.4:
        inner[last] = random.choice(list(inner.values() if isinstance(inner, dict) else inner))
    else:
        inner[last] = _another(inner[last], random, odd)


def _another(value: Any, random: Random, odd: Sequence[Any]) -> Any:
    kind = random.random()
    if type(value) is int and kind < 0.7:
        near = value + random.choice((-4096, -40, -8, -1, 1, 8, 40, 4096))
        return random.choice((near, near, random.choice(EDGES), -1, 2**64, 10**30, float(value), str(value), True))
    if type(value) is str and kind < 0.7:
        return random.choice(
            (random.choice(NAMES), random.choice(NAMES), value + "x", value[:-1], value.upper(), "0" * 16)
        )
    if odd and kind < 0.8:
        return random.choice(list(odd))
    return random.choice((None, True, False, -1, 0, 1.5, "", "x", [], {}, [[]], [{}], {"a": []}, random.choice(EDGES)))


def dump_json(value: Any, random: Random) -> bytes:
    """A JSON text of a value, in one of the ways in which such texts are written, or must not be."""
    marked = random.random() < 0.15
    if marked and (places := places_in(value)):
        *way, last = random.choice(places)
        inner = value
        for key in way:
            inner = inner[key]
        inner[last] = "@@raw@@"
    indent = random.choice((None, None, 1))
    text = json.dumps(value, ensure_ascii=random.random() < 0.7, indent=indent)
    if marked:
        text = text.replace('"@@raw@@"', random.choice(_RAW_JSON), 1)
    if random.random() < 0.04:
        text = text.replace("{", '{"format": "x", "name": 1, "name": 2,', 1)
    data = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(data, random) if random.random() < 0.08 else data


def mutate_json(data: bytes, random: Random, odd: Sequence[Any] = ()) -> bytes:
    """Change what a JSON text says, or how it says it."""
    try:
        return dump_json(mutate_values(json.loads(data), random, odd), random)
    except (ValueError, RecursionError, OverflowError):  # no JSON any more, or too much of it for `json`
        return mutate_bytes(data, random)
