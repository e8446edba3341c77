"""Finding chunks by source bytes: law against a list of every byte."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mmsplit.checkpoint import ShardRange, SourcePlace
from mmsplit.repartitioning.chunk_places import ChunkPlaces, StoredPlace
from mmsplit.sidecar.layout import CHUNK_BYTES, chunk_count_of
from mmsplit.sidecar.manifest import LayerEntry, Manifest, TensorEntry

_SIZES = (0, 1, 7, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 5)


def _tensor(name: str, start: int, size: int, first_chunk: int, also: tuple[SourcePlace, ...] = ()) -> TensorEntry:
    count = chunk_count_of(size)
    return TensorEntry(
        name, "U8", (size,), size, size, "0" * 16, first_chunk, count, "s", start, start + size, also=also
    )


def _manifest(part_id: int, tensors: list[TensorEntry], alias: str | None = None) -> Manifest:
    layer = LayerEntry("layer", "block", None, None, 0, 0, 0, tuple(tensors), alias, 0 if alias else None, True)
    return Manifest(part_id, 2, "m", None, "", "", f"partition_{part_id}.bin", 0, 0, "", 0, (layer,))


@given(
    sizes=st.lists(st.sampled_from(_SIZES), min_size=1, max_size=5),
    gaps=st.lists(st.sampled_from([0, 3]), min_size=6, max_size=6),
    data=st.data(),
)
@settings(max_examples=200, deadline=None, database=None)
def test_every_byte_is_found_where_it_is(sizes: list[int], gaps: list[int], data: st.DataObject) -> None:
    """`covering` is a list of whole chunks, in order; `chunk_of` finds exactly those."""
    tensors, position, chunk = [], gaps[0], 0
    for number, size in enumerate(sizes):
        tensors.append(_tensor(f"t{number}", position, size, chunk))
        position, chunk = position + size + gaps[number + 1], chunk + chunk_count_of(size)
    places = ChunkPlaces([_manifest(0, tensors)], [0])
    every = [
        StoredPlace(0, t.first_chunk + k, t.source_start + k * CHUNK_BYTES,
                    min(t.source_start + (k + 1) * CHUNK_BYTES, t.source_stop), t.name)
        for t in tensors for k in range(t.chunk_count)
    ]  # fmt: skip
    assert list(places.covering("s", 0, position)) == every
    start = data.draw(st.integers(0, position))
    stop = data.draw(st.integers(start, position))
    assert list(places.covering("s", start, stop)) == [
        p for p in every if p.start < stop and start < p.stop and start < stop
    ]
    for place in every:
        assert places.chunk_of(ShardRange("s", place.start, place.stop), "U8") == place
        assert places.chunk_of(ShardRange("s", place.start, place.stop), "I8") is None
        assert places.chunk_of(ShardRange("s", place.start + 1, place.stop), "U8") is None
        assert places.chunk_of(ShardRange("s", place.start, place.stop + 1), "U8") is None
    assert places.ranges("other") == []
    assert places.chunk_of(ShardRange("other", 0, 1), "U8") is None


def test_a_copy_that_is_there_comes_before_an_original_that_is_not() -> None:
    """And the original before the copy where both are."""
    original, copy = _manifest(0, [_tensor("t", 8, 10, 3)]), _manifest(1, [_tensor("t", 8, 10, 5)], alias="head")
    wanted = ShardRange("s", 8, 18)
    for there, expected in (((0, 1), (0, 3)), ((1,), (1, 5)), ((0,), (0, 3)), ((), (0, 3))):
        place = ChunkPlaces([original, copy], there).chunk_of(wanted, "U8")
        assert place is not None
        assert (place.part_id, place.chunk) == expected


def test_equal_bytes_are_found_at_each_of_their_places() -> None:
    """They are stored once."""
    stored = _tensor("t", 8, 10, 3, (SourcePlace("u", "s", 30, 40), SourcePlace("v", "z", 0, 10)))
    places = ChunkPlaces([_manifest(0, [stored])], [0])
    assert places.ranges("s") == [(8, 18), (30, 40)]
    for wanted in (ShardRange("s", 30, 40), ShardRange("z", 0, 10)):
        place = places.chunk_of(wanted, "U8")
        assert place is not None
        assert (place.part_id, place.chunk) == (0, 3)
