"""Equal bytes under two names, such as a head beside the embedding it is tied to: found before a split, stored once.

Headers only say which tensors it may be (`planning.lookalikes`).  Of each of those a few kilobytes are read, and all of
those whose samples are alike; SHA-256 decides.  In nearly every model the samples differ, and nothing more is read.
What is found depends on nothing but the bytes: a split that is resumed, makes a single partition, or comes from the
Hub, finds the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Final

from mmsplit.checkpoint import (
    Checkpoint,
    IoMode,
    Scratch,
    ShardRange,
    SourcePlace,
    TensorInfo,
    TensorView,
    iter_with_read_ahead,
)
from mmsplit.checkpoint.strided import row_major_stride
from mmsplit.planning import checkpoint_layers
from mmsplit.planning.lookalikes import Lookalike, find_lookalikes, is_head_and_embedding, listed
from mmsplit.planning.ties import declares_tie
from mmsplit.workers import ProgressCallback, ProgressCounter

_SAMPLE_BYTES: Final = 4 << 10
_SAMPLES: Final = 4
_PIECE_BYTES: Final = 4 << 20


def fold_equal_tensors(checkpoint: Checkpoint, io: IoMode, progress: ProgressCallback | None = None) -> Checkpoint:
    """Return the checkpoint with each tensor that repeats another one's bytes as a name that sees those bytes.

    The first in forward order keeps the bytes, and has the places of the others in `also`.  Notes say what was found,
    and where config.json says otherwise.  Memory is one piece of 4 MiB; raises what reading raises.
    """
    groups = find_lookalikes(checkpoint_layers(checkpoint)[0])
    same_as: dict[str, str] = {}
    notes: list[str] = []
    for group in groups:
        found = _equal_to_first([item.tensor for item in group], checkpoint, io, progress)
        same_as |= found
        notes += _notes(group, found, declares_tie(checkpoint.config))
    if not same_as:
        return checkpoint.folded(checkpoint.tensors, checkpoint.views, notes) if notes else checkpoint
    return fold(checkpoint, same_as, notes)


def repeated_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what was folded: for each name that repeats a tensor's bytes, that tensor."""
    return {
        place.name: tensor.name
        for tensor in checkpoint.tensors.values()
        for place in tensor.also
        if place.name != tensor.name
    }


def _equal_to_first(
    tensors: Sequence[TensorInfo], checkpoint: Checkpoint, io: IoMode, progress: ProgressCallback | None
) -> dict[str, str]:
    """Return for each tensor that repeats an earlier one's bytes the name of the first that has them."""
    alike: dict[tuple[bytes, ...], list[TensorInfo]] = {}
    for tensor in tensors:
        alike.setdefault(_sample(tensor, checkpoint), []).append(tensor)
    compared = [tensor for group in alike.values() if len(group) > 1 for tensor in group]
    first: dict[bytes, str] = {}
    same_as = {}
    for tensor, digest in zip(compared, _digests(compared, checkpoint, io, progress), strict=True):
        original = first.setdefault(digest, tensor.name)
        if original != tensor.name:
            same_as[tensor.name] = original
    return same_as


def _sample(tensor: TensorInfo, checkpoint: Checkpoint) -> tuple[bytes, ...]:
    """Read a few ranges, spread evenly from the first byte to the last."""
    room = max(0, tensor.size_bytes - _SAMPLE_BYTES)
    starts = {tensor.start_offset + room * number // (_SAMPLES - 1) for number in range(_SAMPLES)}
    with closing(checkpoint.open_shard(tensor.shard, "pread")) as reader:
        return tuple(
            reader.read_many([(start, min(start + _SAMPLE_BYTES, tensor.stop_offset)) for start in sorted(starts)])
        )


def _digests(
    tensors: Sequence[TensorInfo], checkpoint: Checkpoint, io: IoMode, progress: ProgressCallback | None
) -> Iterator[bytes]:
    """Yield the SHA-256 of each tensor's bytes; each byte is read once."""
    if not tensors:
        return
    counter = ProgressCounter("compare", sum(tensor.size_bytes for tensor in tensors), progress)
    scratch = Scratch()
    with checkpoint.open_readers(io) as readers:
        digest = hashlib.sha256()
        for piece, stop in iter_with_read_ahead(_pieces(tensors), readers, lambda job: job[:1]):
            with readers.lend(piece.shard) as reader, reader.borrow(piece.start, piece.stop, scratch) as data:
                digest.update(data)
            counter.add(piece.stop - piece.start)
            if piece.stop == stop:
                yield digest.digest()
                digest = hashlib.sha256()


def _pieces(tensors: Iterable[TensorInfo]) -> Iterator[tuple[ShardRange, int]]:
    """Yield the ranges of tensors, one after the other, each with the end of its tensor."""
    for tensor in tensors:
        for start in range(tensor.start_offset, tensor.stop_offset, _PIECE_BYTES):
            stop = min(start + _PIECE_BYTES, tensor.stop_offset)
            yield ShardRange(tensor.shard, start, stop), tensor.stop_offset


def fold(checkpoint: Checkpoint, same_as: Mapping[str, str], notes: Sequence[str]) -> Checkpoint:
    """Return the checkpoint with each tensor of `same_as` as a view of the one that has the same bytes.

    Views that there were are views of what is left.
    """
    places: dict[str, list[SourcePlace]] = {}
    views = {name: view._replace(base=same_as.get(view.base, view.base)) for name, view in checkpoint.views.items()}
    for name, original in same_as.items():
        tensor = checkpoint.tensors[name]
        place = SourcePlace(name, tensor.shard, tensor.start_offset, tensor.stop_offset)
        places.setdefault(original, []).append(place)
        stride = row_major_stride(tensor.shape)
        views[name] = TensorView(name, original, tensor.dtype, tensor.shape, stride, 0)
    tensors = {
        name: tensor._replace(also=(*tensor.also, *places.get(name, ())))
        for name, tensor in checkpoint.tensors.items()
        if name not in same_as
    }
    return checkpoint.folded(tensors, views, notes)


def _notes(group: Sequence[Lookalike], same_as: Mapping[str, str], declared: bool | None) -> list[str]:
    notes = []
    for original in dict.fromkeys(same_as.values()):
        repeats = [name for name, first in same_as.items() if first == original]
        held = "holds" if len(repeats) == 1 else "hold"
        note = f"{listed(repeats)} {held} the same bytes as {original}: stored once"
        if declared is False and is_head_and_embedding(
            item for item in group if item.tensor.name in (original, *repeats)
        ):
            note += ", though config.json says tie_word_embeddings is false"
        notes.append(note)
    left = [item for item in group if item.tensor.name not in same_as]
    if declared is True and is_head_and_embedding(left):
        names = listed([item.tensor.name for item in left])
        notes.append(f"config.json says the head is tied, but {names} hold different bytes; all are kept")
    return notes
