"""`merge`: all partitions back to the original shards, byte for byte.

Threads decode chunks in the order of the shard's bytes and write each at its place.  Behind them another thread reads
back what is complete so far and hashes it; a shard gets its name only if that SHA-256 is the one that split recorded.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import xxhash

from mmsplit.checkpoint import FileReader, IoMode, LocalStorage, Scratch
from mmsplit.codec import ChunkDecoder
from mmsplit.errors import IntegrityError, OutputError, OutputExistsError, RequestError
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.manifest import TensorEntry
from mmsplit.sidecar.output_directory import OutputDirectory
from mmsplit.sidecar.output_files import PARTIAL_SUFFIX, output_errors, sync_directory, write_whole_file
from mmsplit.sidecar.partition_reader import OpenPartition, require_partition
from mmsplit.sidecar.payload_file import PayloadFile
from mmsplit.sidecar.set_manifest import SetManifest, ShardEntry
from mmsplit.sidecar.set_reader import open_partition_of_set, read_set_manifest, resolve_set_path
from mmsplit.sidecar.small_files import copy_small_files, read_small_files, require_free_names
from mmsplit.workers import JobStream, ProgressCallback, ProgressCounter, WorkerGroup, thread_count

_EXTRA_THREADS: Final = 2
_HASH_BYTES: Final = 4 << 20
#: How often a thread that waits looks whether the others have failed.
_LOOK_SECONDS: Final = 0.2


class MergeResult(NamedTuple):
    """What a merge made.  `kept` are shards that were there already with the right SHA-256."""

    path: Path
    shards: tuple[ShardEntry, ...]
    kept: tuple[str, ...]
    total_bytes: int

    def as_json(self) -> dict[str, object]:
        """Return what `merge --json` shows."""
        return {
            "path": str(self.path),
            "total_bytes": self.total_bytes,
            "shards": [
                {
                    "name": shard.name,
                    "bytes": shard.size_bytes,
                    "sha256": shard.sha256,
                    "kept": shard.name in self.kept,
                }
                for shard in self.shards
            ],
        }


class _Piece(NamedTuple):
    """One chunk and its place: raw bytes go to shard bytes [start, start + raw length)."""

    shard: _ShardRun
    number: int
    partition: OpenPartition
    tensor: TensorEntry
    chunk: int
    start: int


def merge(
    path: str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    threads: int | None = None,
    io: IoMode = "auto",
    progress: ProgressCallback | None = None,
) -> MergeResult:
    """Write the original shards, weights index and small files of the set at `path` into `output`.

    A shard that is there already is refused; with `resume` it is kept if it has the right SHA-256, so that an
    interrupted merge goes on where it was.  Raises `MissingPartitionError` if a partition is not there,
    `IntegrityError` if a chunk or a finished shard is not what the split recorded.
    """
    root, only = resolve_set_path(Path(path))
    if only is not None:
        raise RequestError("this is one partition; merging takes the whole set", path=path, hint=f"Give {root}.")
    if Path(output).resolve() == root.resolve():
        raise RequestError("output is the directory of the set", path=output, hint="Choose another directory.")
    manifest = read_set_manifest(root)
    for entry in manifest.partitions:
        require_partition(root, entry.part_id)
    partitions: list[OpenPartition] = []
    try:
        for entry in manifest.partitions:
            partitions.append(open_partition_of_set(root, manifest, entry.part_id, io))
        pieces = _pieces_by_shard(partitions, manifest)
        with OutputDirectory(Path(output)) as out:
            kept = _keep_finished(out.path, manifest.shards, resume)
            _require_no_other_index(out.path, manifest)
            todo = [shard for shard in manifest.shards if shard.name not in kept]
            partials = [path for path in (_partial(out.path, shard) for shard in todo) if path.exists()]
            there = sum(path.stat().st_size for path in partials)
            out.require_space(sum(shard.size_bytes for shard in todo) - there, "the merged checkpoint")
            # First what may be refused after a moment, last the index: with it the checkpoint is whole.
            digests = {entry.name: entry.sha256 for entry in manifest.files}
            files = read_small_files(LocalStorage(root), list(digests), digests)
            require_free_names(out.path, files, None)
            copy_small_files(LocalStorage(root), files, out.path)
            _write_shards(out.path, todo, pieces, thread_count(threads), progress)
            if manifest.weights_index is not None:
                name, index = manifest.weights_index
                if not (out.path / name).exists():
                    write_whole_file(out.path / name, index.data(name))
    finally:
        for partition in partitions:
            partition.close()
    return MergeResult(Path(output), manifest.shards, tuple(kept), sum(shard.size_bytes for shard in manifest.shards))


def _pieces_by_shard(
    partitions: Sequence[OpenPartition], manifest: SetManifest
) -> dict[str, list[tuple[OpenPartition, TensorEntry]]]:
    """Return each shard's tensors in file order; raises unless header and tensors cover every byte once."""
    pieces: dict[str, list[tuple[OpenPartition, TensorEntry]]] = {shard.name: [] for shard in manifest.shards}
    for partition in partitions:
        for layer in partition.manifest.layers:
            if layer.alias is None:  # copies of tied weights have their original elsewhere
                for tensor in layer.tensors:
                    if tensor.shard not in pieces:
                        raise IntegrityError(
                            f"set manifest does not know shard {tensor.shard}",
                            path=partition.path,
                            tensor=tensor.name,
                            hint="The set manifest is not that of these partitions; verify the set.",
                        )
                    pieces[tensor.shard].append((partition, tensor))
    for shard in manifest.shards:
        pieces[shard.name].sort(key=lambda piece: (piece[1].source_start, piece[1].source_stop))
        position = shard.header.size_bytes
        for _, tensor in pieces[shard.name]:
            if tensor.source_start != position:
                break
            position = tensor.source_stop
        if position != shard.size_bytes:
            raise IntegrityError(
                f"the partitions do not cover shard {shard.name}",
                path=shard.name,
                offset=position,
                expected=f"tensors up to byte {shard.size_bytes:,}",
                hint="The set manifest is not that of these partitions; verify the set.",
            )
    return pieces


def _partial(out: Path, shard: ShardEntry) -> Path:
    return out / (shard.name + PARTIAL_SUFFIX)


def _keep_finished(out: Path, shards: Sequence[ShardEntry], resume: bool) -> list[str]:
    kept = []
    for shard in shards:
        path = out / shard.name
        if not path.exists():
            continue
        if not resume:
            raise OutputExistsError(
                "file exists already",
                path=path,
                hint="Choose another directory, or use --resume to keep shards that are right and make the rest.",
            )
        found = "" if path.stat().st_size != shard.size_bytes else _sha256_of(path)
        if found != shard.sha256:
            raise OutputExistsError(
                "another file has the name of a shard",
                path=path,
                expected=shard.sha256,
                found=found or f"{path.stat().st_size:,} bytes",
                hint="Move it away, or choose another directory.",
            )
        kept.append(shard.name)
    return kept


def _require_no_other_index(out: Path, manifest: SetManifest) -> None:
    if manifest.weights_index is None:
        return
    name, index = manifest.weights_index
    with output_errors(out / name):
        if (out / name).exists() and (out / name).read_bytes() != index.data(name):
            raise OutputExistsError(
                "another file has the name of the weights index",
                path=out / name,
                hint="Move it away, or choose another directory.",
            )


def _sha256_of(path: Path) -> str:
    digest, scratch = hashlib.sha256(), Scratch()
    with output_errors(path), FileReader(path) as reader:
        for start in range(0, reader.size_bytes, _HASH_BYTES):
            with reader.borrow(start, min(start + _HASH_BYTES, reader.size_bytes), scratch) as view:
                digest.update(view)
    return f"sha256:{digest.hexdigest()}"


class _ShardRun:
    """A shard on its way: its file, and how much of it is complete from the start on."""

    def __init__(self, out: Path, entry: ShardEntry, pieces: Sequence[tuple[OpenPartition, TensorEntry]]) -> None:
        self.entry = entry
        self.path = out / entry.name
        self.partial = _partial(out, entry)
        self._tensors = pieces
        self._file: PayloadFile | None = None
        self._changed = threading.Condition()
        self._stops: dict[int, int] = {}
        self._next = 0
        self._complete = 0
        self._cancelled = False

    def pieces(self) -> Iterator[_Piece]:
        number = 0
        for partition, tensor in self._tensors:
            for chunk in range(tensor.chunk_count):
                start = tensor.source_start + chunk * CHUNK_BYTES
                yield _Piece(self, number, partition, tensor, tensor.first_chunk + chunk, start)
                number += 1

    def open(self) -> None:
        header = self.entry.header.data(self.entry.name)
        self._file = PayloadFile(self.partial, direct=False)
        self._file.write(0, header)
        with self._changed:
            self._complete = len(header)
            self._changed.notify_all()

    def write(self, number: int, start: int, data: memoryview) -> None:
        if self._file is not None:
            self._file.write(start, data)
        with self._changed:
            self._stops[number] = start + len(data)
            while self._next in self._stops:
                self._complete = self._stops.pop(self._next)
                self._next += 1
            self._changed.notify_all()

    def wait_beyond(self, position: int) -> int:
        """Return how many leading bytes are complete, once it is more than `position`; 0 if cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or self._complete > position)
            return 0 if self._cancelled else self._complete

    def cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def hash_and_finish(self) -> None:
        """Follow the writers, hash what lies on disk, and name the shard if the digest is right."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASH_BYTES))
        position = 0
        while position < self.entry.size_bytes:
            complete = self.wait_beyond(position)
            if complete == 0 or self._file is None:
                return
            while position < complete:
                piece = buffer[: min(_HASH_BYTES, complete - position)]
                self._file.read_back(position, piece)
                digest.update(piece)
                position += len(piece)
        found = f"sha256:{digest.hexdigest()}"
        if self.entry.sha256 is not None and found != self.entry.sha256:
            raise IntegrityError(
                "merged shard is not the original",
                path=self.partial,
                expected=self.entry.sha256,
                found=found,
                hint="Every chunk had its checksum, so suspect the disk or the set manifest; verify the set.",
            )
        if self._file is not None:
            self._file.finish(self.entry.size_bytes)
        self.close()
        with output_errors(self.path):
            os.replace(self.partial, self.path)
        sync_directory(self.path.parent)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _write_shards(
    out: Path,
    shards: Sequence[ShardEntry],
    pieces: dict[str, list[tuple[OpenPartition, TensorEntry]]],
    threads: int,
    progress: ProgressCallback | None,
) -> None:
    runs = [_ShardRun(out, shard, pieces[shard.name]) for shard in shards]
    counter = ProgressCounter("merge", sum(shard.size_bytes for shard in shards), progress)

    def cancel() -> None:
        for run in runs:
            run.cancel()

    def make_decoder() -> Callable[[_Piece], None]:
        return _PieceDecoder(counter).decode

    def make_hasher() -> Callable[[_ShardRun], None]:
        def hash_and_finish(run: _ShardRun) -> None:
            run.hash_and_finish()
            being_written.release()

        return hash_and_finish

    # Decoding does not run far ahead of hashing: a shard that is being written holds a descriptor and dirty pages.
    being_written = threading.Semaphore(threads + 1)
    try:
        with WorkerGroup(cancel) as group:

            def iter_pieces() -> Iterator[_Piece]:
                for run in runs:
                    while not being_written.acquire(timeout=_LOOK_SECONDS):
                        group.go_on()
                    run.open()
                    counter.add(run.entry.header.size_bytes)
                    yield from run.pieces()

            group.start_many("decode", threads + _EXTRA_THREADS, JobStream(iter_pieces()), make_decoder)
            group.start_many("hash", min(threads, len(runs)), JobStream(iter(runs)), make_hasher)
    finally:
        for run in runs:
            run.close()
    for run in runs:
        if not run.path.is_file():
            raise OutputError("shard was not finished", path=run.path, hint="Run again with --resume.")


class _PieceDecoder:
    """Decodes and writes pieces; one per thread."""

    def __init__(self, counter: ProgressCounter) -> None:
        self._counter = counter
        self._decoder = ChunkDecoder()
        self._scratch = Scratch()
        self._out = Scratch()

    def decode(self, piece: _Piece) -> None:
        partition = piece.partition
        record = partition.index[piece.chunk]
        start, stop, encoded = partition.encoded(piece.chunk)
        out = self._out.take(int(record["raw_bytes"]))
        try:
            with partition.reader.borrow(start, stop, self._scratch) as stored:
                self._decoder.decode(stored, encoded, out)
            if xxhash.xxh3_64_intdigest(out) != int(record["raw_xxh3"]):
                raise IntegrityError("decoded bytes are not those that were split")
        except IntegrityError as error:
            raise IntegrityError(
                f"chunk is damaged: {error.what}",
                path=partition.reader.path,
                tensor=piece.tensor.name,
                offset=start,
                hint=f"See all damage with: mmsplit verify {partition.path}",
            ) from error
        piece.shard.write(piece.number, piece.start, out)
        self._counter.add(len(out))
