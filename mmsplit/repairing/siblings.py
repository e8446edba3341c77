"""The other partitions of the same set: where a tied weight is stored twice, each copy repairs the other."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TypeAlias

from mmsplit.checkpoint import TensorRows
from mmsplit.errors import FormatError, IntegrityError, MmsplitError
from mmsplit.regular_files import read_regular
from mmsplit.remote.remote_file import GoOn
from mmsplit.repairing.ledger import THE_SET
from mmsplit.repairing.sources import Encoding
from mmsplit.sidecar.manifest import TensorEntry, manifest_name, parse_manifest
from mmsplit.sidecar.partition_reader import OpenPartition, open_partition_files

#: A tensor's name, and which of its rows: two slices have the name in common, but no row.
_Stored: TypeAlias = tuple[str, TensorRows | None]


class Siblings:
    """Gives chunks of the tensors that other partitions in `root` store, too.  Opened when they are asked for."""

    location = THE_SET
    is_remote = False

    def __init__(self, root: Path, part_ids: tuple[int, ...]) -> None:
        self._root = root
        self._part_ids = part_ids
        self._lock = threading.Lock()
        self._holders: dict[_Stored, list[int]] | None = None
        self._open: dict[int, OpenPartition] = {}

    def may_have(self, partition: OpenPartition, chunk: int) -> bool:
        """Whether another partition stores the chunk's tensor."""
        tensor = partition.tensors[int(partition.index[chunk]["tensor"])]
        return bool(self._others(tensor, partition.manifest.part_id))

    def stored_chunk(self, partition: OpenPartition, chunk: int, encoding: Encoding, go_on: GoOn) -> memoryview:
        """Read the chunk from the first partition that has it."""
        go_on()
        tensor = partition.tensors[int(partition.index[chunk]["tensor"])]
        reason = IntegrityError("no other partition has the tensor")
        for part_id in self._others(tensor, partition.manifest.part_id):
            try:
                other = self._partition(part_id)
                theirs = next(each for each in other.tensors if each.name == tensor.name)
                start, stop, _ = other.encoded(theirs.first_chunk + chunk - tensor.first_chunk)
                with other.reader.borrow(start, stop, encoding.scratch) as view:
                    return memoryview(bytes(view))
            except (MmsplitError, OSError, IndexError) as error:
                reason = IntegrityError(f"partition {part_id}: {error}")
        raise reason

    def close(self) -> None:
        """Close the partitions."""
        for partition in self._open.values():
            partition.close()
        self._open.clear()

    def _others(self, tensor: TensorEntry, part_id: int) -> list[int]:
        with self._lock:
            if self._holders is None:
                self._holders = self._find_holders()
            return [holder for holder in self._holders.get(_what(tensor), ()) if holder != part_id]

    def _find_holders(self) -> dict[_Stored, list[int]]:
        holders: dict[_Stored, list[int]] = {}
        for part_id in self._part_ids:
            path = self._root / manifest_name(part_id)
            try:
                manifest = parse_manifest(read_regular(path), str(path))
            except (OSError, IntegrityError, FormatError):
                continue
            for tensor in manifest.stored_tensors():
                holders.setdefault(_what(tensor), []).append(part_id)
        return {what: parts for what, parts in holders.items() if len(parts) > 1}

    def _partition(self, part_id: int) -> OpenPartition:
        with self._lock:
            if part_id not in self._open:
                self._open[part_id] = open_partition_files(self._root / manifest_name(part_id), "pread")
            return self._open[part_id]


def _what(tensor: TensorEntry) -> _Stored:
    return tensor.name, tensor.rows
