"""A partition's parity file after the partition was looked at: one that is damaged or out of date is made again."""

from __future__ import annotations

from pathlib import Path

from mmsplit.errors import FormatError, IntegrityError, MissingExtraError, NoSpaceError
from mmsplit.repairing.ledger import THE_SET, Ledger, Mended
from mmsplit.repairing.partition_repair import RepairOptions
from mmsplit.sidecar.manifest import manifest_name, payload_name
from mmsplit.sidecar.parity_file import ParityFile, find_parity_faults
from mmsplit.sidecar.parity_layout import DEFAULT_PERCENT, PARITY_SUFFIX, parity_name
from mmsplit.sidecar.parity_writer import make_parity, manifest_digest, parity_counter
from mmsplit.sidecar.partition_reader import Fault


def mend_parity(root: Path, part_id: int, ledger: Ledger, options: RepairOptions) -> None:
    """Make the parity file of a partition again, if there is one and it is not as it should be.

    It gets the share that it had; if it says none, that of another parity file of the set, or the default.  While
    something of the partition is still damaged it stays as it is.  Raises `OutputError`.
    """
    path, manifest_path = root / parity_name(part_id), root / manifest_name(part_id)
    if not path.is_file():
        return
    digest = manifest_digest(manifest_path) if manifest_path.is_file() else None
    faults = find_parity_faults(path, part_id, digest, look=options.check_chunks)
    if not faults:
        return
    if any(fault.partition == part_id for fault in ledger.left()):
        for fault in faults:
            ledger.leave(fault)
        return
    try:
        percent = _percent_of(path) or _percent_of_another(root, path) or DEFAULT_PERCENT
        if not options.dry_run:
            counter = parity_counter((root / payload_name(part_id),), options.progress)
            make_parity(manifest_path, percent, options.threads, counter)
        ledger.mend(Mended(str(path), "parity", THE_SET, 0, path.stat().st_size, part_id))
    except (IntegrityError, FormatError, MissingExtraError, NoSpaceError) as error:
        reason = "" if error.what == faults[0].what else f": {error.what}"
        what = f"{faults[0].what}; it cannot be made again{reason}; make it with mmsplit parity"
        ledger.leave(Fault(str(path), what, partition=part_id))


def _percent_of(path: Path) -> float | None:
    """Return the share of a parity file, None if it does not say.  Raises `FormatError` for a version not known."""
    try:
        with ParityFile(path) as parity:
            return parity.layout.percent
    except IntegrityError:
        return None


def _percent_of_another(root: Path, path: Path) -> float | None:
    for other in sorted(root.glob(f"partition_*{PARITY_SUFFIX}")):
        try:
            percent = None if other == path else _percent_of(other)
        except FormatError:
            continue
        if percent is not None:
            return percent
    return None
