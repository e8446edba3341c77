"""A safetensors header for a file of our own making.  Pure.  Existing headers are kept verbatim, never written anew."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from mmsplit.checkpoint.header import LENGTH_BYTES


def format_header(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return length field and header for tensors (name, dtype, shape, size in bytes) that lie in this order.

    `metadata` goes into `__metadata__` beside the format, which loaders ask for.

    Padded with spaces so that the data starts on a multiple of 8 bytes, as the reference implementation does.
    """
    header: dict[str, object] = {"__metadata__": {**(metadata or {}), "format": "pt"}}
    position = 0
    for name, dtype, shape, size_bytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size_bytes]}
        position += size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
