"""Writes one partition: slots in any order of arrival, at places that do not depend on it.

Strategy.  The place of a slot is where the one before it ends, so a writer asks for places in slot order
(`place`), but encodes and writes without waiting.  Each written slot's index records go to a journal beside the
payload, in slot order, so that a later run can tell what is there: it believes the journal only where the bytes on
disk still have their checksum.  Nothing carries its final name before it is complete and synced, and the manifest
gets its name last.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import numpy as np
import xxhash

from mmsplit.checkpoint import FileReader, Scratch
from mmsplit.digests import chunk_digest, sha256_of
from mmsplit.errors import IntegrityError, MmsplitError, OutputError
from mmsplit.regular_files import read_regular
from mmsplit.sidecar.block_sharing import Twin
from mmsplit.sidecar.chunk_index import CHUNK_RECORD, ChunkIndex, empty_index
from mmsplit.sidecar.layout import CHUNK_ALIGNMENT, DATA_START, SLOT_ALIGNMENT, Slot, aligned
from mmsplit.sidecar.manifest import parse_manifest
from mmsplit.sidecar.output_files import (
    PARTIAL_SUFFIX,
    open_unfinished,
    output_errors,
    sync_directory,
    write_all,
    write_whole_file,
)
from mmsplit.sidecar.partition_reader import read_manifest_copy
from mmsplit.sidecar.payload_file import PayloadFile
from mmsplit.sidecar.payload_tail import pack_tail
from mmsplit.workers import Stopped

JOURNAL_SUFFIX: Final = ".journal"
_JOURNAL_CHECKSUM_BYTES: Final = 8


class PayloadWriter:
    """One partition under construction in `directory`.  `place` and `write` may be called from several threads."""

    def __init__(self, payload: Path, header: bytes, chunk_count: int, slot_count: int, *, direct: bool = True) -> None:
        self.payload = payload
        self.index: ChunkIndex = empty_index(chunk_count)
        self.slot_count = slot_count
        self._header = header
        self._direct = direct
        self._partial = payload.with_name(payload.name + PARTIAL_SUFFIX)
        self._journal_path = payload.with_name(payload.name + JOURNAL_SUFFIX)
        self._file: PayloadFile | None = None
        self._journal_fd = -1
        self._journal_bytes = 0
        self._placed = threading.Condition()
        self._next_slot = 0
        self._data_stop = DATA_START
        self._cancelled = False
        self._written: dict[int, ChunkIndex] = {}
        self._journaled_slots = 0
        self._recovered_slots = 0
        self._remaining = slot_count
        self.is_finished = False

    def adopt_finished(
        self, slots: Iterable[Slot], manifest_path: Path, on_slot: Callable[[Slot], None], *, is_only_copy: bool = False
    ) -> bool:
        """Take over a payload that an earlier run completed, if it is whole; returns whether it is.

        Each slot is re-hashed, then reported to `on_slot`.  The manifest is written anew if the run ended before
        it was.  A payload that is not whole loses its manifest and will be replaced; but one that `is_only_copy` of
        something is left as it is, and raises `IntegrityError`.
        """
        whole, copy = False, b""
        try:
            copy = read_manifest_copy(self.payload)
            manifest = parse_manifest(copy, str(self.payload))
            with FileReader(self.payload, changed_error=IntegrityError) as reader:
                index = reader.read(manifest.data_stop, manifest.data_stop + self.index.nbytes)
                if sha256_of(index) == manifest.index_sha256:
                    self.index[:] = np.frombuffer(index, CHUNK_RECORD)
                    whole = self._matches(reader, slots, on_slot)
        except (OSError, MmsplitError):
            pass  # not there, or not sound: it will be made anew
        if not whole and is_only_copy:
            raise IntegrityError(
                "partition cannot be read back whole, and shards that it was made from are deleted",
                path=self.payload,
                hint="Nothing more was deleted. See the damage with mmsplit verify, and bring this file back.",
            )
        with output_errors(manifest_path):
            if not whole:
                manifest_path.unlink(missing_ok=True)
                return False
            if not manifest_path.is_file() or read_regular(manifest_path) != copy:
                write_whole_file(manifest_path, copy)
            # Killed between the payload's name and the end of `finish`, a run leaves its journal.
            self._journal_path.unlink(missing_ok=True)
        self._remaining = 0
        self._note_finished()
        return True

    def _matches(self, reader: FileReader, slots: Iterable[Slot], on_slot: Callable[[Slot], None]) -> bool:
        """Whether a finished payload holds exactly these slots, intact."""
        if reader.read(0, DATA_START) != self._header:
            return False
        scratch = Scratch()
        position = DATA_START
        for slot in slots:
            records = self.index[slot.first_chunk : slot.first_chunk + len(slot.chunks)]
            stop = _intact_slot(slot, records, position, reader, scratch)
            if stop is None:
                return False
            position = stop
            on_slot(slot)
        return True

    def recover(self, slots: Iterable[Slot], on_slot: Callable[[Slot], None]) -> None:
        """Find out how many leading slots an earlier run left intact: `recovered_slots`.

        Each is re-hashed, then reported to `on_slot`.  Call before `open`.
        """
        try:
            journal = read_regular(self._journal_path)
            reader = FileReader(self._partial, changed_error=IntegrityError)
        except OSError:
            return
        with reader:
            if reader.size_bytes < DATA_START or reader.read(0, DATA_START) != self._header:
                return
            scratch = Scratch()
            for slot in slots:
                size = len(slot.chunks) * CHUNK_RECORD.itemsize
                rows = journal[self._journal_bytes : self._journal_bytes + size]
                checksum = journal[self._journal_bytes + size : self._journal_bytes + size + _JOURNAL_CHECKSUM_BYTES]
                if len(rows) != size or xxhash.xxh3_64_digest(rows) != checksum:
                    break
                records = np.frombuffer(rows, CHUNK_RECORD)
                stop = _intact_slot(slot, records, self._data_stop, reader, scratch)
                if stop is None:
                    break
                self.index[slot.first_chunk : slot.first_chunk + len(records)] = records
                self._data_stop = stop
                self._journal_bytes += size + _JOURNAL_CHECKSUM_BYTES
                self._next_slot += 1
                on_slot(slot)
        self._journaled_slots = self._recovered_slots = self._next_slot
        self._remaining = self.slot_count - self._next_slot

    def open(self) -> None:
        """Start or continue the files under construction."""
        with output_errors(self._partial):
            self._journal_fd = open_unfinished(self._journal_path)
            os.ftruncate(self._journal_fd, self._journal_bytes)
        self._file = PayloadFile(self._partial, direct=self._direct)
        if self._next_slot == 0:
            self._file.write(0, self._header)

    def place(self, slot_number: int, stored_bytes: int) -> int:
        """Return the payload offset for a slot of that many bytes; waits until all before it have their place.

        Raises `Stopped` in threads that wait for a slot which will never come.
        """
        with self._placed:
            self._placed.wait_for(lambda: self._cancelled or self._next_slot == slot_number)
            if self._cancelled:
                raise Stopped
            offset = self._data_stop
            self._data_stop += aligned(stored_bytes, SLOT_ALIGNMENT)
            self._next_slot += 1
            self._placed.notify_all()
            return offset

    def write(
        self,
        slot_number: int,
        first_chunk: int,
        offset: int,
        block: memoryview,
        records: ChunkIndex,
        twin: Twin | None = None,
    ) -> bool:
        """Write a slot at its place and note its records; returns whether it was the last one missing.

        `block` is padded to the slot alignment; `records` hold offsets relative to the slot, made absolute here.
        `twin` is as in `PayloadFile.write_block`.
        """
        if self._file is None:
            raise OutputError("payload is not open", path=self._partial)
        self._file.write_block(offset, block, twin)
        records["stored_offset"] += np.uint64(offset)
        with self._placed:
            self.index[first_chunk : first_chunk + len(records)] = records
            self._written[slot_number] = records.copy()
            self._append_to_journal()
            self._remaining -= 1
            return self._remaining == 0

    @property
    def is_complete(self) -> bool:
        """Whether all slots are written."""
        return self._remaining == 0

    @property
    def recovered_slots(self) -> int:
        """How many leading slots need not be written again; known before the first `place`."""
        return self._recovered_slots

    @property
    def data_stop(self) -> int:
        """Where the last slot ends; the index goes there."""
        return self._data_stop

    def finish(self, manifest: bytes, manifest_path: Path) -> None:
        """Complete the payload with index, manifest copy and trailer; give it, then the manifest, its name."""
        if self._file is None:
            raise OutputError("payload is not open", path=self._partial)
        tail = pack_tail(self.index.tobytes(), self._data_stop, manifest)
        self._file.write(self._data_stop, tail)
        self._file.finish(self._data_stop + len(tail))
        self.close()
        with output_errors(self.payload):
            os.replace(self._partial, self.payload)
        sync_directory(self.payload.parent)
        write_whole_file(manifest_path, manifest)
        self._note_finished()
        with output_errors(self._journal_path):
            self._journal_path.unlink(missing_ok=True)

    def wait_until_finished(self) -> None:
        """Return once the payload is complete and has its name; its `index` changes no more.

        Raises `Stopped` if that will never come.
        """
        with self._placed:
            self._placed.wait_for(lambda: self._cancelled or self.is_finished)
            if not self.is_finished:
                raise Stopped

    def cancel(self) -> None:
        """Wake and end every thread that waits for a place, or for the end."""
        with self._placed:
            self._cancelled = True
            self._placed.notify_all()

    def close(self) -> None:
        """Close the files under construction; they stay for a later run."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._journal_fd >= 0:
            os.close(self._journal_fd)
            self._journal_fd = -1

    def _note_finished(self) -> None:
        with self._placed:
            self.is_finished = True
            self._placed.notify_all()

    def _append_to_journal(self) -> None:
        """Append every slot that is next in order; a crash costs at most the slots in flight."""
        lines = []
        while self._journaled_slots in self._written:
            rows = self._written.pop(self._journaled_slots).tobytes()
            lines.append(rows + xxhash.xxh3_64_digest(rows))
            self._journaled_slots += 1
        if lines:
            data = b"".join(lines)
            with output_errors(self._journal_path):
                write_all(self._journal_fd, memoryview(data), self._journal_bytes)
            self._journal_bytes += len(data)


def _intact_slot(slot: Slot, records: ChunkIndex, start: int, reader: FileReader, scratch: Scratch) -> int | None:
    """Return where the slot ends if its records fit the plan and its chunks have their digests, else None."""
    position = start
    for chunk, record in zip(slot.chunks, records, strict=True):
        offset, stored = int(record["stored_offset"]), int(record["stored_bytes"])
        if (
            offset != aligned(position, CHUNK_ALIGNMENT)
            or int(record["raw_bytes"]) != chunk.raw_bytes
            or int(record["tensor"]) != chunk.tensor_index
            or not 0 < stored <= chunk.raw_bytes
        ):
            return None
        position = offset + stored
    stop = aligned(position, SLOT_ALIGNMENT)
    if stop > reader.size_bytes:
        return None
    try:
        with reader.borrow(start, stop, scratch) as view:
            position = 0
            for record in records:
                begin = int(record["stored_offset"]) - start
                end = begin + int(record["stored_bytes"])
                if any(view[position:begin]) or xxhash.xxh3_64_intdigest(view[begin:end]) != int(record["stored_xxh3"]):
                    return None
                if chunk_digest(view[begin:end]) != record["stored_blake3"].tobytes():
                    return None
                position = end
            return None if any(view[position:]) else stop
    except MmsplitError:
        return None
