"""A directory of partitions that were made one at a time, so that there is no set manifest yet."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mmsplit.errors import MmsplitError
from mmsplit.regular_files import read_regular
from mmsplit.sidecar.manifest import Manifest, manifest_name, parse_manifest
from mmsplit.sidecar.output_files import PARTIAL_SUFFIX
from mmsplit.sidecar.part_ids import part_ids_in
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME


class SinglePartitions(NamedTuple):
    """Partitions `part_ids` of the `num_parts` of one split."""

    part_ids: tuple[int, ...]
    num_parts: int


def find_single_partitions(root: Path) -> SinglePartitions | str:
    """Return the partitions in `root`, which has no set manifest; or, as text, what is wrong about that.

    Some partitions of a split, but not all, need none: `split --only` writes it with the last one.
    """
    missing = "set manifest is missing"
    if (root / f"{SET_MANIFEST_NAME}{PARTIAL_SUFFIX}").exists():
        return f"{missing}: a pull into this directory is not finished"
    part_ids = part_ids_in(root)
    found = (_read(root / manifest_name(part_id)) for part_id in part_ids)
    manifests = [manifest for manifest in found if manifest is not None]
    if not manifests:
        return missing
    if len({(each.num_parts, each.plan_digest, each.source_digest) for each in manifests}) > 1:
        return f"{missing}, and the partitions here are of different splits"
    if set(part_ids) >= set(range(manifests[0].num_parts)):
        return missing
    return SinglePartitions(part_ids, manifests[0].num_parts)


def _read(path: Path) -> Manifest | None:
    """Parse a manifest; None for one that is damaged, which whoever opens the partition says."""
    try:
        return parse_manifest(read_regular(path), str(path))
    except (OSError, MmsplitError):
        return None
