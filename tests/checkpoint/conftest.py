"""What the tests of this room share: a writer of small shards."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

WriteShard = Callable[..., Path]


@pytest.fixture
def write_shard() -> WriteShard:
    """Write a shard of U8 tensors: name -> bytes."""

    def write(path: Path, tensors: Mapping[str, bytes]) -> Path:
        header, position = {}, 0
        for name, data in tensors.items():
            header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [position, position + len(data)]}
            position += len(data)
        text = json.dumps(header).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))
        return path

    return write
