"""The records of this room."""

from __future__ import annotations

from typing import NamedTuple


class TensorInfo(NamedTuple):
    """One tensor in one shard, as its header describes it.

    `start_offset` and `stop_offset` are a half-open byte range of the shard *file* (safetensors' own
    `data_offsets` count from the end of the header instead).  `params` is the number of elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start_offset: int
    stop_offset: int
    params: int

    @property
    def size_bytes(self) -> int:
        """Length of the raw bytes."""
        return self.stop_offset - self.start_offset


class ShardHeader(NamedTuple):
    """What a validated header says.  Bytes [0, `header_bytes`) of the file are length field and header."""

    header_bytes: int
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
