"""`PartitionSet`: the tensors of all partitions that are in a directory, those in slices joined."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmsplit.checkpoint import TensorView
from mmsplit.errors import MissingPartitionError, RequestError
from mmsplit.loading.arrays import Array, seen, typed
from mmsplit.loading.partition import Partition
from mmsplit.sidecar.set_manifest import SetManifest
from mmsplit.sidecar.set_reader import missing_partitions, open_partition_of_set
from mmsplit.sidecar.slices import whole_of
from mmsplit.workers import thread_count


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
        return typed(data, whole, self.path)

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
            return array if view is None else seen(array, view, self.path)
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
