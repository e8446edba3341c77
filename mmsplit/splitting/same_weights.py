"""Whether a partition is of these weights, or only of a model with the same headers; and of this codec."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import numpy as np
import xxhash

from mmsplit.checkpoint import Checkpoint, Scratch
from mmsplit.codec import PLANES, RAW, ZSTD, CodecName
from mmsplit.errors import OutputExistsError
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.partition_reader import OpenPartition

_CODES: Final = {"raw": {RAW}, "zstd": {RAW, ZSTD}, "planes": {RAW, PLANES}}


def require_same_codec(partition: OpenPartition, codec: CodecName) -> None:
    """Raise `OutputExistsError` if a chunk has a code that `codec` never gives."""
    if not set(np.unique(partition.index["codec"]).tolist()) <= _CODES[codec]:
        raise OutputExistsError(
            "output holds a partition of another codec",
            path=partition.path,
            expected=codec,
            hint="Choose another directory, or split with the codec of the partitions that are there.",
        )


def require_same_weights(checkpoint: Checkpoint, partition: OpenPartition, gone: Collection[str] = ()) -> None:
    """Compare a chunk of each layer with the source; raises `OutputExistsError` where they differ.

    Shards that are `gone` cannot be compared.

    A fine-tune has the same headers as its base model.  To compare all would be to read all; whoever must be sure
    verifies the set against the source.
    """
    scratch = Scratch()
    with checkpoint.open_readers("pread") as readers:
        for layer in partition.manifest.layers:
            tensor = max(layer.tensors, key=lambda tensor: tensor.chunk_count, default=None)
            if tensor is None or tensor.chunk_count == 0 or tensor.shard in gone:
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
                    "output holds a finished partition of a source with other weights",
                    path=partition.path,
                    tensor=tensor.name,
                    hint="Choose another directory, or use --force to replace it.",
                )
