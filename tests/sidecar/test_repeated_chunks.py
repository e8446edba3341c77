"""Which chunks are copies of others is known from the plan alone."""

from __future__ import annotations

from mmsplit.checkpoint import TensorInfo
from mmsplit.planning import PlannedLayer, PlannedPartition, iter_stored
from mmsplit.sidecar.layout import CHUNK_BYTES, iter_slots
from mmsplit.sidecar.repeated_chunks import ChunkPlace, RepeatedChunks


def _tensor(name: str, start: int, size_bytes: int, *, shard: str = "s", dtype: str = "U8") -> TensorInfo:
    return TensorInfo(name, dtype, (size_bytes,), shard, start, start + size_bytes, size_bytes)


def _partition(part_id: int, *tensors: TensorInfo, stored: bool = True) -> PlannedPartition:
    """One layer per tensor."""
    layers = (PlannedLayer(f"layer{k}", "block", None, None, (t,), stored=stored) for k, t in enumerate(tensors))
    return PlannedPartition(part_id, tuple(layers))


def _originals(*partitions: PlannedPartition) -> dict[tuple[int, int], ChunkPlace]:
    """Every chunk that has an original, by partition and number in it."""
    repeated = RepeatedChunks(partitions)
    found = {}
    for part in partitions:
        chunks = (chunk for slot in iter_slots(iter_stored(part)) for chunk in slot.chunks)
        for number, chunk in enumerate(chunks):
            place = repeated.original_of(part.part_id, chunk)
            if place is not None:
                found[part.part_id, number] = place
    return found


_BIG = 2 * CHUNK_BYTES + 5
_A, _EMPTY, _TIED, _B = _tensor("a", 0, 9), _tensor("e", 9, 0), _tensor("t", 9, _BIG), _tensor("b", 9 + _BIG, 7)


def test_each_chunk_of_a_copy_has_the_chunk_of_the_original() -> None:
    """Chunk for chunk, whatever stands before them in either partition; what is stored once has none."""
    found = _originals(_partition(0, _A, _EMPTY, _TIED), _partition(1, _B), _partition(2, _EMPTY, _TIED))
    assert found == {(2, 0): ChunkPlace(0, 1), (2, 1): ChunkPlace(0, 2), (2, 2): ChunkPlace(0, 3)}


def test_the_first_one_is_the_original_of_all() -> None:
    """A third copy is taken from the first, not from the second; the order given counts, not the part_id."""
    found = _originals(_partition(2, _B), _partition(0, _A, _B), _partition(1, _B))
    assert found == {(0, 1): ChunkPlace(2, 0), (1, 0): ChunkPlace(2, 0)}


def test_a_reference_without_bytes_is_neither_copy_nor_original() -> None:
    """A tied layer that only refers to another partition stores nothing."""
    assert _originals(_partition(0, _A, stored=False), _partition(1, _A), _partition(2, _A, stored=False)) == {}


def test_other_bytes_and_other_dtypes_are_no_copies() -> None:
    """Shard, range and dtype must be the same: the dtype decides how a chunk is encoded."""
    others = (
        _tensor("a", 0, 9, shard="r"),
        _tensor("a", 1, 9),
        _tensor("a", 0, 8),
        _tensor("a", 0, 9, dtype="I8"),
    )
    for other in others:
        assert _originals(_partition(0, _A), _partition(1, other)) == {}
    assert _originals(_partition(0, _A), _partition(1, _A)) == {(1, 0): ChunkPlace(0, 0)}


def test_no_partition_takes_from_itself() -> None:
    """Its own chunks may not be written yet when they are asked for: waiting for them could last for ever."""
    assert _originals(_partition(0, _A, _A)) == {}
