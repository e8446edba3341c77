"""Chunks and slots: functions of the raw lengths alone."""

from __future__ import annotations

from itertools import groupby, pairwise
from pathlib import Path

import pytest
from checkpoints import MIB, Weight, llama_weights, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsplit.checkpoint import TensorInfo
from mmsplit.planning import PlannedLayer
from mmsplit.sidecar.layout import (
    CHUNK_ALIGNMENT,
    CHUNK_BYTES,
    SLOT_ALIGNMENT,
    SLOT_BYTES,
    Slot,
    aligned,
    chunk_count_of,
    iter_slots,
    largest_payload_bytes,
)
from mmsplit.sidecar.manifest import Manifest
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.verbs.split import split

_sizes = st.one_of(
    st.integers(0, 300),
    st.integers(0, 3 * CHUNK_BYTES),
    st.sampled_from([CHUNK_BYTES - 64, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES]),
)
_layers = st.lists(st.lists(_sizes, max_size=5), max_size=5)

Stored = list[tuple[PlannedLayer, TensorInfo]]


def _stored(layers: list[list[int]], prefix: str = "layer") -> Stored:
    stored = []
    for number, sizes in enumerate(layers):
        tensors = tuple(TensorInfo(f"{number}.{k}", "U8", (n,), "s", 0, n, n) for k, n in enumerate(sizes))
        layer = PlannedLayer(f"{prefix}{number}", "block", None, None, tensors)
        stored += [(layer, tensor) for tensor in tensors]
    return stored


@given(_layers)
@settings(max_examples=300, deadline=None, database=None)
def test_slots_cover_every_byte_once_in_order(layers: list[list[int]]) -> None:
    """Chunk after chunk, slot after slot, each tensor from its first byte to its last."""
    stored = _stored(layers)
    slots = list(iter_slots(stored))
    chunks = [chunk for slot in slots for chunk in slot.chunks]
    assert [slot.number for slot in slots] == list(range(len(slots)))
    assert [slot.first_chunk for slot in slots] == [
        sum(len(slot.chunks) for slot in slots[:k]) for k in range(len(slots))
    ]
    covered = [
        (index, start, min(CHUNK_BYTES, tensor.size_bytes - start))
        for index, (_, tensor) in enumerate(stored)
        for start in range(0, tensor.size_bytes, CHUNK_BYTES)
    ]
    assert [(chunk.tensor_index, chunk.start, chunk.raw_bytes) for chunk in chunks] == covered
    assert len(chunks) == sum(chunk_count_of(tensor.size_bytes) for _, tensor in stored)


@given(_layers)
@settings(max_examples=300, deadline=None, database=None)
def test_slots_are_bounded_and_never_cross_layers(layers: list[list[int]]) -> None:
    """A slot is of one layer and fits its buffer even if nothing shrinks; no slot ends before it must."""
    stored = _stored(layers)

    def end_of(slot: Slot) -> int:
        position = 0
        for chunk in slot.chunks:
            position = aligned(position, CHUNK_ALIGNMENT) + chunk.raw_bytes
        return position

    slots = list(iter_slots(stored))
    for slot in slots:
        assert len({stored[chunk.tensor_index][0].name for chunk in slot.chunks}) == 1
        assert 0 < end_of(slot) <= SLOT_BYTES
        assert slot.raw_bytes == sum(chunk.raw_bytes for chunk in slot.chunks)
    for slot, following in pairwise(slots):
        same_layer = stored[slot.chunks[-1].tensor_index][0].name == stored[following.chunks[0].tensor_index][0].name
        assert not same_layer or aligned(end_of(slot), CHUNK_ALIGNMENT) + following.chunks[0].raw_bytes > SLOT_BYTES


@given(_layers, st.integers(0, 4))
@settings(max_examples=200, deadline=None, database=None)
def test_a_layers_slots_do_not_depend_on_its_neighbours(layers: list[list[int]], start: int) -> None:
    """A layer is cut in the same way alone as among others: that is what makes it movable."""

    def shape(stored: Stored) -> dict[str, list[list[tuple[str, int, int]]]]:
        slots = [
            (stored[slot.chunks[0].tensor_index][0].name, [(c.tensor.name, c.start, c.raw_bytes) for c in slot.chunks])
            for slot in iter_slots(stored)
        ]
        return {name: [chunks for _, chunks in group] for name, group in groupby(slots, key=lambda item: item[0])}

    stored = _stored(layers)
    apart = [item for item in stored if int(item[0].name[5:]) >= start]
    whole = shape(stored)
    assert shape(apart) == {name: slots for name, slots in whole.items() if int(name[5:]) >= start}


@pytest.mark.parametrize("codec", ["planes", "raw"])
def test_a_layers_bytes_are_the_same_in_any_set(tmp_path: Path, codec: str) -> None:
    """Split into 1, 2 or 5 partitions, a layer's range of the payload holds the same bytes."""
    weights = [*llama_weights(5), Weight("model.layers.2.big", "BF16", (5 * MIB // 2,), 40)]
    source = write_checkpoint(tmp_path / "model", [weights], pad=1)
    seen: dict[str, bytes] = {}
    for num_parts in (1, 2, 5):
        out = tmp_path / str(num_parts)
        split(source, out, num_parts, codec=codec, tied="colocate")
        for part_id in range(num_parts):
            payload = (out / f"partition_{part_id}.bin").read_bytes()
            for layer in _manifest(out, part_id).layers:
                assert layer.start % SLOT_ALIGNMENT == layer.stop % SLOT_ALIGNMENT == 0
                assert (
                    seen.setdefault(layer.name, payload[layer.start : layer.stop]) == payload[layer.start : layer.stop]
                )
    assert len(seen) > 6


def _manifest(out: Path, part_id: int) -> Manifest:
    with open_partition_files(out / f"partition_{part_id}.json") as partition:
        return partition.manifest


def test_the_bound_holds_where_nothing_shrinks(tmp_path: Path) -> None:
    """`largest_payload_bytes` is what the space check relies on."""
    weights = [w._replace(noise=256) for w in llama_weights(6)] + [Weight("x.big", "U8", (9 * MIB,), 256)]
    source = write_checkpoint(tmp_path / "model", [weights])
    split(source, tmp_path / "set", 1, codec="raw")
    with open_partition_files(tmp_path / "set" / "partition_0.json") as partition:
        manifest, size = partition.manifest, partition.reader.size_bytes
    slots = len({int(start) for start in partition.index["stored_offset"] // SLOT_ALIGNMENT})
    assert size - 8192 <= largest_payload_bytes(manifest.total_bytes, manifest.chunk_count, slots)


@pytest.mark.parametrize(("position", "alignment", "expected"), [(0, 64, 0), (1, 64, 64), (64, 64, 64), (65, 64, 128)])
def test_aligned(position: int, alignment: int, expected: int) -> None:
    """Rounded up, never down."""
    assert aligned(position, alignment) == expected
