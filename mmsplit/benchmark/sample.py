"""A piece of a checkpoint that is a checkpoint itself: whole layers, up to a size."""

from __future__ import annotations

import json
from pathlib import Path

from mmsplit.checkpoint import Checkpoint, Scratch, TensorInfo
from mmsplit.checkpoint.header_writer import format_header
from mmsplit.planning import checkpoint_layers
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.output_files import output_errors


def choose_tensors(checkpoint: Checkpoint, limit_bytes: int) -> list[TensorInfo]:
    """Return tensors of layers from the middle of the model outwards, until the next layer would exceed the limit.

    The middle holds the blocks, which are what most of a model is made of.  At least two layers are taken, so that
    there is something to split.
    """
    layers, _ = checkpoint_layers(checkpoint)
    middle = len(layers) // 2
    chosen: list[TensorInfo] = []
    total = 0
    for number, position in enumerate(sorted(range(len(layers)), key=lambda i: (abs(i - middle), i))):
        layer = layers[position]
        if number >= 2 and total + layer.total_bytes > limit_bytes:
            break
        chosen += layer.tensors
        total += layer.total_bytes
    return chosen


def write_sample(checkpoint: Checkpoint, tensors: list[TensorInfo], directory: Path) -> Path:
    """Write the tensors as a one-file checkpoint into `directory` and return the path of the file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(checkpoint.config or {}))
    path = directory / "model.safetensors"
    scratch = Scratch()
    with output_errors(path), path.open("wb") as file, checkpoint.open_readers() as readers:
        file.write(format_header((t.name, t.dtype, t.shape, t.size_bytes) for t in tensors))
        for tensor in tensors:
            with readers.lend(tensor.shard) as reader:
                for start in range(tensor.start_offset, tensor.stop_offset, CHUNK_BYTES):
                    stop = min(start + CHUNK_BYTES, tensor.stop_offset)
                    with reader.borrow(start, stop, scratch) as view:
                        file.write(view)
    return path
