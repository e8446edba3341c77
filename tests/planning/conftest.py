"""What the tests of this room share: checkpoints made from a list of names and sizes."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
from mixtures import MakeShaped, open_shapes

from mmsplit.checkpoint import Checkpoint, open_checkpoint

MakeCheckpoint = Callable[..., Checkpoint]


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Open a checkpoint of one shard: name -> number of BF16 elements, and a config.json."""

    def make(tensors: Mapping[str, int], config: object = None) -> Checkpoint:
        header, position = {}, 0
        for name, count in tensors.items():
            header[name] = {"dtype": "BF16", "shape": [count], "data_offsets": [position, position + 2 * count]}
            position += 2 * count
        text = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(position))
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        return open_checkpoint(tmp_path)

    return make


@pytest.fixture
def shaped(tmp_path: Path) -> MakeShaped:
    """Open a checkpoint of one shard: name -> shape, in BF16 unless told, and a config.json."""
    return partial(open_shapes, tmp_path)
