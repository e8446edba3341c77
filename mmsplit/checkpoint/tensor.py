"""The records of this room."""

from __future__ import annotations

from typing import NamedTuple


class TensorRows(NamedTuple):
    """Rows [`start`, `stop`) along the first dimension of a tensor whose full shape is `shape`."""

    start: int
    stop: int
    shape: tuple[int, ...]


class TensorInfo(NamedTuple):
    """One tensor in one shard, as its header describes it.

    `start_offset` and `stop_offset` are a half-open byte range of the shard *file* (safetensors' own
    `data_offsets` count from the end of the header instead).  `params` is the number of elements.

    `rows` is set by a plan that cuts a tensor: then this is only those rows, and shape, range and params are theirs.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start_offset: int
    stop_offset: int
    params: int
    rows: TensorRows | None = None

    @property
    def size_bytes(self) -> int:
        """Length of the raw bytes."""
        return self.stop_offset - self.start_offset


def slice_rows(tensor: TensorInfo, start: int, stop: int) -> TensorInfo:
    """Return rows [`start`, `stop`) of a whole tensor with at least one row: it lies row by row, so they are one range.

    Rows that are no whole number of bytes have no such range; then the ends are rounded down.
    """
    count = tensor.shape[0]
    return tensor._replace(
        shape=(stop - start, *tensor.shape[1:]),
        start_offset=tensor.start_offset + tensor.size_bytes * start // count,
        stop_offset=tensor.start_offset + tensor.size_bytes * stop // count,
        params=tensor.params // count * (stop - start),
        rows=TensorRows(start, stop, tensor.shape),
    )


class ShardHeader(NamedTuple):
    """What a validated header says.  Bytes [0, `header_bytes`) of the file are length field and header."""

    header_bytes: int
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
