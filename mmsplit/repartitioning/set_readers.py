"""Source shards read from a set: kept bytes from its manifest, tensors decoded from their chunks.

So whoever reads checkpoints, the parsers of headers or an encoder, can read one that is there as a set only.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import xxhash

from mmsplit.checkpoint import Scratch, ShardRange, ShardReaders
from mmsplit.checkpoint.cover import gaps_between
from mmsplit.codec import ChunkDecoder, Encoded
from mmsplit.digests import chunk_digest
from mmsplit.errors import IntegrityError, SourceChangedError
from mmsplit.repartitioning.chunk_places import StoredPlace
from mmsplit.repartitioning.stored_set import StoredSet
from mmsplit.sidecar.chunk_copier import StoredChunk
from mmsplit.sidecar.set_manifest import ShardEntry

#: Payloads go by such names among the shards; no shard has a `/` in its name.
_PAYLOAD: Final = "payload/"
_DAMAGE_HINT: Final = "See all damage with mmsplit verify; mend it with mmsplit repair."


class SetReaders:
    """Lends shards by name, as `ShardReaders` do, and chunks as they are stored."""

    def __init__(self, stored: StoredSet, payloads: ShardReaders) -> None:
        """`payloads` go with this."""
        self._stored = stored
        self._payloads = payloads
        self._lock = threading.Lock()
        self._shards: dict[str, SetShardReader] = {}

    @property
    def read_ahead_bytes(self) -> int:
        """As far as the payloads'."""
        return self._payloads.read_ahead_bytes

    def range_of(self, place: StoredPlace) -> ShardRange:
        """Return what to announce for `borrow_chunk`."""
        record = self._stored.index(place.part_id)[place.chunk]
        start = int(record["stored_offset"])
        return ShardRange(_PAYLOAD + self._payload_of(place.part_id), start, start + int(record["stored_bytes"]))

    def announce(self, shard: str, start: int, stop: int) -> None:
        """Pass on what is said of payloads; what must be decoded is read when it is borrowed."""
        if shard.startswith(_PAYLOAD):
            self._payloads.announce(shard.removeprefix(_PAYLOAD), start, stop)

    @contextmanager
    def lend(self, shard: str) -> Iterator[SetShardReader]:
        """Lend the reader of a shard until the block ends."""
        with self._lock:
            if shard not in self._shards:
                self._shards[shard] = SetShardReader(self._stored, self, shard)
            reader = self._shards[shard]
        yield reader

    @contextmanager
    def borrow_chunk(self, place: StoredPlace, scratch: Scratch) -> Iterator[StoredChunk]:
        """Lend a chunk as it is stored, compared with its checksum; `IntegrityError` says where it is damaged."""
        record = self._stored.index(place.part_id)[place.chunk]
        start, stop = int(record["stored_offset"]), int(record["stored_offset"]) + int(record["stored_bytes"])
        with (
            self._payloads.lend(self._payload_of(place.part_id)) as payload,
            payload.borrow(start, stop, scratch) as data,
        ):
            if xxhash.xxh3_64_intdigest(data) != int(record["stored_xxh3"]):
                raise IntegrityError(
                    "stored bytes are damaged",
                    path=self._stored.payload_location(place.part_id),
                    tensor=place.tensor,
                    offset=start,
                    hint=_DAMAGE_HINT,
                )
            if self._stored.is_bound and chunk_digest(data) != record["stored_blake3"].tobytes():
                raise IntegrityError(
                    "stored bytes are not those that the root digest binds",
                    path=self._stored.payload_location(place.part_id),
                    tensor=place.tensor,
                    offset=start,
                    hint="Get the set again from somebody you trust.",
                )
            yield StoredChunk(data, record)

    @contextmanager
    def borrow_payload(self, part_id: int, start: int, stop: int, scratch: Scratch) -> Iterator[tuple[int, memoryview]]:
        """Lend bytes of a payload of this machine, with the descriptor of its file."""
        with self._payloads.lend(self._payload_of(part_id)) as payload, payload.borrow(start, stop, scratch) as data:
            yield payload.fileno(), data  # type: ignore[attr-defined]

    def cancel(self) -> None:
        """Wake every thread that waits for bytes."""
        self._payloads.cancel()

    def close(self) -> None:
        """Close the payloads."""
        self._payloads.close()

    def __enter__(self) -> SetReaders:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _payload_of(self, part_id: int) -> str:
        return self._stored.manifest.partitions[part_id].payload_file


class _OfThread(threading.local):
    """Decoder and buffers of each thread."""

    def __init__(self) -> None:
        self.decoder = ChunkDecoder()
        self.encoded = Scratch()
        self.raw = Scratch()


class SetShardReader:
    """Ranges of one shard; safe to share between threads."""

    def __init__(self, stored: StoredSet, readers: SetReaders, shard: str, *, owns_readers: bool = False) -> None:
        """With `owns_readers`, closing this closes them."""
        self._places = stored.places
        self._readers = readers
        self._entry = _entry_of(stored, shard)
        self._location = stored.location_of(shard)
        self._owns_readers = owns_readers
        self._lock = threading.Lock()
        self._kept: list[tuple[int, memoryview]] | None = None
        self._own = _OfThread()

    @property
    def size_bytes(self) -> int:
        """Length of the shard."""
        return self._entry.size_bytes

    @contextmanager
    def borrow(self, start: int, stop: int, scratch: Scratch) -> Iterator[memoryview]:
        """Lend the bytes [start, stop), put together in `scratch`."""
        if not 0 <= start <= stop <= self.size_bytes:
            raise SourceChangedError("range lies outside the shard", path=self._location, offset=stop)
        view = scratch.take(stop - start)
        self._fill(view, start)
        yield view.toreadonly()

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop)."""
        with self.borrow(start, stop, Scratch()) as view:
            return bytes(view)

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of many ranges."""
        return [self.read(start, stop) for start, stop in ranges]

    def close(self) -> None:
        """Let go of the payloads, if they are its own."""
        if self._owns_readers:
            self._readers.close()

    def _fill(self, view: memoryview, start: int) -> None:
        stop = start + len(view)
        filled = 0
        pieces = self._kept_pieces()
        for begin, data in pieces[max(0, bisect_right(pieces, start, key=lambda piece: piece[0]) - 1) :]:
            if begin >= stop:
                break
            first, last = max(start, begin), min(stop, begin + len(data))
            if first < last:
                view[first - start : last - start] = data[first - begin : last - begin]
                filled += last - first
        if filled == len(view):
            return
        for place in self._places.covering(self._entry.name, start, stop):
            first, last = max(start, place.start), min(stop, place.stop)
            whole = (first, last) == (place.start, place.stop)
            out = view[first - start : last - start] if whole else self._own.raw.take(place.stop - place.start)
            self._decode(place, out)
            if not whole:
                view[first - start : last - start] = out[first - place.start : last - place.start]
            filled += last - first
        if filled != len(view):
            raise IntegrityError(
                "the partitions do not cover the shard",
                path=self._location,
                offset=start,
                hint="The set manifest is not that of these partitions; verify the set.",
            )

    def _decode(self, place: StoredPlace, out: memoryview) -> None:
        with self._readers.borrow_chunk(place, self._own.encoded) as (data, record):
            what = None
            try:
                self._own.decoder.decode(data, Encoded(int(record["codec"]), int(record["layout"]), len(data)), out)
                if xxhash.xxh3_64_intdigest(out) != int(record["raw_xxh3"]):
                    what = "decoded bytes are not those that were split"
            except IntegrityError as error:  # knows no file
                what = error.what
            if what is not None:
                raise IntegrityError(
                    what, path=self._location, tensor=place.tensor, offset=place.start, hint=_DAMAGE_HINT
                )

    def _kept_pieces(self) -> list[tuple[int, memoryview]]:
        """Return what no tensor covers, by its place in the shard."""
        with self._lock:
            if self._kept is None:
                kept = memoryview(self._entry.kept.data(self._location))
                gaps = gaps_between(self._places.ranges(self._entry.name), self.size_bytes)
                if sum(stop - start for start, stop in gaps) != len(kept):
                    raise IntegrityError("the partitions do not cover the shard", path=self._location)
                pieces, position = [], 0
                for start, stop in gaps:
                    pieces.append((start, kept[position : position + stop - start]))
                    position += stop - start
                self._kept = pieces
            return self._kept


def _entry_of(stored: StoredSet, shard: str) -> ShardEntry:
    return next(entry for entry in stored.manifest.shards if entry.name == shard)
