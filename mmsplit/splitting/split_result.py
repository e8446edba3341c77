"""What a split is asked for, and what it made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mmsplit.checkpoint import IoMode
from mmsplit.codec import CodecName
from mmsplit.planning import Plan
from mmsplit.sidecar.disk_forecast import DiskForecast
from mmsplit.sidecar.set_manifest import PartitionEntry, SetManifest


class SplitResult(NamedTuple):
    """What a split made: the entries of the partitions it was to write, and the set manifest if the set is whole.

    `resumed_bytes` of the raw bytes were there already.  Of the source `needed_bytes` were read; over the network
    `moved_bytes` came since it was opened, None for a source on this machine.  Of a run that consumed its source,
    `disk` is what it foretold, and `deleted` are the shards that it deleted.
    """

    path: Path
    plan: Plan
    partitions: tuple[PartitionEntry, ...]
    manifest: SetManifest | None
    resumed_bytes: int
    already_finished: bool
    needed_bytes: int
    moved_bytes: int | None
    disk: DiskForecast | None = None
    deleted: tuple[str, ...] = ()

    @property
    def root_digest(self) -> str | None:
        """The set's root digest; None while partitions are missing."""
        return None if self.manifest is None else self.manifest.root_digest

    @property
    def total_bytes(self) -> int:
        """Raw bytes in these partitions, copies of tied weights included."""
        return sum(entry.total_bytes for entry in self.partitions)

    @property
    def stored_bytes(self) -> int:
        """Encoded bytes in these partitions."""
        return sum(entry.stored_bytes for entry in self.partitions)

    def as_json(self) -> dict[str, object]:
        """Return what `split --json` shows."""
        consumed: dict[str, object] = {}
        if self.disk is not None:
            consumed = {"extra_disk_bytes": self.disk.extra_bytes, "disk": self.disk.as_json()}
            consumed["deleted"] = list(self.deleted)
        return {
            "path": str(self.path),
            "root_digest": self.root_digest,
            "already_finished": self.already_finished,
            "resumed_bytes": self.resumed_bytes,
            "needed_bytes": self.needed_bytes,
            "moved_bytes": self.moved_bytes,
            "total_bytes": self.total_bytes,
            "stored_bytes": self.stored_bytes,
            "partitions": written_json(self.partitions, self.plan),
            "notes": list(self.plan.notes),
            **consumed,
        }


def written_json(entries: Sequence[PartitionEntry], plan: Plan) -> list[dict[str, object]]:
    """Return what `--json` shows of partitions that were written; `node` where the plan was for machines."""
    shown = []
    for entry in entries:
        node = plan.partitions[entry.part_id].node
        shown.append(entry._asdict() | ({} if node is None else {"node": node}))
    return shown


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How to split; see `mmsplit.split`.  `only` are the partitions to write, None for all; `parity` is in percent."""

    codec: CodecName
    threads: int
    io: IoMode
    direct: bool
    source_sha256: bool
    only: tuple[int, ...] | None
    parity: float | None = None
