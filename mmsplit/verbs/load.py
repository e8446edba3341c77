"""`open_partition` and `open_set`: tensors out of partitions, one by one or all at once, as numpy arrays."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsplit.checkpoint import TensorView
from mmsplit.checkpoint.file_reader import ReadMode
from mmsplit.checkpoint.strided import reach_count
from mmsplit.codec import RAW
from mmsplit.dtypes import numpy_dtype
from mmsplit.errors import IntegrityError, MissingPartitionError, RequestError
from mmsplit.exporting.float32 import as_float32
from mmsplit.exporting.parameters_json import ExportedLayer, ExportedPartition
from mmsplit.exporting.tensor import ExportTensor, partition_of
from mmsplit.sidecar.chunk_loader import Chunk, ChunkLoader, iter_chunks
from mmsplit.sidecar.manifest import LayerEntry, TensorEntry
from mmsplit.sidecar.partition_reader import OpenPartition, open_partition_files
from mmsplit.sidecar.set_manifest import SetManifest
from mmsplit.sidecar.set_reader import (
    entry_of_file,
    missing_partitions,
    open_partition_of_set,
    read_set_manifest,
    resolve_set_path,
)
from mmsplit.sidecar.slices import whole_of
from mmsplit.workers import thread_count

Array = NDArray[Any]


class PartitionLayer(LayerEntry):
    """A layer's entry that can read itself: beside what the manifest says it has `shape` and `parameters`."""

    _partition: Partition

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the layer's tensor; of a layer with several, that of `parameters`."""
        tensors = self._shown()
        return tensors[0].shape if len(tensors) == 1 else (sum(tensor.params for tensor in tensors),)

    @property
    def parameters(self) -> NDArray[np.float32]:
        """All numbers of the layer as float32, flat, tensor after tensor; read anew each time.

        Raises `RequestError` for a dtype that has no float32 form, `MissingPartitionError` for a layer that only refers
        to another partition.
        """
        flat = [_float32(self._partition[tensor.name], tensor) for tensor in self._shown()]
        return np.concatenate(flat) if flat else np.empty(0, np.float32)

    def _shown(self) -> Sequence[ExportTensor | TensorEntry]:
        """Return what the layer has under its names; in a layer that only refers to a tied weight, that weight."""
        if not self.stored and not self.views:
            return self.tensors
        found = partition_of(self._partition.part_id, [self])
        return (*found.tensors, *found.elsewhere)


class Partition(Mapping[str, Array]):
    """One partition as a mapping from tensor name to array.

    A tensor that was stored raw is a read-only view of the memory map and costs nothing until it is touched; any
    other is decoded into memory of its own.  Dtypes that numpy lacks come from ml_dtypes (bf16, fp8); packed
    dtypes below one byte and unknown ones come as a flat array of uint8.  A tied weight answers to its alias
    (`lm_head.weight`), too, where the partition has a copy of it.  Several threads may read at once.

    Who wants the whole partition in memory calls `load`, which keeps all threads and the disk busy from the first
    tensor to the last; `iter_layers` has one layer at a time.

    Close it, or use it in a `with` block; views stay valid as long as they live, closed or not.
    """

    def __init__(self, files: OpenPartition, *, verify: bool, threads: int) -> None:
        self._files = files
        self._verify = verify
        self._chunks = ChunkLoader(files, threads)
        self._entries = {tensor.name: tensor for tensor in files.tensors}
        self._aliases = {
            layer.alias: layer.tensors[0].name
            for layer in files.manifest.layers
            if layer.alias is not None and layer.tensors[0].name in self._entries
        }
        self._views = {
            view.name: view for layer in files.manifest.layers for view in layer.views if view.base in self._entries
        }
        self._aliases |= {name: view.base for name, view in self._views.items()}
        shown = (tensor.name for tensor in files.tensors if not tensor.hidden)
        self._names = dict.fromkeys((*shown, *self._views))

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
    def layers(self) -> tuple[PartitionLayer, ...]:
        """The layers in forward order, with their tensors' entries; each can read itself."""
        return tuple(map(self._layer, self._files.manifest.layers))

    @property
    def total_params(self) -> int:
        """Number of elements stored."""
        return self._files.manifest.total_params

    @property
    def total_bytes(self) -> int:
        """Raw bytes stored."""
        return self._files.manifest.total_bytes

    def entry(self, name: str) -> TensorEntry:
        """Return dtype, shape, size and checksum of a tensor; `rows` if only these are here.

        Raises `KeyError`, or `MissingPartitionError` for a tied weight that is only referred to here.
        """
        entry = self._entries.get(self._aliases.get(name, name))
        if entry is not None:
            return entry
        for layer in self._files.manifest.layers:
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
        return self._shown(name, self._read([entry], "cached")[entry.name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._aliases

    def read_into(self, name: str, buffer: Any, *, verify: bool | None = None) -> Array:
        """Read a tensor into a writable, contiguous buffer of exactly its size, which the caller owns.

        Returns the buffer as an array of the tensor's dtype and shape.  `verify` overrides the mapping's own.
        """
        entry = self.entry(name)
        data = _writable_bytes(buffer, entry.size_bytes, name)
        chunks = iter_chunks(entry, data.data, in_place=False)
        self._chunks.load(chunks, "cached", verify=self._verify if verify is None else verify)
        return _typed(data, entry, self._files.path)

    def load(self, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Read all tensors, or those of `names`, into memory; they come as from the mapping, in the order asked for.

        All threads work on all tensors together while the payload is read ahead of them, past the page cache where it
        is not in there already: beside the tensors themselves this takes some 50 MiB, and a second load takes as long
        as the first.  To read tensors again and again, take them from the mapping, which leaves them in the cache.

        Raises what reading them one by one would: of several faults, the first that is met.
        """
        entries = {name: self.entry(name) for name in (self if names is None else names)}
        arrays = self._read(entries.values(), "direct")
        return {name: self._shown(name, arrays[entry.name]) for name, entry in entries.items()}

    def layer(self, name: str) -> dict[str, Array]:
        """Return the tensors of one layer; a layer that only refers to another partition raises."""
        for layer in self._files.manifest.layers:
            if layer.name == name:
                if not layer.stored and layer.tied_to != self.part_id:
                    raise MissingPartitionError(
                        f"layer is not stored here; its weight is in partition {layer.tied_to}",
                        path=self._files.path,
                        tensor=layer.tensors[0].name,
                    )
                return self._read([self.entry(tensor.name) for tensor in layer.tensors], "cached")
        raise KeyError(name)

    def exported(self) -> ExportedPartition:
        """Return what `load_partition_json` gives for this partition's JSON: one float32 entry per tensor.

        Takes 4 bytes a parameter.  Raises `RequestError` for a dtype that has no float32 form.
        """
        tensors = partition_of(self.part_id, self._files.manifest.layers).tensors
        layers = tuple(
            ExportedLayer(tensor.name, tensor.layer_type, tensor.shape, _float32(self[tensor.name], tensor))
            for tensor in tensors
        )
        return ExportedPartition(self.part_id, layers, sum(tensor.params for tensor in tensors))

    def iter_layers(self) -> Iterator[tuple[PartitionLayer, dict[str, Array]]]:
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

    def _layer(self, entry: LayerEntry) -> PartitionLayer:
        layer = PartitionLayer(*entry)
        layer._partition = self
        return layer

    def _shown(self, name: str, base: Array) -> Array:
        """Return what a name stands for: the stored tensor, or what a view sees of it, in the same memory."""
        view = self._views.get(name)
        return base if view is None else _seen(base, view, self._files.path)

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
        return None if view is None else np.frombuffer(view, np.uint8)

    def _read(self, entries: Iterable[TensorEntry], mode: ReadMode) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        chunks: list[Iterator[Chunk]] = []
        for entry in sorted(entries, key=lambda entry: entry.first_chunk):  # as they lie in the payload
            if entry.name in arrays:
                continue
            view = self._view(entry)
            data = np.empty(entry.size_bytes, np.uint8) if view is None else view
            if view is None or self._verify or self._files.is_bound:
                chunks.append(iter_chunks(entry, data.data, in_place=view is not None))
            arrays[entry.name] = _typed(data, entry, self._files.path)
        self._chunks.load(chain.from_iterable(chunks), mode, verify=self._verify)
        return arrays


class PartitionSet(Mapping[str, Array]):
    """All partitions of a set that are in its directory, as one mapping from tensor name to array.

    Partitions are opened at first use and held to the set; `missing` are the ids of those that are not there.  A
    name that none of the others has raises `MissingPartitionError` then, `KeyError` if all are there.  A tensor whose
    rows lie in several partitions comes as a whole, joined in memory of its own; it is there if all its rows are.
    """

    def __init__(
        self, root: Path, manifest: SetManifest, *, verify: bool, threads: int | None, is_bound: bool = False
    ) -> None:
        self.path = root
        self.manifest = manifest
        self._verify = verify
        self._is_bound = is_bound
        self._threads = thread_count(threads)
        self._lock = threading.RLock()
        self._open: dict[int, Partition] = {}
        self._home: dict[str, tuple[int, ...]] = {}

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
                files = open_partition_of_set(self.path, self.manifest, part_id, "view", is_bound=self._is_bound)
                self._open[part_id] = Partition(files, verify=self._verify, threads=self._threads)
            return self._open[part_id]

    def load(self) -> dict[str, Array]:
        """Read all tensors of all partitions that are here into memory, as `Partition.load` does."""
        names: dict[int, list[str]] = {}
        joined: dict[str, Array] = {}
        for name, part_ids in self._homes().items():
            if len(part_ids) == 1:
                names.setdefault(part_ids[0], []).append(name)
            else:
                joined[name] = self._read(name, part_ids)
        whole = {
            name: array
            for part_id, wanted in names.items()
            for name, array in self.partition(part_id).load(wanted).items()
        }
        return whole | joined

    def _homes(self) -> dict[str, tuple[int, ...]]:
        """Return the partition that has each tensor, or all that have rows of it, in the order of the rows."""
        with self._lock:
            if not self._home:
                home: dict[str, tuple[int, ...]] = {}
                slices: dict[str, list[tuple[int, int]]] = {}
                missing = self.missing
                for part_id in range(self.num_parts):
                    if part_id not in missing:
                        partition = self.partition(part_id)
                        for name in partition:
                            rows = partition.entry(name).rows
                            if rows is None:
                                home.setdefault(name, (part_id,))
                            else:
                                slices.setdefault(name, []).append((rows.start, part_id))
                for name, starts in slices.items():
                    part_ids = tuple(part_id for _, part_id in sorted(starts))
                    if whole_of([self.partition(part_id).entry(name) for part_id in part_ids]) is not None:
                        home[name] = part_ids
                self._home = home
            return self._home

    def _read(self, name: str, part_ids: tuple[int, ...]) -> Array:
        """Read a tensor from the one partition that has it, or join its rows."""
        partitions = [self.partition(part_id) for part_id in part_ids]
        whole = whole_of([partition.entry(name) for partition in partitions])
        if whole is None:
            return partitions[0][name]
        data = np.empty(whole.size_bytes, np.uint8)
        start = 0
        for partition in partitions:
            stop = start + partition.entry(name).size_bytes
            partition.read_into(name, data[start:stop])
            start = stop
        return _typed(data, whole, self.path)

    def _find(self, name: object) -> tuple[str, tuple[int, ...], TensorView | None] | None:
        """Return the name a tensor is stored by, the partitions that have it, and what of it to show if not all."""
        homes = self._homes()
        if isinstance(name, str) and name in homes:
            return name, homes[name], None
        missing = self.missing
        for part_id in range(self.num_parts):
            for layer in () if part_id in missing else self.partition(part_id).layers:
                if layer.alias is None or layer.alias != name:
                    continue
                own_name = layer.tensors[0].name
                holder = part_id if own_name in self.partition(part_id) else layer.tied_to
                if holder is not None and holder not in missing:
                    view = next((view for view in layer.views if view.name == name), None)
                    return own_name, (holder,), view
        return None

    def get(self, name: str, default: Any = None) -> Any:
        """Return a tensor, or `default` if none of the partitions that are here has it."""
        found = self._find(name)
        return default if found is None else self[name]

    def __getitem__(self, name: str) -> Array:
        found = self._find(name)
        if found is not None:
            own_name, part_ids, view = found
            array = self._read(own_name, part_ids)
            return array if view is None else _seen(array, view, self.path)
        missing = self.missing
        if missing:
            raise MissingPartitionError(
                f"tensor is in none of the partitions that are here, or not with all its rows; not here:"
                f" {', '.join(map(str, missing))}",
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


def open_partition(
    path: str | Path, *, verify: bool = True, root_digest: str | None = None, threads: int | None = None
) -> Partition:
    """Open one partition by its manifest or payload.

    With `verify` (the default) every tensor's checksum is compared when it is read, also that of a view.  With
    `root_digest`, of which the set manifest beside the partition must be, everything is held to its digest, whatever
    `verify` says, and each chunk before it is decoded; no other partition is needed for that.
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
    if root_digest is None:
        files = open_partition_files(resolved.only, "view")
    else:
        entry = entry_of_file(read_set_manifest(resolved.root, root_digest), resolved.only)
        files = open_partition_files(resolved.only, "view", entry, is_bound=True)
    return Partition(files, verify=verify, threads=thread_count(threads))


def open_set(
    path: str | Path, *, verify: bool = True, root_digest: str | None = None, threads: int | None = None
) -> PartitionSet:
    """Open a partition set by its directory or set manifest; the arguments are those of `open_partition`."""
    root, _ = resolve_set_path(Path(path))
    manifest = read_set_manifest(root, root_digest)
    return PartitionSet(root, manifest, verify=verify, threads=threads, is_bound=root_digest is not None)


def _float32(array: Array, entry: TensorEntry | ExportTensor) -> NDArray[np.float32]:
    return as_float32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), entry.name, entry.dtype).numbers


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


def _typed(data: NDArray[np.uint8], entry: TensorEntry, path: Path) -> Array:
    dtype = numpy_dtype(entry.dtype)
    try:
        return data if dtype is None else data.view(dtype).reshape(entry.shape)
    except ValueError as error:
        raise _no_array(error, path, entry.name) from None


def _no_array(error: ValueError, path: Path, tensor: str) -> RequestError:
    """A tensor of 65 dimensions, or of 2**62 rows of no elements, is sound, but there is no such array."""
    return RequestError(f"numpy has no array of this shape: {error}", path=path, tensor=tensor)


def _seen(base: Array, view: TensorView, path: Path) -> Array:
    """Return what a view of a PyTorch file sees of its tensor's memory; a dtype that numpy lacks gives flat bytes."""
    dtype = numpy_dtype(view.dtype)
    count = reach_count(view.shape, view.stride)
    reach_bytes = view.offset_bytes + count * (dtype.itemsize if dtype else 0)
    # The manifest was held to that when it was read, but the tensor may be that of another layer, or partition.
    if reach_bytes > base.nbytes:
        raise IntegrityError(
            "view does not lie in its tensor",
            path=path,
            tensor=view.name,
            expected=f"at most {base.nbytes:,} bytes",
            found=reach_bytes,
        )
    data = base.reshape(-1).view(np.uint8)[view.offset_bytes :]
    if dtype is None:
        return data
    items = data[: count * dtype.itemsize]
    if view.offset_bytes % dtype.itemsize:
        items = items.copy()
    # The constructor checks that every element lies within; as_strided cannot describe all dtypes of ml_dtypes.
    strides = tuple(step * dtype.itemsize for step in view.stride)
    try:
        shown: Array = np.ndarray(view.shape, dtype, items, strides=strides)
    except ValueError as error:
        raise _no_array(error, path, view.name) from None
    if 0 in view.stride:
        shown.flags.writeable = False  # its elements are one
    return shown
