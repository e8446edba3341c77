"""Whether a finished set is of these weights, or only of a model with the same headers."""

from __future__ import annotations

from pathlib import Path

import xxhash

from mmsplit.checkpoint import Checkpoint, Scratch
from mmsplit.errors import OutputExistsError
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.set_manifest import SetManifest
from mmsplit.sidecar.set_reader import open_partition_of_set


def require_same_weights(checkpoint: Checkpoint, root: Path, manifest: SetManifest) -> None:
    """Compare a chunk of each layer with the source; raises `OutputExistsError` where they differ.

    A fine-tune has the same headers as its base model.  To compare all would be to read all; whoever must be sure
    verifies the set against the source.
    """
    scratch = Scratch()
    with checkpoint.open_readers("pread") as readers:
        for entry in manifest.partitions:
            with open_partition_of_set(root, manifest, entry.part_id, "pread") as partition:
                for layer in partition.manifest.layers:
                    tensor = max(layer.tensors, key=lambda tensor: tensor.chunk_count, default=None)
                    if tensor is None or tensor.chunk_count == 0:
                        continue
                    chunk = tensor.first_chunk + tensor.chunk_count // 2
                    record = partition.index[chunk]
                    start = tensor.source_start + (chunk - tensor.first_chunk) * CHUNK_BYTES
                    with (
                        readers.lend(tensor.shard) as reader,
                        reader.borrow(start, start + int(record["raw_bytes"]), scratch) as raw,
                    ):
                        same = xxhash.xxh3_64_intdigest(raw) == int(record["raw_xxh3"])
                    if not same:
                        raise OutputExistsError(
                            "output holds a finished partition set of a source with other weights",
                            path=root,
                            tensor=tensor.name,
                            hint="Choose another directory, or use --force to replace it.",
                        )
