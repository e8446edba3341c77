"""Strict reading of manifests: JSON with no two meanings, fields with their types checked.  Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn, TypeVar

from mmsplit.checkpoint.weights_index import is_plain_name
from mmsplit.digests import is_sha256
from mmsplit.errors import FormatError, IntegrityError

T = TypeVar("T")


def load_json_object(data: bytes, path: str) -> dict[str, object]:
    """Parse JSON text that must be one object; refuses keys that occur twice, NaN and Infinity."""
    try:
        # Strictly UTF-8: json.loads would also take UTF-16 and 32, and a byte order mark.
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"manifest is not JSON: {error}", path=path) from None
    if not isinstance(value, dict):
        raise IntegrityError("manifest is not a JSON object", path=path)
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


class Fields:
    """The fields of one JSON object, taken out with their types checked.  `where` leads to it, for messages."""

    def __init__(self, values: Mapping[str, object], path: str, where: str = "") -> None:
        self.values = values
        self.path = path
        self.where = where

    def fail(self, what: str) -> NoReturn:
        """Raise `FormatError` for this object."""
        raise FormatError(f"{self.where}{': ' if self.where else ''}{what}", path=self.path)

    def get(self, key: str, kind: type[T]) -> T:
        """Return a field of exactly that type (a bool is no int)."""
        value = self.values.get(key)
        if type(value) is not kind:
            self.fail(f"field {key!r} is missing or not {kind.__name__}")
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        """Return a field of that type, or None if it is null or missing."""
        return None if self.values.get(key) is None else self.get(key, kind)

    def one_of(self, key: str, known: Sequence[str]) -> str:
        """Return a word that must be known here; raises `FormatError` that names it."""
        value = self.get(key, str)
        if value not in known:
            self.fail(f"{key} {value[:40]!r} is not one this mmsplit reads; it knows {', '.join(known)}")
        return value

    def count(self, key: str) -> int:
        """Return an unsigned 64-bit integer."""
        value = self.get(key, int)
        if not 0 <= value < 2**64:
            self.fail(f"field {key!r} is out of range")
        return value

    def pair(self, key: str) -> tuple[int, int]:
        """Return a list of two unsigned integers."""
        value = self.get(key, list)
        if len(value) != 2 or not all(type(item) is int and 0 <= item < 2**64 for item in value):
            self.fail(f"field {key!r} is not a list of two unsigned integers")
        return value[0], value[1]

    def sha256(self, key: str) -> str:
        """Return a digest written `sha256:` and 64 hex digits."""
        value = self.get(key, str)
        if not is_sha256(value):
            self.fail(f"field {key!r} is not a digest of a kind known here")
        return value

    def xxh3(self, key: str) -> str:
        """Return a checksum of 16 hex digits."""
        value = self.get(key, str)
        if not _is_hex(value, 16):
            self.fail(f"field {key!r} is not a checksum")
        return value

    def plain_name(self, key: str) -> str:
        """Return a file name that can only mean a file right inside its directory."""
        value = self.get(key, str)
        if not is_plain_name(value):
            self.fail(f"field {key!r} is not a plain file name: {value[:80]!r}")
        return value

    def relative_name(self, key: str) -> str:
        """Return a path of plain names joined by `/`: it cannot lead out of its directory."""
        value = self.get(key, str)
        if not all(is_plain_name(part) for part in value.split("/")):
            self.fail(f"field {key!r} is not a plain relative path: {value[:80]!r}")
        return value

    def inner(self, key: str) -> Fields:
        """Return an object in this object."""
        return Fields(self.get(key, dict), self.path, f"{self.where}{key}")

    def each(self, key: str) -> Iterator[Fields]:
        """Yield the objects of a list."""
        for position, item in enumerate(self.get(key, list)):
            where = f"{self.where}{'.' if self.where else ''}{key}[{position}]"
            if type(item) is not dict:
                self.fail(f"{key}[{position}] is not an object")
            yield Fields(item, self.path, where)


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and all(char in "0123456789abcdef" for char in text)
