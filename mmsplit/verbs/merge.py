"""`merge`: all partitions back to the original shards, byte for byte.

A shard gets its name only if the SHA-256 of the memory that was written, and synced, is the one that split recorded.
Whoever does not trust the disk reads the shards once more, with `sha256sum` or `verify --against`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TypeAlias

from mmsplit.checkpoint import ByteRange, IoMode, LocalStorage
from mmsplit.errors import IntegrityError, OutputError, OutputExistsError, RequestError
from mmsplit.merging.lanes import write_files
from mmsplit.merging.set_consumer import Batch, SetConsumer, gone_partitions, require_merged
from mmsplit.merging.span import Span, StoredTensor, iter_stored
from mmsplit.regular_files import read_regular
from mmsplit.sidecar.consumed_directory import ConsumedDirectory
from mmsplit.sidecar.disk_forecast import DiskForecast
from mmsplit.sidecar.output_directory import OutputDirectory, free_bytes
from mmsplit.sidecar.output_files import output_errors, partial_path, sha256_of_file, write_whole_file
from mmsplit.sidecar.partition_reader import OpenPartition, require_partition
from mmsplit.sidecar.set_manifest import SetManifest, ShardEntry
from mmsplit.sidecar.set_reader import open_partition_of_set, read_set_manifest, resolve_set_path
from mmsplit.sidecar.shard_pieces import KeptPiece, arrange_shard
from mmsplit.sidecar.shard_writer import ShardWriter
from mmsplit.sidecar.small_files import copy_small_files, read_small_files, require_free_names
from mmsplit.workers import ProgressCallback, ProgressCounter, thread_count

#: What the partitions have of each shard, by its name, with the place there.
_Stored: TypeAlias = dict[str, list[tuple[ByteRange, StoredTensor]]]


class MergeResult(NamedTuple):
    """What a merge made.  `kept` are shards that were there already with the right SHA-256.

    Of a merge that consumed its set, `disk` is what it foretold, and `deleted` are the files of the set it deleted.
    """

    path: Path
    shards: tuple[ShardEntry, ...]
    kept: tuple[str, ...]
    total_bytes: int
    disk: DiskForecast | None = None
    deleted: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """Return what `merge --json` shows."""
        consumed: dict[str, object] = {}
        if self.disk is not None:
            consumed = {"extra_disk_bytes": self.disk.extra_bytes, "disk": self.disk.as_json()}
            consumed["deleted"] = list(self.deleted)
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
            **consumed,
        }


def merge(
    path: str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    root_digest: str | None = None,
    consume: bool = False,
    announce: Callable[[DiskForecast], None] | None = None,
    threads: int | None = None,
    io: IoMode = "auto",
    progress: ProgressCallback | None = None,
) -> MergeResult:
    """Write the original shards, weights index and small files of the set at `path` into `output`.

    A shard that is there already is refused; with `resume` it is kept if it has the right SHA-256, so that an
    interrupted merge goes on where it was.  With `root_digest` only that very set is merged, and every stored chunk is
    held to its digest before it is decoded.

    `consume=True` deletes each partition's payload as soon as every shard that has bytes of it is written, synced and
    read back, and the manifests in the end; all partitions are hashed before the first is deleted, and `announce` is
    told before how much more disk the merge takes.  Interrupted, set and output together hold everything, and
    `resume=True` goes on.

    Raises `MissingPartitionError` if a partition is not there,
    `IntegrityError` if a chunk or a finished shard is not what the split recorded.
    """
    root, only = resolve_set_path(Path(path))
    if only is not None:
        raise RequestError("this is one partition; merging takes the whole set", path=path, hint=f"Give {root}.")
    if Path(output).resolve() == root.resolve():
        raise RequestError("output is the directory of the set", path=output, hint="Choose another directory.")
    with ExitStack() as stack:
        directory = stack.enter_context(ConsumedDirectory(root)) if consume else None
        if consume:  # nor may anybody write there meanwhile
            stack.enter_context(OutputDirectory(root))
        manifest = read_set_manifest(root, root_digest, may_be_begun=True)
        gone = gone_partitions(root, manifest) if resume else frozenset()
        partitions: dict[int, OpenPartition] = {}
        stack.callback(_close_all, partitions)
        for entry in manifest.partitions:
            if entry.part_id not in gone:
                require_partition(root, entry.part_id)
        for entry in manifest.partitions:
            if entry.part_id not in gone:
                partitions[entry.part_id] = open_partition_of_set(
                    root, manifest, entry.part_id, io, is_bound=root_digest is not None
                )
        stored = _stored_by_shard(list(partitions.values()), manifest)
        for shard in () if gone else manifest.shards:
            _pieces_of(shard, stored)  # says what is wrong before anything is written
        consumer = None if directory is None else SetConsumer(directory, manifest, Path(output))
        if consumer is not None:
            consumer.require_consumable()
        out = stack.enter_context(OutputDirectory(Path(output)))
        kept = _keep_finished(out.path, manifest.shards, resume)
        _require_no_other_index(out.path, manifest)
        require_merged(root, manifest, gone, kept)
        todo = [shard for shard in manifest.shards if shard.name not in kept]
        for shard in todo if gone else ():
            _pieces_of(shard, stored)
        there = {shard.name: _length_of(partial_path(out.path / shard.name)) for shard in todo}
        disk = None
        batches = [Batch(tuple(todo), ())] if consumer is None else consumer.batches(todo)
        if consumer is None:
            out.require_space(sum(shard.size_bytes for shard in todo) - sum(there.values()), "the merged checkpoint")
        else:
            beside = sum(entry.size_bytes + 4096 for entry in manifest.files)
            beside += 0 if manifest.weights_index is None else manifest.weights_index[1].size_bytes
            disk = consumer.foretell(batches, there, beside, free_bytes(out.path))
            if announce is not None:
                announce(disk)
            consumer.require_space(disk)
        # First what may be refused after a moment, last the index: with it the checkpoint is whole.
        digests = {entry.name: entry.sha256 for entry in manifest.files}
        files = read_small_files(LocalStorage(root), list(digests), digests)
        require_free_names(out.path, files, None)
        copy_small_files(LocalStorage(root), files, out.path)
        counter = ProgressCounter("merge", sum(shard.size_bytes for shard in todo), progress)
        if consumer is not None:
            consumer.require_sound(thread_count(threads), lambda _: None)
        for batch in batches:
            _write_shards(out.path, batch.shards, stored, thread_count(threads), counter)
            if consumer is not None:
                consumer.prove(batch.part_ids, thread_count(threads), sha256_of_file)
                for part_id in batch.part_ids:
                    partitions.pop(part_id).close()
                consumer.delete_payloads(batch.part_ids)
        beside_shards = [out.path / entry.name for entry in files]
        if manifest.weights_index is not None:
            name, index = manifest.weights_index
            beside_shards.append(out.path / name)
            if not (out.path / name).exists():
                write_whole_file(out.path / name, index.data(name))
        if consumer is not None:
            consumer.finish(beside_shards)
    total_bytes = sum(shard.size_bytes for shard in manifest.shards)
    deleted = () if consumer is None else consumer.deleted_now
    return MergeResult(Path(output), manifest.shards, tuple(kept), total_bytes, disk, deleted)


def _close_all(partitions: Mapping[int, OpenPartition]) -> None:
    for partition in partitions.values():
        partition.close()


def _length_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _stored_by_shard(partitions: Sequence[OpenPartition], manifest: SetManifest) -> _Stored:
    """Return what the partitions have of each shard, with its place there; copies of tied weights are left out."""
    stored: _Stored = {shard.name: [] for shard in manifest.shards}
    for partition in partitions:
        for layer in partition.manifest.layers:
            if layer.alias is not None:  # copies of tied weights have their original elsewhere
                continue
            for tensor in layer.tensors:
                for place in tensor.places():
                    if place.shard not in stored:
                        raise IntegrityError(
                            f"set manifest does not know shard {place.shard}",
                            path=partition.path,
                            tensor=tensor.name,
                            hint="The set manifest is not that of these partitions; verify the set.",
                        )
                    stored[place.shard].append(((place.start_offset, place.stop_offset), (partition, tensor)))
    return stored


def _pieces_of(shard: ShardEntry, stored: _Stored) -> list[KeptPiece | StoredTensor]:
    """Return a shard's pieces in file order; raises unless they cover every byte once.

    Its kept bytes are in memory as long as the pieces are: those of one shard, not of all.
    """
    return arrange_shard(stored[shard.name], shard.kept.data(shard.name), shard.size_bytes, shard.name)


def _keep_finished(out: Path, shards: Sequence[ShardEntry], resume: bool) -> list[str]:
    kept = []
    for shard in shards:
        path = out / shard.name
        with output_errors(path):
            is_there = path.exists()
        if not is_there:
            continue
        if not resume:
            raise OutputExistsError(
                "file exists already",
                path=path,
                hint="Choose another directory, or use --resume to keep shards that are right and make the rest.",
            )
        if shard.sha256 is None:
            raise OutputExistsError(
                "no SHA-256 of this shard was recorded: a file that is there cannot be told from another",
                path=path,
                hint="Remove it, or choose another directory.",
            )
        found = "" if path.stat().st_size != shard.size_bytes else sha256_of_file(path)
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
        if (out / name).exists() and read_regular(out / name) != index.data(name):
            raise OutputExistsError(
                "another file has the name of the weights index",
                path=out / name,
                hint="Move it away, or choose another directory.",
            )


def _write_shards(
    out: Path,
    shards: Sequence[ShardEntry],
    stored: _Stored,
    threads: int,
    counter: ProgressCounter,
) -> None:
    writers = [ShardWriter(out, shard) for shard in shards]

    def iter_shard(writer: ShardWriter) -> Iterator[Span]:
        arranged = _pieces_of(writer.entry, stored)
        return iter_stored(writer, 0, (piece.data if isinstance(piece, KeptPiece) else piece for piece in arranged))

    try:
        write_files(writers, iter_shard, threads, counter)
    finally:
        for writer in writers:
            writer.close()
    for writer in writers:
        if not writer.path.is_file():
            raise OutputError("shard was not finished", path=writer.path, hint="Run again with --resume.")
