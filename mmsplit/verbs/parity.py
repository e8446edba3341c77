"""`parity`: a small file beside each payload, from which a few lost blocks of it can be made again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmsplit.codec.erasure import require_erasure_library
from mmsplit.errors import FormatError, RequestError
from mmsplit.sidecar.manifest import payload_name
from mmsplit.sidecar.output_directory import OutputDirectory
from mmsplit.sidecar.parity_layout import DEFAULT_PERCENT, parity_name, percent_hundredths
from mmsplit.sidecar.parity_writer import ensure_parity, parity_counter
from mmsplit.sidecar.part_ids import part_ids_in
from mmsplit.sidecar.set_reader import resolve_set_path
from mmsplit.workers import ProgressCallback, thread_count

_MANIFEST = re.compile(r"^partition_(\d+)\.json$", re.ASCII)


class ParityEntry(NamedTuple):
    """The parity file of one partition.

    One stretch of up to `longest_loss_bytes`, wherever in the payload it lies, can be made again, or any
    `parity_count` blocks of `block_bytes`.  `is_new` says that it was made now, not found.
    """

    part_id: int
    file: str
    payload_bytes: int
    parity_bytes: int
    block_bytes: int
    parity_count: int
    longest_loss_bytes: int
    is_new: bool


class ParityResult(NamedTuple):
    """The parity files that are there now, of the partitions that were asked for."""

    path: Path
    percent: float
    partitions: tuple[ParityEntry, ...]

    def as_json(self) -> dict[str, object]:
        """Return what `parity --json` shows."""
        return {
            "path": str(self.path),
            "percent": self.percent,
            "partitions": [entry._asdict() for entry in self.partitions],
        }


def parity(
    path: str | Path,
    percent: float = DEFAULT_PERCENT,
    *,
    only: Sequence[int] | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> ParityResult:
    """Make parity files for a partition set (its directory) or one partition: `percent` of each payload, 0.5 to 50.

    `repair` uses them without being told.  Each payload is verified before its parity is made.  A parity file that is
    there stays if it is sound, of this payload and of this percentage, and is replaced if not.  `only` restricts that
    to some partitions.  Interrupted, no half of a parity file has its name; the same call goes on.

    Raises `FormatError` where there is no partition, `IntegrityError` for a damaged one, `OutputError`,
    `RequestError`, and `MissingExtraError` where the extra "parity" is not installed.
    """
    percent_hundredths(percent)
    require_erasure_library()
    root, one = resolve_set_path(Path(path))
    part_ids = _part_ids(root, one, only)
    entries = []
    with OutputDirectory(root):
        counter = parity_counter((root / payload_name(part_id) for part_id in part_ids), progress)
        for part_id in part_ids:
            manifest_path = root / f"partition_{part_id}.json"
            layout, is_new = ensure_parity(manifest_path, percent, thread_count(threads), counter)
            entries.append(
                ParityEntry(
                    part_id,
                    parity_name(part_id),
                    layout.payload_bytes,
                    layout.file_bytes,
                    layout.block_bytes,
                    layout.parity_count,
                    layout.longest_loss_bytes,
                    is_new,
                )
            )
    return ParityResult(root, percent, tuple(entries))


def _part_ids(root: Path, one: Path | None, only: Sequence[int] | None) -> tuple[int, ...]:
    match = None if one is None else _MANIFEST.match(one.name)
    there = part_ids_in(root, [".json"]) if one is None else (int(match[1]),) if match else ()
    if not there:
        raise FormatError(
            "no partition here",
            path=root if one is None else one,
            hint="Give the directory of a partition set, or one partition_K.json.",
        )
    missing = sorted(set(only or ()) - set(there))
    if missing:
        raise RequestError(
            f"no partition {missing[0]!r} here", path=root, hint=f"Here are {', '.join(map(str, there))}."
        )
    return there if only is None else tuple(sorted(set(only)))
