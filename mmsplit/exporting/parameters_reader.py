"""`load_partition_json`: the JSON form of a partition, ours or the original system's, read strictly in pieces.

Text is read in blocks and numbers are parsed a block at a time, so that beside the numbers themselves memory holds a
few megabytes whatever the file says of itself.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from mmsplit.errors import FormatError
from mmsplit.exporting.parameters_json import ExportedLayer, ExportedPartition

_BLOCK_BYTES: Final = 1 << 20
#: Text of a value other than the numbers of a layer: a name, a shape, what another program added.
_MOST_VALUE_CHARACTERS: Final = 1 << 20
_MOST_LAYERS: Final = 1 << 22
_SPACE: Final = re.compile(r"[ \t\n\r]+")
_HINT: Final = "Give a file that mmsplit export --to json wrote, or the original system's."


def load_partition_json(path: str | Path) -> ExportedPartition:
    """Read a partition's parameters from the JSON that `export(to="json")`, or the original system, wrote.

    `null` is NaN.  Fields that are not known are skipped.  Raises `FormatError` that names the place: for text that is
    not JSON or goes on after its end, for a field that is missing, twice there or of another type, for numbers that no
    float32 holds, for a layer whose shape does not fit its parameters, and for a wrong `total_params`.
    """
    with _Scanner(Path(path)) as scanner:
        part_id = total_params = None
        layers: tuple[ExportedLayer, ...] | None = None
        for key in scanner.each_key():
            if key == "part_id":
                part_id = scanner.count()
            elif key == "total_params":
                total_params = scanner.count()
            elif key == "layers":
                layers = tuple(_each_layer(scanner))
            else:
                scanner.value()
        scanner.require_end()
        if part_id is None or layers is None or total_params is None:
            scanner.fail("not the parameters of a partition: part_id, layers or total_params is missing")
        found = sum(len(layer.parameters) for layer in layers)
        if found != total_params:
            scanner.fail(f"total_params is {total_params:,}, but the layers have {found:,} parameters")
        return ExportedPartition(part_id, layers, total_params)


def _each_layer(scanner: _Scanner) -> Iterator[ExportedLayer]:
    names: set[str] = set()
    for _ in scanner.each_item():
        layer = _layer(scanner)
        if layer.name in names:
            scanner.fail(f"two layers are called {layer.name[:200]!r}")
        names.add(layer.name)
        if len(names) > _MOST_LAYERS:
            scanner.fail(f"more than {_MOST_LAYERS:,} layers")
        yield layer


def _layer(scanner: _Scanner) -> ExportedLayer:
    name = layer_type = shape = parameters = None
    for key in scanner.each_key():
        if key == "name":
            name = scanner.text()
        elif key == "layer_type":
            layer_type = scanner.text()
        elif key == "shape":
            shape = scanner.shape()
        elif key == "parameters":
            pieces = list(scanner.each_numbers())
            parameters = np.concatenate(pieces) if pieces else np.empty(0, np.float32)
        else:
            scanner.value()
    if name is None or layer_type is None or shape is None or parameters is None:
        scanner.fail("a layer lacks name, layer_type, shape or parameters")
    if _product(shape) != len(parameters):
        scanner.fail(
            f"layer {name[:200]!r} has {len(parameters):,} parameters, which its shape {str(shape)[:80]} does not fit"
        )
    return ExportedLayer(name, layer_type, shape, parameters)


def _product(shape: tuple[int, ...]) -> int:
    """Number of elements; a hostile shape must not cost the time of a huge number."""
    params = 1
    for size in shape:
        params = min(params * size, 2**64)
    return params


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _shown(value: object) -> str:
    """Show what was found without flooding the terminal."""
    return str(value)[:80] if isinstance(value, str | float | bool) else type(value).__name__


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)


class _Scanner:
    """Takes JSON apart from its first byte to its last, with one block of text in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._text = ""
        self._place = 0  # in `_text`: everything before it has been taken
        self._offset = 0  # of that place in the file, in bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise FormatError(f"cannot read: {error.strerror}", path=path) from error

    def __enter__(self) -> _Scanner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def fail(self, what: str) -> NoReturn:
        """Raise `FormatError` for what stands here."""
        raise FormatError(what, path=self._path, offset=self._offset, hint=_HINT)

    def each_key(self) -> Iterator[str]:
        """Yield the keys of the object that begins here; after each its value must be taken."""
        self._take("{", "an object")
        seen: set[str] = set()
        if self._peek() == "}":
            self._drop(1)
            return
        while True:
            key = self.text()
            if key in seen:
                self.fail(f"key {key[:80]!r} occurs twice")
            seen.add(key)
            self._take(":", "a colon")
            yield key
            if self._take(",}", "a comma or the end of an object") == "}":
                return

    def each_item(self) -> Iterator[None]:
        """Yield once for each item of the list that begins here; each time the item must be taken."""
        self._take("[", "a list")
        if self._peek() == "]":
            self._drop(1)
            return
        while True:
            yield
            if self._take(",]", "a comma or the end of a list") == "]":
                return

    def each_numbers(self) -> Iterator[NDArray[np.float32]]:
        """Yield the numbers of the list that begins here, block by block."""
        self._take("[", "a list of numbers")
        if self._peek() == "]":
            self._drop(1)
            return
        while True:
            text, closed = self._numbers_text()
            yield self._numbers(text)
            if closed:
                return

    def text(self) -> str:
        """Take a string."""
        value = self.value()
        if not isinstance(value, str):
            self.fail(f"expected text, found {_shown(value)}")
        return value

    def count(self) -> int:
        """Take an unsigned 64-bit integer."""
        value = self.value()
        if type(value) is not int or not 0 <= value < 2**64:
            self.fail(f"expected a count, found {_shown(value)}")
        return value

    def shape(self) -> tuple[int, ...]:
        """Take a list of sizes."""
        value = self.value()
        if not isinstance(value, list) or not all(type(size) is int and 0 <= size < 2**64 for size in value):
            self.fail(f"expected a list of sizes, found {_shown(value)}")
        return tuple(value)

    def value(self) -> object:
        """Take any value whose text is not long."""
        self._peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
                # A number at the end of the text may go on in the next block, with ".5" or "e+5".
                if end + 3 <= len(self._text) or not self._read():
                    break
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._place > _MOST_VALUE_CHARACTERS or not self._read():
                    self.fail(f"not JSON: {error}")
        self._drop(end - self._place)
        found: object = value
        return found

    def require_end(self) -> None:
        """Raise unless nothing but white space follows."""
        if self._peek():
            self.fail("text goes on after the end of the object")

    def _numbers_text(self) -> tuple[str, bool]:
        """Take numbers with commas between, up to the end of the list or about a block; whether it was the end."""
        while True:
            stop = self._text.find("]", self._place)
            closed = stop >= 0
            if not closed:
                stop = self._text.rfind(",", self._place)
            if stop >= 0:
                text = self._text[self._place : stop]
                self._drop(len(text) + 1)
                return text, closed
            if len(self._text) - self._place > _MOST_VALUE_CHARACTERS or not self._read():
                self.fail("expected a list of numbers")

    def _numbers(self, text: str) -> NDArray[np.float32]:
        try:
            values = json.loads("[" + text + "]", parse_constant=_refuse_constant)
            kinds = set(map(type, values))
            if not values or not kinds <= {float, int, type(None)}:
                self.fail("parameters are not a list of numbers")
            wide = np.array(values, np.float64)
        except (ValueError, OverflowError, RecursionError) as error:
            self.fail(f"parameters are not a list of numbers: {error}")
        with np.errstate(over="ignore"):
            numbers = wide.astype(np.float32)
        if np.isinf(numbers).any():
            self.fail("a parameter is beyond float32")
        return numbers

    def _take(self, choices: str, what: str) -> str:
        found = self._peek()
        if not found or found not in choices:
            self.fail(f"expected {what}, found {found!r}" if found else "text ends too early")
        self._drop(1)
        return found

    def _peek(self) -> str:
        """Return the next byte that is not white space, having dropped what is before it; nothing at the end."""
        while True:
            space = _SPACE.match(self._text, self._place)
            self._drop(0 if space is None else len(space[0]))
            if self._place < len(self._text) or not self._read():
                return self._text[self._place : self._place + 1]

    def _drop(self, count: int) -> None:
        self._offset += len(self._text[self._place : self._place + count].encode())
        self._place += count

    def _read(self) -> bool:
        try:
            block = self._file.read(_BLOCK_BYTES)
        except OSError as error:
            raise FormatError(f"cannot read: {error.strerror}", path=self._path, offset=self._offset) from error
        try:
            more = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError:
            self.fail("text is not UTF-8")
        if block:
            self._text, self._place = self._text[self._place :] + more, 0
        return bool(block)
