"""One partition under construction: places and journal follow slot order, whatever the order of writing."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import xxhash

from mmsplit.checkpoint import Scratch, TensorInfo
from mmsplit.digests import chunk_digest
from mmsplit.errors import OutputError
from mmsplit.planning import PlannedLayer
from mmsplit.sidecar.chunk_index import CHUNK_RECORD, ChunkIndex, empty_index
from mmsplit.sidecar.framing import pack_header
from mmsplit.sidecar.layout import DATA_START, SLOT_ALIGNMENT, Slot, iter_slots
from mmsplit.sidecar.payload_writer import JOURNAL_SUFFIX, PayloadWriter
from mmsplit.workers import Stopped

_HEADER = pack_header(0, 1, "sha256:" + "0" * 64, "sha256:" + "1" * 64)
_SIZES = [100, 5000, 1, 4096, 9000]


def _slots() -> list[Slot]:
    """One layer, and so one slot, per size."""
    stored = []
    for number, size in enumerate(_SIZES):
        tensor = TensorInfo(f"t{number}", "U8", (size,), "s", 0, size, size)
        stored.append((PlannedLayer(f"layer{number}", "block", None, None, (tensor,)), tensor))
    return list(iter_slots(stored))


def _encoded(slot: Slot) -> tuple[memoryview, ChunkIndex]:
    """The slot stored raw, with its record relative to the slot."""
    (chunk,) = slot.chunks
    raw = bytes([slot.number + 1]) * chunk.raw_bytes
    block = Scratch().take(-(-len(raw) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT)
    block[: len(raw)] = raw
    records = empty_index(1)
    checksum = xxhash.xxh3_64_intdigest(raw)
    records[0] = (0, len(raw), len(raw), checksum, checksum, chunk.tensor_index, 0, 0, 0, chunk_digest(raw))
    return block, records


def _writer(path: Path) -> PayloadWriter:
    return PayloadWriter(path / "partition_0.bin", _HEADER, len(_SIZES), len(_SIZES))


def _write(writer: PayloadWriter, slots: list[Slot]) -> list[bool]:
    """Give the slots their places in order, then write them in the order given."""
    places = {slot.number: writer.place(slot.number, _SIZES[slot.number]) for slot in sorted(slots)}
    last = []
    for slot in slots:
        block, records = _encoded(slot)
        last.append(writer.write(slot.number, slot.first_chunk, places[slot.number], block, records))
    return last


def _journal(path: Path) -> bytes:
    return (path / f"partition_0.bin{JOURNAL_SUFFIX}").read_bytes()


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
def test_the_order_of_writing_does_not_show(tmp_path: Path, order: list[int]) -> None:
    """Payload, index and journal are the same; the one who writes the last slot is told so."""
    slots, writer = _slots(), _writer(tmp_path)
    writer.open()
    assert _write(writer, [slots[k] for k in order]) == [False] * 4 + [True]
    assert writer.is_complete
    offsets = np.cumsum([DATA_START] + [-(-size // SLOT_ALIGNMENT) * SLOT_ALIGNMENT for size in _SIZES])
    assert writer.index["stored_offset"].tolist() == offsets[:-1].tolist()
    assert writer.data_stop == offsets[-1]
    rows = [row.tobytes() for row in np.split(writer.index, len(_SIZES))]
    assert _journal(tmp_path) == b"".join(row + xxhash.xxh3_64_digest(row) for row in rows)
    writer.close()


def test_the_journal_stops_before_a_slot_that_is_missing(tmp_path: Path) -> None:
    """It tells of a run of slots from the first on; those beyond a gap are told when the gap is filled."""
    slots, writer = _slots(), _writer(tmp_path)
    writer.open()
    places = [writer.place(slot.number, _SIZES[slot.number]) for slot in slots]
    entry = CHUNK_RECORD.itemsize + 8
    for number, entries in ((1, 0), (3, 0), (0, 2), (2, 4), (4, 5)):
        block, records = _encoded(slots[number])
        writer.write(number, slots[number].first_chunk, places[number], block, records)
        assert len(_journal(tmp_path)) == entries * entry
    writer.close()


@pytest.mark.parametrize("written", [0, 1, 3, 5])
def test_a_later_writer_goes_on_after_the_last_slot(tmp_path: Path, written: int) -> None:
    """What it recovers is what the journal tells and the payload holds; the result is that of one writer."""
    slots = _slots()
    (tmp_path / "whole").mkdir()
    whole = _writer(tmp_path / "whole")
    whole.open()
    _write(whole, slots)
    first = _writer(tmp_path)
    first.open()
    _write(first, slots[:written])
    first.close()
    second, seen = _writer(tmp_path), []
    second.recover(slots, seen.append)
    assert (second.recovered_slots, seen) == (written, slots[:written])
    assert second.is_complete == (written == 5)
    second.open()
    _write(second, slots[written:])
    assert second.index.tobytes() == whole.index.tobytes()
    assert _journal(tmp_path) == _journal(tmp_path / "whole")
    for writer, path in ((second, tmp_path / "m.json"), (whole, tmp_path / "whole" / "m.json")):
        writer.finish(b'{"a": 1}', path)
        writer.close()
    assert (tmp_path / "partition_0.bin").read_bytes() == (tmp_path / "whole" / "partition_0.bin").read_bytes()
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"partition_0.bin", "m.json"}


def test_names_come_after_the_sync_and_the_manifest_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut leaves no payload with its name but without its bytes, and no manifest without its payload."""
    slots, writer = _slots(), _writer(tmp_path)
    writer.open()
    _write(writer, slots)
    calls = []
    for name in ("fsync", "replace", "unlink"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, real=real: (calls.append((name, str(args[-1])[-15:])), real(*args))[1]
        )
    writer.finish(b"{}", tmp_path / "partition_0.json")
    names = [(name, target if name == "replace" else "") for name, target in calls]
    assert names == [
        ("fsync", ""),
        ("replace", "partition_0.bin"),
        ("fsync", ""),
        ("fsync", ""),
        ("replace", "artition_0.json"),
        ("fsync", ""),
        ("unlink", ""),
    ]


def test_a_thread_that_waits_for_its_place_can_be_sent_home(tmp_path: Path) -> None:
    """Where a slot will never come, those after it end instead of waiting for ever."""
    writer = _writer(tmp_path)
    writer.open()
    ended = []

    def wait() -> None:
        try:
            writer.place(3, 10)
        except Stopped:
            ended.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    writer.cancel()
    thread.join(30)
    writer.close()
    assert ended == [True]
    with pytest.raises(Stopped):
        writer.place(0, 10)


def test_a_writer_that_is_not_open_writes_nothing(tmp_path: Path) -> None:
    """Using it before `open` or after `close` is an error that names the file."""
    writer = _writer(tmp_path)
    block, records = _encoded(_slots()[0])
    with pytest.raises(OutputError, match="not open"):
        writer.write(0, 0, DATA_START, block, records)
    with pytest.raises(OutputError, match="not open"):
        writer.finish(b"{}", tmp_path / "m.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("state", ["nothing", "no journal", "no payload", "another header", "empty"])
def test_nothing_is_recovered_where_nothing_can_be_believed(tmp_path: Path, state: str) -> None:
    """Journal and payload belong together; one without the other is nothing."""
    slots = _slots()
    if state != "nothing":
        first = _writer(tmp_path)
        first.open()
        _write(first, slots)
        first.close()
    partial, journal = tmp_path / "partition_0.bin.partial", tmp_path / f"partition_0.bin{JOURNAL_SUFFIX}"
    if state == "no journal":
        journal.unlink()
    elif state == "no payload":
        partial.unlink()
    elif state == "empty":
        partial.write_bytes(b"")
    elif state == "another header":
        partial.write_bytes(pack_header(0, 2, "sha256:" + "0" * 64, "sha256:" + "1" * 64) + partial.read_bytes()[4096:])
    second = _writer(tmp_path)
    second.recover(slots, lambda _: pytest.fail("nothing is there"))
    assert second.recovered_slots == 0
    assert not second.adopt_finished(slots, tmp_path / "m.json", lambda _: pytest.fail("nothing is there"))
