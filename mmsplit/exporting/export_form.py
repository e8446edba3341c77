"""The two forms that an export can have: which files there are, and what writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from mmsplit.exporting.float32 import require_float32
from mmsplit.exporting.parameters_json import parameters_name
from mmsplit.exporting.parameters_writer import ParametersWriter, estimate_bytes
from mmsplit.exporting.tensor import ExportPartition, ExportSource, note_on_rows, state_dict_of
from mmsplit.exporting.weight_files import INDEX_NAME, WeightFile, format_weights_index, lay_out_files
from mmsplit.merging.span import BlockSink, Span, iter_stored
from mmsplit.planning.ties import declares_tie
from mmsplit.sidecar.set_manifest import KeptBytes, ShardEntry
from mmsplit.sidecar.shard_writer import ShardWriter

#: Called with length and SHA-256 of a file that has its name.
OnFinish = Callable[[int, str], None]


class FileWriter(BlockSink, Protocol):
    """What writes one file."""

    @property
    def path(self) -> Path:
        """The file."""

    def close(self) -> None:
        """Let go of it, finished or not."""


class ExportForm(Protocol):
    """The files of an export.

    `name` is how a user calls the form.  `file_bytes` is the length of each file of weights, or an estimate of it, and
    `raw_bytes` what streams through its writer.  `layout` differs if other tensors go to other places.  `notes`
    say, when all is written, what a person should know.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def file_bytes(self) -> Mapping[str, int]: ...  # noqa: D102
    @property
    def raw_bytes(self) -> Mapping[str, int]: ...  # noqa: D102
    @property
    def layout(self) -> str: ...  # noqa: D102
    @property
    def total_params(self) -> int: ...  # noqa: D102
    @property
    def takes_small_files(self) -> bool: ...  # noqa: D102
    @property
    def notes(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def index(self) -> tuple[str, bytes] | None:
        """Name and content of the file that is written last."""

    def open_writer(self, directory: Path, file: str, on_finish: OnFinish) -> FileWriter:
        """Return what writes one of the files."""

    def iter_spans(self, writer: FileWriter) -> Iterator[Span]:
        """Yield what such a writer is to be given."""


class SafetensorsForm:
    """Safetensors files, their index, and the small files of the model: what loaders take for a model's directory."""

    name = "safetensors"
    takes_small_files = True

    def __init__(self, source: ExportSource, max_shard_bytes: int) -> None:
        """Raise `RequestError` for a tensor that safetensors cannot hold."""
        self._source = source
        ties_restored = declares_tie(source.config) is True
        tensors, aliases = state_dict_of(source.partitions, ties_restored=ties_restored)
        self.notes = note_on_rows(tensors)
        files = lay_out_files(tensors, aliases, max_shard_bytes)
        self._files: dict[str, WeightFile] = {file.name: file for file in files}
        self.file_bytes = {file.name: file.size_bytes for file in files}
        self.raw_bytes = self.file_bytes
        self.total_params = sum(tensor.params for file in files for tensor in file.tensors)
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.header)
        self.layout = f"sha256:{digest.hexdigest()}"

    @property
    def index(self) -> tuple[str, bytes] | None:
        """The weights index, where there are several files."""
        return None if len(self._files) == 1 else (INDEX_NAME, format_weights_index(self._files.values()))

    def open_writer(self, directory: Path, file: str, on_finish: OnFinish) -> ShardWriter:
        """Return what writes one of the files."""
        size_bytes = self.file_bytes[file]
        entry = ShardEntry(file, size_bytes, None, KeptBytes(0, b""))
        return ShardWriter(directory, entry, lambda sha256: on_finish(size_bytes, sha256))

    def iter_spans(self, writer: FileWriter) -> Iterator[Span]:
        """Yield header and tensors."""
        file = self._files[writer.path.name]
        yield from iter_stored(writer, 0, [memoryview(file.header)])
        pieces = [piece for tensor in file.tensors for piece in (tensor.slices or (tensor,))]
        yield from self._source.iter_spans(writer, len(file.header), pieces)


class JsonForm:
    """One JSON file of numbers for each partition; see `parameters_json`."""

    name = "json"
    takes_small_files = False
    layout = "one entry per tensor"
    index = None

    def __init__(self, source: ExportSource) -> None:
        """Raise `RequestError` for a tensor that has no float32 form."""
        self._source = source
        self._partitions: dict[str, ExportPartition] = {}
        for partition in source.partitions:
            for tensor in partition.tensors:
                require_float32(tensor.name, tensor.dtype)
            self._partitions[parameters_name(partition.part_id)] = partition
        self.file_bytes = {name: estimate_bytes(source, part) for name, part in self._partitions.items()}
        self.raw_bytes = {
            name: sum(tensor.size_bytes for tensor in part.tensors) for name, part in self._partitions.items()
        }
        self.total_params = sum(tensor.params for part in self._partitions.values() for tensor in part.tensors)
        self._inexact: dict[str, None] = {}

    def open_writer(self, directory: Path, file: str, on_finish: OnFinish) -> ParametersWriter:
        """Return what writes one of the files."""
        writer = ParametersWriter(directory / file, self._partitions[file], on_finish, self._note_inexact)
        if self.raw_bytes[file] == 0:
            writer.open()  # nothing will come that would
        return writer

    def iter_spans(self, writer: FileWriter) -> Iterator[Span]:
        """Yield the tensors of the partition."""
        yield from self._source.iter_spans(writer, 0, self._partitions[writer.path.name].tensors)

    @property
    def notes(self) -> tuple[str, ...]:
        """Which tensors lost something."""
        if not self._inexact:
            return ()
        names = list(self._inexact)
        return (
            f"{len(names)} tensor(s) have numbers that float32 does not have, which were rounded:"
            f" {', '.join(names[:3])}{' …' if len(names) > 3 else ''}",
        )

    def _note_inexact(self, tensor: str) -> None:
        self._inexact[tensor] = None
