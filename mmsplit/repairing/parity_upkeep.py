"""A partition's parity file after the partition was looked at: one that is damaged or out of date is made again."""

from __future__ import annotations

from pathlib import Path

from mmsplit.errors import FormatError, IntegrityError, MissingExtraError, NoSpaceError
from mmsplit.repairing.ledger import THE_SET, Ledger, Mended
from mmsplit.repairing.partition_repair import RepairOptions
from mmsplit.sidecar.manifest import manifest_name
from mmsplit.sidecar.parity_file import ParityFile, find_parity_faults
from mmsplit.sidecar.parity_layout import parity_name
from mmsplit.sidecar.parity_writer import make_parity, manifest_digest
from mmsplit.sidecar.partition_reader import Fault


def mend_parity(root: Path, part_id: int, ledger: Ledger, options: RepairOptions) -> None:
    """Make the parity file of a partition again, with the share it had, if there is one and it is not as it should be.

    While something of the partition is still damaged it stays as it is.  Raises `OutputError`.
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
        with ParityFile(path) as parity:
            percent = parity.layout.percent
        if not options.dry_run:
            make_parity(manifest_path, percent, options.threads, options.progress)
        ledger.mend(Mended(str(path), "parity", THE_SET, 0, path.stat().st_size, part_id))
    except (IntegrityError, FormatError, MissingExtraError, NoSpaceError) as error:
        what = f"{faults[0].what}; it cannot be made again: {error.what}; make it with mmsplit parity"
        ledger.leave(Fault(str(path), what, partition=part_id))
