"""Tensors of a partition set, or of single partitions: decoded, each chunk held to its checksum."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Final

from mmsplit.checkpoint import IoMode, LocalStorage, Scratch, aligned_buffer
from mmsplit.checkpoint.checkpoint import CONFIG_NAME, read_config
from mmsplit.checkpoint.directory import find_small_files
from mmsplit.codec import ChunkDecoder
from mmsplit.errors import IntegrityError, RequestError
from mmsplit.exporting.elements import iter_elements
from mmsplit.exporting.tensor import ExportTensor, partition_of, shows_all
from mmsplit.merging.span import BlockSink, StoredSpan, StoredTensor, iter_chunks, iter_stored
from mmsplit.planning import sorted_part_ids
from mmsplit.sidecar.manifest import manifest_name
from mmsplit.sidecar.output_files import sha256_of_file
from mmsplit.sidecar.partition_reader import OpenPartition, open_partition_files, require_partition
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME, SetManifest
from mmsplit.sidecar.set_reader import entry_of_file, open_partition_of_set, read_set_manifest, resolve_set_path

_PARTITION: Final = re.compile(r"^partition_(?:set\.json|\d+\.(?:json|bin))$", re.ASCII)


def holds_partitions(path: Path) -> bool:
    """Whether a path is a partition set's directory, its set manifest or a partition, rather than a checkpoint."""
    if path.is_dir():
        return (path / SET_MANIFEST_NAME).exists() or any(
            _PARTITION.match(found.name) for found in path.glob("partition_*.json")
        )
    return path.exists() and _PARTITION.match(path.name) is not None


class SetSource:
    """Partitions of this machine, open; see `ExportSource`."""

    most_lanes = None

    def __init__(
        self, path: Path, part_ids: Collection[int] | None, io: IoMode, root_digest: str | None = None
    ) -> None:
        """Open the partitions asked for, all of the set for None.

        Without a set manifest single partitions will do, if it is said which.  With `root_digest`, of which the set
        manifest must be, all is held to its digest, each chunk before it is decoded.

        Raises `FormatError`, `IntegrityError`,
        `MissingPartitionError`, or `RequestError` for a partition that there is not.
        """
        root, only = resolve_set_path(path)
        manifest = None
        is_bound = root_digest is not None
        if is_bound or (root / SET_MANIFEST_NAME).exists() or (only is None and part_ids is None):
            manifest = read_set_manifest(root, root_digest)
        with ExitStack() as stack:
            opened = _open_partitions(root, manifest, _wanted(only, part_ids, manifest), io, stack, is_bound=is_bound)
            self._close = stack.pop_all().close
        first = opened[0].manifest
        self.directory = root
        self.storage = LocalStorage(root)
        self.model_id, self.revision = first.model_id, first.revision
        self.num_parts, self.plan_digest = first.num_parts, first.plan_digest
        self.partitions = tuple(partition_of(part.manifest.part_id, part.manifest.layers) for part in opened)
        self.identity = {"partitions": [sha256_of_file(part.path) for part in opened]}
        self.notes: tuple[str, ...] = ()
        self.small_files: dict[str, str | None]
        if manifest is not None:
            self.small_files = {entry.name: entry.sha256 for entry in manifest.files}
        else:
            names, _ = find_small_files(self.storage, deep=False)
            self.small_files = dict.fromkeys(names)
            self.notes = ("no set manifest here: the files beside the partitions are taken for those of the model",)
        self.config = read_config(self.storage)[0] if CONFIG_NAME in self.small_files else None
        self._places = {
            (part.manifest.part_id, tensor.name): (part, tensor) for part in opened for tensor in part.tensors
        }

    def iter_spans(self, sink: BlockSink, start: int, tensors: Sequence[ExportTensor]) -> Iterator[StoredSpan]:
        """Yield the spans of tensors that follow each other in the file from `start` on."""
        return iter_stored(sink, start, self._iter_pieces(tensors))

    def _iter_pieces(self, tensors: Sequence[ExportTensor]) -> Iterator[memoryview | StoredTensor]:
        for tensor in tensors:
            stored = self._place(tensor)
            if shows_all(tensor, stored[1].size_bytes):
                yield stored
            else:
                yield from iter_elements(tensor, _RawBytes(stored).lend)

    def read_beginning(self, tensor: ExportTensor, size_bytes: int) -> bytes:
        """Decode the first chunk of a tensor."""
        stored = self._place(tensor)
        start = 0 if tensor.view is None else tensor.view.offset_bytes
        with _RawBytes(stored).lend(start, min(start + size_bytes, stored[1].size_bytes)) as raw:
            return bytes(raw)

    def require_unchanged(self) -> None:
        """Every chunk has its checksum."""

    def cancel(self) -> None:
        """Nobody waits here for longer than a disk takes."""

    def close(self) -> None:
        """Close the partitions."""
        self._close()

    def _place(self, tensor: ExportTensor) -> StoredTensor:
        return self._places[tensor.part_id, tensor.stored_name]


class _RawBytes:
    """The raw bytes of a tensor, decoded where they are asked for; the chunk decoded last is kept."""

    def __init__(self, stored: StoredTensor) -> None:
        self._chunks = tuple(iter_chunks(stored))
        self._stops = tuple(accumulate(chunk.raw_bytes for chunk in self._chunks))
        self._decoder = ChunkDecoder()
        self._scratch = Scratch()
        self._number = -1
        self._raw = memoryview(b"")

    @contextmanager
    def lend(self, start: int, stop: int) -> Iterator[memoryview]:
        """Lend bytes [`start`, `stop`) until the next are asked for."""
        pieces = []
        number = bisect_right(self._stops, start)
        while start < stop:
            raw = self._decode(number)
            begin = self._stops[number] - len(raw)
            pieces.append(raw[start - begin : stop - begin])
            start, number = self._stops[number], number + 1
        yield pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def _decode(self, number: int) -> memoryview:
        if number != self._number:
            chunk = self._chunks[number]
            raw = aligned_buffer(chunk.raw_bytes)[: chunk.raw_bytes]
            start, stop, _ = chunk.partition.encoded(chunk.number)
            with chunk.partition.reader.borrow(start, stop, self._scratch) as encoded:
                chunk.decode(encoded, raw, self._decoder)
            self._number, self._raw = number, raw
        return self._raw


def _wanted(
    only: Path | None, part_ids: Collection[int] | None, manifest: SetManifest | None
) -> tuple[Path | int, ...]:
    """Return the partitions to open: their numbers, or the one path that was named."""
    if only is not None and part_ids is not None:
        raise RequestError(
            "this is one partition, and needs no number", path=only, hint=f"Give {only.parent} to choose by number."
        )
    if only is not None:
        return (only,)
    if manifest is not None:
        count = len(manifest.partitions)
        return tuple(range(count)) if part_ids is None else sorted_part_ids(part_ids, count)
    # How many there are is in each of them.
    return sorted_part_ids(part_ids or (), 2**32)


def _open_partitions(
    root: Path,
    manifest: SetManifest | None,
    wanted: Sequence[Path | int],
    io: IoMode,
    stack: ExitStack,
    *,
    is_bound: bool,
) -> list[OpenPartition]:
    opened: list[OpenPartition] = []
    for which in wanted:
        if manifest is not None:  # also one that is named by its path is held to the set that it lies in
            part_id = entry_of_file(manifest, which).part_id if isinstance(which, Path) else which
            part = stack.enter_context(open_partition_of_set(root, manifest, part_id, io, is_bound=is_bound))
        else:
            if not isinstance(which, Path):
                require_partition(root, which)
            path = which if isinstance(which, Path) else root / manifest_name(which)
            part = stack.enter_context(open_partition_files(path, io))
        if opened and part.manifest.plan_digest != opened[0].manifest.plan_digest:
            raise IntegrityError(
                "partitions are not of one plan",
                path=part.path,
                expected=opened[0].manifest.plan_digest,
                found=part.manifest.plan_digest,
                hint="Export them one by one.",
            )
        opened.append(part)
    return opened
