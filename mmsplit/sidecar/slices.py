"""Tensors of which several partitions hold some rows each, put together again.  Pure."""

from __future__ import annotations

from collections.abc import Sequence

from mmsplit.sidecar.manifest import TensorEntry


def whole_of(slices: Sequence[TensorEntry]) -> TensorEntry | None:
    """Return the entry of the tensor whose rows these slices are, in order; None if they are not all of them.

    It has no chunks and no checksum: those are its slices'.
    """
    first, row = slices[0], 0
    for entry in slices:
        if entry.rows is None or first.rows is None or entry.rows.shape != first.rows.shape or entry.rows.start != row:
            return None
        row = entry.rows.stop
    if first.rows is None or row != first.rows.shape[0]:
        return None
    return first._replace(
        shape=first.rows.shape,
        params=sum(entry.params for entry in slices),
        size_bytes=sum(entry.size_bytes for entry in slices),
        xxh3=None,
        first_chunk=0,
        chunk_count=0,
        source_stop=slices[-1].source_stop,
        also=tuple(
            place._replace(stop_offset=end.stop_offset) for place, end in zip(first.also, slices[-1].also, strict=True)
        ),
        rows=None,
    )
