"""`open_partition` and `open_set`: tensors out of partitions, one at a time, as numpy arrays of their true dtype."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmsplit.checkpoint import Scratch
from mmsplit.codec import RAW, ChunkDecoder
from mmsplit.dtypes import DTYPES
from mmsplit.errors import IntegrityError, MissingPartitionError, RequestError
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.manifest import LayerEntry, TensorEntry
from mmsplit.sidecar.partition_reader import OpenPartition, open_partition_files
from mmsplit.sidecar.set_manifest import SetManifest
from mmsplit.sidecar.set_reader import (
    missing_partitions,
    open_partition_of_set,
    read_set_manifest,
    resolve_set_path,
)
from mmsplit.workers import JobStream, WorkerGroup, thread_count

Array = NDArray[Any]

#: Stored bytes beyond a tensor that the kernel is asked to read with it.
_READ_AHEAD_BYTES: Final = 32 << 20


class _Chunk(NamedTuple):
    number: int
    out: memoryview


class _Decoder(NamedTuple):
    chunks: ChunkDecoder
    scratch: Scratch


class Partition(Mapping[str, Array]):
    """One partition as a mapping from tensor name to array.

    A tensor that was stored raw is a read-only view of the memory map and costs nothing until it is touched; any
    other is decoded into memory of its own.  Dtypes that numpy lacks come from ml_dtypes (bf16, fp8); packed
    dtypes below one byte and unknown ones come as a flat array of uint8.  A tied weight answers to its alias
    (`lm_head.weight`), too, where the partition has a copy of it.  Several threads may read at once.

    Close it, or use it in a `with` block; views stay valid as long as they live, closed or not.
    """

    def __init__(self, files: OpenPartition, *, verify: bool, threads: int) -> None:
        self._files = files
        self._verify = verify
        self._threads = threads
        self._decoders: list[_Decoder] = []  # those not in use; append and pop are atomic
        self._entries = {tensor.name: tensor for tensor in files.tensors}
        self._aliases = {
            layer.alias: layer.tensors[0].name
            for layer in files.manifest.layers
            if layer.alias is not None and layer.tensors[0].name in self._entries
        }

    @property
    def part_id(self) -> int:
        """Number of this partition, from 0."""
        return self._files.manifest.part_id

    @property
    def num_parts(self) -> int:
        """Number of partitions in its set."""
        return self._files.manifest.num_parts

    @property
    def model_id(self) -> str:
        """Which model this is a part of."""
        return self._files.manifest.model_id

    @property
    def layers(self) -> tuple[LayerEntry, ...]:
        """The layers in forward order, with their tensors' entries."""
        return self._files.manifest.layers

    @property
    def total_params(self) -> int:
        """Number of elements stored."""
        return self._files.manifest.total_params

    @property
    def total_bytes(self) -> int:
        """Raw bytes stored."""
        return self._files.manifest.total_bytes

    def entry(self, name: str) -> TensorEntry:
        """Return dtype, shape, size and checksum of a tensor.

        Raises `KeyError`, or `MissingPartitionError` for a tied weight that is only referred to here.
        """
        entry = self._entries.get(self._aliases.get(name, name))
        if entry is not None:
            return entry
        for layer in self.layers:
            if name in (layer.alias, layer.tensors[0].name if layer.alias else None):
                raise MissingPartitionError(
                    f"not stored here: it is {layer.tensors[0].name} of partition {layer.tied_to}",
                    path=self._files.path,
                    tensor=name,
                    hint="Read it from there, or from the whole set with open_set.",
                )
        raise KeyError(name)

    def __getitem__(self, name: str) -> Array:
        entry = self.entry(name)
        view = self._view(entry)
        if view is None:
            data = np.empty(entry.size_bytes, np.uint8)
            self._decode(entry, data.data, self._verify)
            view = data
        return _typed(view, entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._aliases

    def read_into(self, name: str, buffer: Any, *, verify: bool | None = None) -> Array:
        """Read a tensor into a writable, contiguous buffer of exactly its size, which the caller owns.

        Returns the buffer as an array of the tensor's dtype and shape.  `verify` overrides the mapping's own.
        """
        entry = self.entry(name)
        data = _writable_bytes(buffer, entry.size_bytes, name)
        self._decode(entry, data.data, self._verify if verify is None else verify)
        return _typed(data, entry)

    def layer(self, name: str) -> dict[str, Array]:
        """Return the tensors of one layer; a layer that only refers to another partition raises."""
        for layer in self.layers:
            if layer.name == name:
                if not layer.stored and layer.tied_to != self.part_id:
                    raise MissingPartitionError(
                        f"layer is not stored here; its weight is in partition {layer.tied_to}",
                        path=self._files.path,
                        tensor=layer.tensors[0].name,
                    )
                return {tensor.name: self[tensor.name] for tensor in layer.tensors}
        raise KeyError(name)

    def iter_layers(self) -> Iterator[tuple[LayerEntry, dict[str, Array]]]:
        """Yield each stored layer with its tensors, in forward order; only one layer is in memory at a time."""
        for layer in self.layers:
            if layer.stored:
                yield layer, self.layer(layer.name)

    def close(self) -> None:
        """Let go of the files.  Views that were handed out stay valid."""
        self._files.close()

    def __enter__(self) -> Partition:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Partition {self.part_id} of {self.num_parts} of {self.model_id}: {len(self)} tensors>"

    def _view(self, entry: TensorEntry) -> NDArray[np.uint8] | None:
        """Return a tensor's bytes where they lie, if they lie there raw and in one piece."""
        rows = self._files.index[entry.first_chunk : entry.first_chunk + entry.chunk_count]
        if len(rows) == 0:
            return np.empty(0, np.uint8)
        start = int(rows["stored_offset"][0])
        stop = int(rows["stored_offset"][-1]) + int(rows["stored_bytes"][-1])
        if (rows["codec"] != RAW).any() or stop - start != entry.size_bytes:
            return None
        view = self._files.reader.view_of_map(start, stop)
        if view is None:
            return None
        data = np.frombuffer(view, np.uint8)
        if self._verify:
            for number in range(entry.chunk_count):
                piece = data[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
                self._require(xxhash.xxh3_64_intdigest(piece.data), entry, entry.first_chunk + number)
        return data

    def _decode(self, entry: TensorEntry, out: memoryview, verify: bool) -> None:
        chunks = (
            _Chunk(entry.first_chunk + number, out[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES])
            for number in range(entry.chunk_count)
        )

        self._read_ahead(entry)
        threads = max(1, min(self._threads, entry.chunk_count))
        decoders = [self._take_decoder() for _ in range(threads)]
        try:
            if threads == 1:
                for chunk in chunks:
                    self._decode_chunk(chunk, entry, decoders[0], verify)
                return
            free = iter(decoders)

            def make_worker() -> Callable[[_Chunk], None]:
                decoder = next(free)
                return lambda chunk: self._decode_chunk(chunk, entry, decoder, verify)

            with WorkerGroup() as group:
                group.start_many("load", threads, JobStream(chunks), make_worker)
        finally:
            self._decoders += decoders

    def _take_decoder(self) -> _Decoder:
        """Take a decoder that no thread uses; fresh ones cost page faults, so they are kept from read to read."""
        try:
            return self._decoders.pop()
        except IndexError:
            return _Decoder(ChunkDecoder(), Scratch())

    def _read_ahead(self, entry: TensorEntry) -> None:
        """Tell the kernel what is read now, and what is likely to be read next: tensors lie in forward order."""
        if entry.chunk_count:
            start, _, _ = self._files.encoded(entry.first_chunk)
            _, stop, _ = self._files.encoded(entry.first_chunk + entry.chunk_count - 1)
            self._files.reader.will_need(start, stop + _READ_AHEAD_BYTES)

    def _decode_chunk(self, chunk: _Chunk, entry: TensorEntry, decoder: _Decoder, verify: bool) -> None:
        start, stop, encoded = self._files.encoded(chunk.number)
        try:
            with self._files.reader.borrow(start, stop, decoder.scratch) as stored:
                decoder.chunks.decode(stored, encoded, chunk.out)
        except IntegrityError as error:
            raise IntegrityError(
                f"chunk is damaged: {error.what}",
                path=self._files.reader.path,
                tensor=entry.name,
                offset=start,
            ) from error
        if verify:
            self._require(xxhash.xxh3_64_intdigest(chunk.out), entry, chunk.number)

    def _require(self, found: int, entry: TensorEntry, chunk: int) -> None:
        expected = int(self._files.index[chunk]["raw_xxh3"])
        if found != expected:
            raise IntegrityError(
                "bytes are not those that were split",
                path=self._files.reader.path,
                tensor=entry.name,
                offset=self._files.encoded(chunk)[0],
                expected=f"xxh3 {expected:016x}",
                found=f"xxh3 {found:016x}",
                hint=f"See all damage with: mmsplit verify {self._files.path}",
            )


class PartitionSet(Mapping[str, Array]):
    """All partitions of a set that are in its directory, as one mapping from tensor name to array.

    Partitions are opened at first use and held to the set; `missing` are the ids of those that are not there.  A
    name that none of the others has raises `MissingPartitionError` then, `KeyError` if all are there.
    """

    def __init__(self, root: Path, manifest: SetManifest, *, verify: bool, threads: int | None) -> None:
        self.path = root
        self.manifest = manifest
        self._verify = verify
        self._threads = thread_count(threads)
        self._lock = threading.RLock()
        self._open: dict[int, Partition] = {}
        self._home: dict[str, int] = {}

    @property
    def num_parts(self) -> int:
        """Number of partitions in the set, missing ones included."""
        return len(self.manifest.partitions)

    @property
    def missing(self) -> tuple[int, ...]:
        """Ids of partitions whose files are not in the directory."""
        return missing_partitions(self.path, self.manifest)

    def partition(self, part_id: int) -> Partition:
        """Return one partition; the set closes it.

        Raises `RequestError`, `MissingPartitionError`, or `IntegrityError` if the files are not of this set.
        """
        if not 0 <= part_id < self.num_parts:
            raise RequestError(
                f"there is no partition {part_id}", path=self.path, expected=f"0 to {self.num_parts - 1}"
            )
        with self._lock:
            if part_id not in self._open:
                files = open_partition_of_set(self.path, self.manifest, part_id, "mmap")
                self._open[part_id] = Partition(files, verify=self._verify, threads=self._threads)
            return self._open[part_id]

    def _homes(self) -> dict[str, int]:
        with self._lock:
            if not self._home:
                home: dict[str, int] = {}
                missing = self.missing
                for part_id in range(self.num_parts):
                    if part_id not in missing:
                        for name in self.partition(part_id):
                            home.setdefault(name, part_id)
                self._home = home
            return self._home

    def _find(self, name: object) -> tuple[Partition, str] | None:
        """Return the partition that has a tensor, and the tensor's own name where `name` is an alias of it."""
        homes = self._homes()
        if name not in homes:
            aliases = (
                (layer.alias, layer.tensors[0].name)
                for part_id in sorted(set(homes.values()))
                for layer in self.partition(part_id).layers
                if layer.alias is not None
            )
            name = next((own for alias, own in aliases if alias == name), None)
        return (self.partition(homes[name]), name) if isinstance(name, str) and name in homes else None

    def get(self, name: str, default: Any = None) -> Any:
        """Return a tensor, or `default` if none of the partitions that are here has it."""
        found = self._find(name)
        return default if found is None else found[0][found[1]]

    def __getitem__(self, name: str) -> Array:
        found = self._find(name)
        if found is not None:
            partition, own_name = found
            return partition[own_name]
        missing = self.missing
        if missing:
            raise MissingPartitionError(
                f"tensor is in none of the partitions that are here; not here: {', '.join(map(str, missing))}",
                path=self.path,
                tensor=name,
                hint="Copy the missing partitions into the set.",
            )
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return self._find(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes())

    def __len__(self) -> int:
        return len(self._homes())

    def __repr__(self) -> str:
        return f"<PartitionSet of {self.num_parts} partitions of {self.manifest.model_id} in {self.path}>"

    def close(self) -> None:
        """Close every partition that was opened."""
        with self._lock:
            for partition in self._open.values():
                partition.close()
            self._open.clear()

    def __enter__(self) -> PartitionSet:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def open_partition(path: str | Path, *, verify: bool = True, threads: int | None = None) -> Partition:
    """Open one partition by its manifest or payload.

    With `verify` (the default) every tensor's checksum is compared when it is read, also that of a view.
    `threads` decode one large tensor together (default: all processors).  Raises `FormatError`, `IntegrityError`.
    """
    resolved = resolve_set_path(Path(path))
    if resolved.only is None:
        raise RequestError(
            "this is a whole set; name one partition of it, or use open_set",
            path=path,
            hint="For example: " + str(resolved.root / "partition_0.json"),
        )
    # Views outlive any call, so the file is mapped plainly: as with every loader, do not truncate it meanwhile.
    files = open_partition_files(resolved.only, "mmap")
    return Partition(files, verify=verify, threads=thread_count(threads))


def open_set(path: str | Path, *, verify: bool = True, threads: int | None = None) -> PartitionSet:
    """Open a partition set by its directory or set manifest; the arguments are those of `open_partition`."""
    root, _ = resolve_set_path(Path(path))
    return PartitionSet(root, read_set_manifest(root), verify=verify, threads=threads)


def _writable_bytes(buffer: Any, size_bytes: int, tensor: str) -> NDArray[np.uint8]:
    """Return a caller's buffer as bytes, or say why it cannot take a tensor of that size."""
    # numpy does not export arrays of ml_dtypes as buffers, so arrays are taken as arrays.
    array = buffer if isinstance(buffer, np.ndarray) else np.asarray(memoryview(buffer))
    faults = [
        what
        for what, is_so in (
            (f"{array.nbytes:,} bytes", array.nbytes != size_bytes),
            ("read-only", not array.flags.writeable),
            ("not in one piece", not array.flags.c_contiguous),
        )
        if is_so
    ]
    if faults:
        raise RequestError(
            "buffer does not fit the tensor",
            tensor=tensor,
            expected=f"{size_bytes:,} writable bytes in one piece",
            found=", ".join(faults),
            hint="Give a bytearray, or an array of the tensor's dtype and shape.",
        )
    return array.reshape(-1).view(np.uint8)


def _typed(data: NDArray[np.uint8], entry: TensorEntry) -> Array:
    known = DTYPES.get(entry.dtype)
    if known is None or known.numpy_name is None:
        return data
    dtype = getattr(np, known.numpy_name, None) if known.numpy_name != "bool" else np.bool_
    if dtype is None:
        import ml_dtypes

        dtype = getattr(ml_dtypes, known.numpy_name)
    return data.view(dtype).reshape(entry.shape)
