"""`inspect`: what a checkpoint, a partition or a partition set holds; from headers and manifests alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mmsplit.checkpoint import Checkpoint
from mmsplit.checkpoint.weight_files import form_of, index_form, is_partition_file
from mmsplit.planning import PlannedLayer, checkpoint_layers
from mmsplit.remote.source import HubOptions, hub_address_of, open_source
from mmsplit.sidecar.file_names import SET_MANIFEST_NAME, STATE_NAME

if TYPE_CHECKING:
    from mmsplit.sidecar.manifest import Manifest
    from mmsplit.sidecar.set_manifest import SetManifest


class CheckpointInfo(NamedTuple):
    """A checkpoint: its headers, its layers in forward order, what there is to say about them."""

    checkpoint: Checkpoint
    layers: tuple[PlannedLayer, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """Return what `inspect --json` shows."""
        return {
            "model_id": self.checkpoint.model_id,
            "revision": self.checkpoint.revision,
            "shards": len(self.checkpoint.shards),
            "tensors": len(self.checkpoint.tensors),
            "total_params": self.checkpoint.total_params,
            "total_bytes": self.checkpoint.total_bytes,
            "dtypes": bytes_by_dtype((t.dtype, t.size_bytes) for t in self.checkpoint.tensors.values()),
            "layers": [layer.as_json() for layer in self.layers],
            "notes": list(self.notes),
        }


class PartitionInfo(NamedTuple):
    """One partition."""

    path: Path
    manifest: Manifest
    payload_bytes: int

    def as_json(self) -> dict[str, object]:
        """Return what `inspect --json` shows."""
        manifest = self.manifest
        return {
            "part_id": manifest.part_id,
            "num_parts": manifest.num_parts,
            "model_id": manifest.model_id,
            "revision": manifest.revision,
            "tensors": len(manifest.stored_tensors()),
            "total_params": manifest.total_params,
            "total_bytes": manifest.total_bytes,
            "stored_bytes": manifest.stored_bytes,
            "payload_bytes": self.payload_bytes,
            "dtypes": bytes_by_dtype((t.dtype, t.size_bytes) for t in manifest.stored_tensors()),
            "layers": [
                {
                    "name": layer.name,
                    "layer_type": layer.layer_type,
                    "tensors": [tensor.name for tensor in layer.tensors],
                    "total_params": layer.total_params,
                    "total_bytes": layer.total_bytes,
                    "stored_bytes": layer.stored_bytes,
                }
                for layer in manifest.layers
            ],
        }


class SetInfo(NamedTuple):
    """A partition set; `missing` are the ids of partitions whose files are not there."""

    path: Path
    manifest: SetManifest
    missing: tuple[int, ...]

    def as_json(self) -> dict[str, object]:
        """Return what `inspect --json` shows."""
        manifest = self.manifest
        return {
            "num_parts": len(manifest.partitions),
            "model_id": manifest.model_id,
            "revision": manifest.revision,
            "codec": manifest.codec,
            "root_digest": manifest.root_digest,
            "total_bytes": manifest.total_bytes,
            "stored_bytes": manifest.stored_bytes,
            "missing": list(self.missing),
            "partitions": [
                {
                    "part_id": entry.part_id,
                    "total_params": entry.total_params,
                    "total_bytes": entry.total_bytes,
                    "stored_bytes": entry.stored_bytes,
                    "payload_bytes": entry.payload_bytes,
                }
                for entry in manifest.partitions
            ],
            "shards": [
                {"name": shard.name, "bytes": shard.size_bytes, "sha256": shard.sha256} for shard in manifest.shards
            ],
            "files": [entry.name for entry in manifest.files],
        }


def inspect(
    path: str | Path, *, hub: HubOptions | None = None, allow_unknown_dtypes: bool = False
) -> CheckpointInfo | PartitionInfo | SetInfo:
    """Look at a checkpoint, on disk or on the Hub, a partition (`partition_K.json` or `.bin`) or a partition set.

    A directory that holds a set manifest, an unfinished split, or partitions and no weights is taken for a set.
    """
    if hub_address_of(path, hub) is None:
        found = _inspect_partitions(Path(path))
        if found is not None:
            return found
    checkpoint = open_source(path, hub, allow_unknown_dtypes=allow_unknown_dtypes)
    layers, notes = checkpoint_layers(checkpoint)
    return CheckpointInfo(checkpoint, layers, notes)


def _inspect_partitions(path: Path) -> PartitionInfo | SetInfo | None:
    # Imported where there is a set: its readers need numpy, whose import would take a tenth of looking at a checkpoint.
    if (path / SET_MANIFEST_NAME).exists() or path.name == SET_MANIFEST_NAME or (path / STATE_NAME).exists():
        from mmsplit.sidecar.set_reader import missing_partitions, read_set_manifest

        root = path if path.is_dir() else path.parent
        manifest = read_set_manifest(root)
        return SetInfo(root, manifest, missing_partitions(root, manifest))
    if path.name.startswith("partition_") and path.suffix in (".json", ".bin"):
        from mmsplit.sidecar.partition_reader import open_partition_files

        with open_partition_files(path, "pread") as partition:
            return PartitionInfo(partition.path, partition.manifest, partition.reader.size_bytes)
    names = [file.name for file in path.glob("*")]
    has_partitions = any(is_partition_file(name) and name.endswith(".json") for name in names)
    if has_partitions and not any(form_of(name) or index_form(name) for name in names):
        from mmsplit.sidecar.set_reader import read_set_manifest

        read_set_manifest(path)  # says what is missing
    return None


def bytes_by_dtype(tensors: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Add up bytes by dtype, largest first."""
    totals: dict[str, int] = {}
    for dtype, size in tensors:
        totals[dtype] = totals.get(dtype, 0) + size
    return dict(sorted(totals.items(), key=lambda item: -item[1]))
