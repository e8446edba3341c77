"""Writes the JSON form of one partition as its tensors stream by; memory does not grow with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mmsplit.dtypes import DTYPES
from mmsplit.exporting.float32 import as_float32
from mmsplit.exporting.parameters_json import (
    ENTRY_BYTES,
    ENTRY_END,
    PIECE_NUMBERS,
    format_beginning,
    format_end,
    format_entry,
    format_numbers,
)
from mmsplit.exporting.tensor import ExportPartition, ExportSource, ExportTensor
from mmsplit.sidecar.output_files import give_name, output_errors, partial_path
from mmsplit.sidecar.payload_file import PayloadFile
from mmsplit.sidecar.shard_writer import ShardBlock

#: A sample is some numbers of some tensors.
_SAMPLE_TENSORS: Final = 32
_SAMPLE_NUMBERS: Final = 1024
#: Characters of a float32 of noise, its comma included.
_USUAL_CHARACTERS: Final = 14.0


class ParametersWriter:
    """Takes the raw bytes of a partition's tensors, one after the other, as the blocks of one file.

    `on_finish` gets length and digest of the text when the file has its name, `on_inexact` the name of a tensor some of
    whose numbers float32 does not have.
    """

    def __init__(
        self,
        path: Path,
        partition: ExportPartition,
        on_finish: Callable[[int, str], None],
        on_inexact: Callable[[str], None],
    ) -> None:
        self.path = path
        self.partition = partition
        self._on_finish = on_finish
        self._on_inexact = on_inexact
        self._partial = partial_path(path)
        self._file: PayloadFile | None = None
        self._digest = hashlib.sha256()
        self._size_bytes = 0
        self._next = 0  # tensors that were begun
        self._left_bytes = 0  # of the one that was begun last
        self._is_finished = False

    def open(self) -> None:
        """Begin; a partition without a byte is finished by this."""
        self._file = PayloadFile(self._partial, direct=False)
        self._put(format_beginning(self.partition.part_id))
        self._begin_tensors()

    def hash(self, block: ShardBlock) -> None:
        """Nothing: it is the text that is hashed."""

    def write(self, block: ShardBlock) -> None:
        """Write the numbers of the next block; after the last the file is made durable and gets its name."""
        if self._file is None:
            self.open()
        data = block.data
        while data:
            tensor = self.partition.tensors[self._next - 1]
            piece = data[: min(self._left_bytes, PIECE_NUMBERS * DTYPES[tensor.dtype].bits // 8)]
            self._put_numbers(tensor, piece)
            data = data[len(piece) :]
            self._left_bytes -= len(piece)
            if self._left_bytes == 0:
                self._put(ENTRY_END)
                self._begin_tensors()

    def close(self) -> None:
        """Close the file.  One that is not complete is removed: nobody can go on in the middle of it."""
        if self._file is not None:
            self._file.close()
            self._file = None
            if not self._is_finished:
                with output_errors(self._partial):
                    self._partial.unlink(missing_ok=True)

    def _begin_tensors(self) -> None:
        """Begin the next tensor that has bytes, and all before it; after the last tensor finish."""
        while self._next < len(self.partition.tensors):
            tensor = self.partition.tensors[self._next]
            self._put(format_entry(tensor.name, tensor.layer_type, tensor.shape, first=self._next == 0))
            self._next += 1
            self._left_bytes = tensor.size_bytes
            if self._left_bytes:
                return
            self._put(ENTRY_END)
        self._finish()

    def _put_numbers(self, tensor: ExportTensor, raw: memoryview) -> None:
        converted = as_float32(raw, tensor.name, tensor.dtype)
        if not converted.is_exact:
            self._on_inexact(tensor.name)
        comma = "," if self._left_bytes < tensor.size_bytes else ""
        self._put(comma + format_numbers(converted.numbers, tensor.name, repeating=_is_narrow(tensor)))

    def _put(self, text: str) -> None:
        assert self._file is not None
        data = text.encode("ascii")
        self._digest.update(data)
        self._file.write(self._size_bytes, data)
        self._size_bytes += len(data)

    def _finish(self) -> None:
        assert self._file is not None
        self._put(format_end(sum(tensor.params for tensor in self.partition.tensors)))
        self._file.finish(self._size_bytes)
        self._is_finished = True
        self.close()
        give_name(self._partial, self.path)
        self._on_finish(self._size_bytes, f"sha256:{self._digest.hexdigest()}")


def estimate_bytes(source: ExportSource, partition: ExportPartition) -> int:
    """Return about how long the text of a partition will be, judged by some of its numbers."""
    tensors = [tensor for tensor in partition.tensors if tensor.params]
    chosen = tensors[:: max(1, -(-len(tensors) // _SAMPLE_TENSORS))]
    sampled = characters = 0.0
    for tensor in chosen:
        raw = source.read_beginning(tensor, min(tensor.params, _SAMPLE_NUMBERS) * DTYPES[tensor.dtype].bits // 8)
        numbers = as_float32(raw, tensor.name, tensor.dtype).numbers
        each = (len(format_numbers(numbers, tensor.name, repeating=_is_narrow(tensor))) + 1) / len(numbers)
        sampled += tensor.params
        characters += tensor.params * each
    each = characters / sampled if sampled else _USUAL_CHARACTERS
    heads = sum(len(tensor.name) + ENTRY_BYTES for tensor in partition.tensors)
    return int(each * sum(tensor.params for tensor in partition.tensors)) + heads


def _is_narrow(tensor: ExportTensor) -> bool:
    return DTYPES[tensor.dtype].bits <= 16
