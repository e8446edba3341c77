"""How a partition's tensors become chunks, and chunks slots.  Pure; the numbers are those of FORMAT.md.

Law: the bytes of a layer in a payload are a function of its tensors and the codec alone, not of the partition or
the place they lie in.  So a layer begins on a slot, a slot on a multiple of `SLOT_ALIGNMENT`, and a layer can be
moved to another partition by copying its range (or by sharing its disk blocks).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from mmsplit.checkpoint import TensorInfo
from mmsplit.planning import PlannedLayer

#: Raw bytes per chunk; the last chunk of a tensor may be shorter.  A multiple of every word size.
CHUNK_BYTES: Final = 4 << 20
#: A slot is written at once; it never holds more than this.
SLOT_BYTES: Final = CHUNK_BYTES
#: Slots start on multiples of this many bytes of the payload: a page, and what unbuffered writes demand.
SLOT_ALIGNMENT: Final = 4096
#: Chunks start on multiples of this many bytes, so that a raw tensor can be used where it lies.
CHUNK_ALIGNMENT: Final = 64
#: Length of a chunk's record in the index.
RECORD_BYTES: Final = 72
#: The payload's first slot starts here; before it is the file header.
DATA_START: Final = SLOT_ALIGNMENT


class ChunkSpec(NamedTuple):
    """A piece of a tensor: raw bytes [`start`, `start + raw_bytes`) of it.  `tensor_index` counts in the partition."""

    tensor_index: int
    tensor: TensorInfo
    start: int
    raw_bytes: int


class Slot(NamedTuple):
    """Consecutive chunks of one layer that are written at once.  `first_chunk` counts in the partition."""

    number: int
    first_chunk: int
    chunks: tuple[ChunkSpec, ...]

    @property
    def raw_bytes(self) -> int:
        """Raw length of all chunks."""
        return sum(chunk.raw_bytes for chunk in self.chunks)


def aligned(position: int, alignment: int) -> int:
    """Round up to a multiple of `alignment`."""
    return -(-position // alignment) * alignment


def chunk_count_of(size_bytes: int) -> int:
    """Return how many chunks a tensor of that many raw bytes has; none if it is empty."""
    return -(-size_bytes // CHUNK_BYTES)


def iter_slots(stored: Iterable[tuple[PlannedLayer, TensorInfo]]) -> Iterator[Slot]:
    """Yield the slots of a partition, given what it stores in payload order (`planning.iter_stored`).

    A chunk joins the slot before it if both are of the same layer and the slot, its chunks at full raw length and
    aligned, does not outgrow `SLOT_BYTES`.
    """
    number = first_chunk = position = 0
    waiting: list[ChunkSpec] = []
    layer_name: str | None = None
    for tensor_index, (layer, tensor) in enumerate(stored):
        for start in range(0, tensor.size_bytes, CHUNK_BYTES):
            chunk = ChunkSpec(tensor_index, tensor, start, min(CHUNK_BYTES, tensor.size_bytes - start))
            begin = aligned(position, CHUNK_ALIGNMENT)
            if waiting and (layer.name != layer_name or begin + chunk.raw_bytes > SLOT_BYTES):
                yield Slot(number, first_chunk, tuple(waiting))
                number, first_chunk = number + 1, first_chunk + len(waiting)
                waiting, begin = [], 0
            waiting.append(chunk)
            position, layer_name = begin + chunk.raw_bytes, layer.name
    if waiting:
        yield Slot(number, first_chunk, tuple(waiting))


def largest_payload_bytes(raw_bytes: int, chunk_count: int, slot_count: int) -> int:
    """Upper bound of a payload's size, whatever the codec makes of it (manifest copy left out)."""
    slack = chunk_count * (CHUNK_ALIGNMENT + RECORD_BYTES) + slot_count * SLOT_ALIGNMENT
    return DATA_START + raw_bytes + slack + 2 * SLOT_ALIGNMENT
