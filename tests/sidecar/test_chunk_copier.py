"""Copies of tied weights: what was stored once is read back, checked, and waited for."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from checkpoints import flip, open_descriptors

from mmsplit.checkpoint import Scratch, TensorInfo
from mmsplit.digests import chunk_digest
from mmsplit.errors import IntegrityError, OutputError
from mmsplit.planning import PlannedLayer, PlannedPartition, iter_stored
from mmsplit.sidecar.chunk_copier import ChunkCopier, raw_range
from mmsplit.sidecar.chunk_index import empty_index
from mmsplit.sidecar.framing import pack_header
from mmsplit.sidecar.layout import ChunkSpec, iter_slots
from mmsplit.sidecar.payload_file import BlockReader
from mmsplit.sidecar.payload_writer import PayloadWriter
from mmsplit.sidecar.repeated_chunks import RepeatedChunks
from mmsplit.workers import Stopped

_SIZES = [5000, 100]


def _partition(part_id: int) -> PlannedPartition:
    tensors = tuple(TensorInfo(f"t{k}", "U8", (size,), f"s{k}", 0, size, size) for k, size in enumerate(_SIZES))
    return PlannedPartition(part_id, (PlannedLayer("layer", "block", None, None, tensors),))


def _raw(number: int) -> bytes:
    return bytes([number + 1]) * _SIZES[number]


def _write(writer: PayloadWriter, root: Path) -> None:
    """Write partition 0, one slot of two chunks stored raw, and finish it."""
    block = Scratch().take(8192)
    block[:] = bytes(8192)
    block[:5000], block[5056:5156] = _raw(0), _raw(1)
    records = empty_index(2)
    for number, begin in enumerate((0, 5056)):
        checksum, size = xxhash.xxh3_64_intdigest(_raw(number)), _SIZES[number]
        digest = chunk_digest(_raw(number))
        records[number] = (begin, size, size, checksum, checksum, number, 0, 0, 0, digest)
    writer.open()
    writer.write(0, 0, writer.place(0, 5156), block, records)
    writer.finish(b"{}", root / "partition_0.json")


@pytest.fixture
def writer(tmp_path: Path) -> PayloadWriter:
    digest = "sha256:" + "0" * 64
    return PayloadWriter(tmp_path / "partition_0.bin", pack_header(0, 2, digest, digest), 2, 1)


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def copier(writer: PayloadWriter, request: pytest.FixtureRequest) -> Iterator[ChunkCopier]:
    repeated = RepeatedChunks([_partition(0), _partition(1)])
    with ChunkCopier(repeated, {0: writer}, direct=request.param) as copier:
        yield copier


def _chunks() -> tuple[ChunkSpec, ...]:
    (slot,) = iter_slots(iter_stored(_partition(1)))
    return slot.chunks


def test_the_stored_bytes_and_their_record(writer: PayloadWriter, copier: ChunkCopier, tmp_path: Path) -> None:
    """A chunk anywhere in its slot comes back as it was stored."""
    _write(writer, tmp_path)
    for number, chunk in enumerate(_chunks()):
        assert copier.source_range(1, chunk) is None
        stored = copier.take(1, chunk, Scratch())
        assert stored is not None
        assert stored.data == _raw(number)
        assert stored.record == writer.index[number]


def test_an_original_is_nobodys_copy(copier: ChunkCopier) -> None:
    """It is for the caller to encode; nothing is waited for."""
    for chunk in _chunks():
        assert copier.source_range(0, chunk) == raw_range(chunk)
        assert copier.take(0, chunk, Scratch()) is None


@pytest.mark.parametrize(("offset", "number"), [(4096, 0), (9095, 0), (9152, 1), (9251, 1)])
def test_a_damaged_original_is_not_copied(
    writer: PayloadWriter, copier: ChunkCopier, tmp_path: Path, offset: int, number: int
) -> None:
    """The first or the last byte is another: the error says which chunk; the other one is still good."""
    _write(writer, tmp_path)
    flip(writer.payload, offset)
    chunks = _chunks()
    with pytest.raises(IntegrityError, match=r"not what was written.*--resume") as caught:
        copier.take(1, chunks[number], Scratch())
    assert (caught.value.path, caught.value.tensor) == (str(writer.payload), f"t{number}")
    other = copier.take(1, chunks[1 - number], Scratch())
    assert other is not None
    assert other.data == _raw(1 - number)


def test_a_shortened_original_is_an_error(writer: PayloadWriter, copier: ChunkCopier, tmp_path: Path) -> None:
    """The file ends where a chunk should be."""
    _write(writer, tmp_path)
    os.truncate(writer.payload, 8192)
    with pytest.raises(OutputError, match="shorter"):
        copier.take(1, _chunks()[1], Scratch())


def _take_in_a_thread(copier: ChunkCopier) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []

    def take() -> None:
        try:
            stored = copier.take(1, _chunks()[0], Scratch())
            results.append(None if stored is None else bytes(stored.data))
        except Stopped as stopped:
            results.append(stopped)

    thread = threading.Thread(target=take)
    thread.start()
    return thread, results


def test_a_copy_waits_for_its_original(writer: PayloadWriter, copier: ChunkCopier, tmp_path: Path) -> None:
    """Whoever asks too early gets the bytes once the partition is finished."""
    thread, results = _take_in_a_thread(copier)
    assert results == []
    _write(writer, tmp_path)
    thread.join(30)
    assert results == [_raw(0)]


def test_a_copy_whose_original_will_never_come(writer: PayloadWriter, copier: ChunkCopier) -> None:
    """A run that ends sends those home who wait, and those who would begin to."""
    thread, results = _take_in_a_thread(copier)
    writer.cancel()
    thread.join(30)
    assert [type(result) for result in results] == [Stopped]
    with pytest.raises(Stopped):
        copier.take(1, _chunks()[0], Scratch())


def test_a_payload_of_an_earlier_run_is_an_original(writer: PayloadWriter, copier: ChunkCopier, tmp_path: Path) -> None:
    """What a resumed run adopts as finished can be copied from at once."""
    digest = "sha256:" + "0" * 64
    _write(PayloadWriter(writer.payload, pack_header(0, 2, digest, digest), 2, 1), tmp_path)
    # Adopting goes by a manifest; what it ends with is the index and this.
    index = empty_index(2)
    index[:] = np.frombuffer(writer.payload.read_bytes()[12288 : 12288 + index.nbytes], index.dtype)
    writer.index[:] = index
    writer.is_finished = True
    stored = copier.take(1, _chunks()[1], Scratch())
    assert stored is not None
    assert stored.data == _raw(1)


def test_no_file_stays_open(writer: PayloadWriter, tmp_path: Path) -> None:
    """A payload is opened once, for all chunks, and closed at the end."""
    files = open_descriptors()
    with ChunkCopier(RepeatedChunks([_partition(0), _partition(1)]), {0: writer}) as copier:
        _write(writer, tmp_path)
        for chunk in _chunks() * 20:
            copier.take(1, chunk, Scratch())
        assert open_descriptors() <= files + 2
    assert open_descriptors() == files


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs O_DIRECT")
@pytest.mark.parametrize("refused_at", ["open", "preadv"])
def test_where_reading_past_the_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_at: str
) -> None:
    """At opening or at the first read: the bytes come through the cache."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    direct: set[int] = set()
    real_open, real_preadv = os.open, os.preadv

    def open_(name: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT and refused_at == "open":
            raise OSError(errno.EINVAL, "refused")
        fd = real_open(name, flags, *rest)
        if flags & os.O_DIRECT:
            direct.add(fd)
        return fd

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, "refused")
        return real_preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    reader = BlockReader(path)
    block = Scratch().take(8192)
    reader.read_blocks(4096, block)
    reader.close()
    assert block == path.read_bytes()[4096:12288]
    assert bool(direct) == (refused_at == "preadv")
