"""`Partition`: the tensors of one partition, one by one or all at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsplit.checkpoint.file_reader import ReadMode
from mmsplit.codec import RAW
from mmsplit.errors import MissingPartitionError
from mmsplit.exporting.float32 import as_float32
from mmsplit.exporting.parameters_json import ExportedLayer, ExportedPartition
from mmsplit.exporting.tensor import ExportTensor, partition_of
from mmsplit.loading.arrays import Array, seen, typed, writable_bytes
from mmsplit.sidecar.chunk_loader import Chunk, ChunkLoader, iter_chunks
from mmsplit.sidecar.manifest import LayerEntry, TensorEntry
from mmsplit.sidecar.partition_reader import OpenPartition


class PartitionLayer(LayerEntry):
    """A layer's entry that can read itself: beside what the manifest says it has `shape` and `parameters`."""

    _partition: Partition

    def __repr__(self) -> str:
        return f"<PartitionLayer {self.name}: {len(self.tensors)} tensors, {self.total_bytes:,} bytes>"

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
        data = writable_bytes(buffer, entry.size_bytes, name)
        chunks = iter_chunks(entry, data.data, in_place=False)
        self._chunks.load(chunks, "cached", verify=self._verify if verify is None else verify)
        return typed(data, entry, self._files.path)

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
        return base if view is None else seen(base, view, self._files.path)

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
            arrays[entry.name] = typed(data, entry, self._files.path)
        self._chunks.load(chain.from_iterable(chunks), mode, verify=self._verify)
        return arrays


def _float32(array: Array, entry: TensorEntry | ExportTensor) -> NDArray[np.float32]:
    return as_float32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), entry.name, entry.dtype).numbers
