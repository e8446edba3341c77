"""One partition, whole again: its JSON, what surrounds its data, its chunks.

What is there and right stays where it is; what is damaged is written over in place, when what replaces it has been
compared with the record.  A payload that is missing is received or encoded as a whole, under another name until it is
complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mmsplit.checkpoint import FileReader
from mmsplit.codec import CodecName
from mmsplit.errors import CheckpointError, FormatError, IntegrityError, NetworkError, NoSpaceError
from mmsplit.repairing.chunk_mender import ChunkMender, Damage, chunk_mended, find_damage
from mmsplit.repairing.ledger import THE_SET, Ledger, Mended
from mmsplit.repairing.manifest_finder import ForeignPayloadError, FoundManifest, find_manifest
from mmsplit.repairing.parity_copy import ParityCopy
from mmsplit.repairing.payload_rebuild import rebuild_payload
from mmsplit.repairing.siblings import Siblings
from mmsplit.repairing.sources import CheckpointSource, ChunkSource, RepairSource, SetCopy
from mmsplit.repairing.structure import FoundIndex, PartitionParts, Patch, find_index, header_patches, tail_patches
from mmsplit.sidecar.chunk_check import chunk_fault
from mmsplit.sidecar.chunk_index import find_fault
from mmsplit.sidecar.manifest import manifest_name, payload_name
from mmsplit.sidecar.output_directory import free_bytes
from mmsplit.sidecar.output_files import output_errors, write_whole_file
from mmsplit.sidecar.partition_reader import Fault, OpenPartition, open_partition_files
from mmsplit.sidecar.partition_receiver import PartitionReceiver
from mmsplit.sidecar.payload_file import PayloadFile
from mmsplit.sidecar.set_manifest import PartitionEntry, SetManifest
from mmsplit.workers import ProgressCallback, ProgressCounter

_MOVE_AWAY = "move it away, then repair again"


@dataclass(frozen=True, kw_only=True)
class RepairOptions:
    """How to repair.  `check_chunks` False looks at manifests and structure only; `only_manifests` at the JSON only.

    With `is_bound` the set manifest is that of a root digest that is trusted, and chunks are held to their digests.
    """

    check_chunks: bool
    decode: bool
    only_manifests: bool
    is_bound: bool
    dry_run: bool
    threads: int
    connections: int
    progress: ProgressCallback | None


class PartitionRepair:
    """Repairs partitions of the set in `root`, which is locked unless nothing is written.

    `part_ids` are those that the set has.
    """

    def __init__(
        self,
        root: Path,
        set_manifest: SetManifest | None,
        part_ids: tuple[int, ...],
        sources: Sequence[RepairSource],
        parity: ParityCopy,
        ledger: Ledger,
        options: RepairOptions,
    ) -> None:
        self._root = root
        self._set = set_manifest
        self._sources = tuple(sources)
        # What is here is asked before what may be far away.
        self._copies = (parity, *(source for source in sources if isinstance(source, SetCopy)))
        self._siblings = Siblings(root, part_ids)
        self._chunk_sources: tuple[ChunkSource, ...] = (self._siblings, parity, *self._sources)
        self._ledger = ledger
        self._options = options

    def close(self) -> None:
        """Close what was opened of other partitions; the sources stay the caller's."""
        self._siblings.close()

    def repair(self, part_id: int) -> None:
        """Repair one partition; all that is found goes to the ledger.  Raises `OutputError`."""
        path = self._root / manifest_name(part_id)
        entry = None if self._set is None else self._set.partitions[part_id]
        try:
            self._repair(part_id, path, entry)
            if not self._options.dry_run and not self._options.only_manifests and not self._is_left(part_id):
                # The one judge of what is a partition has the last word.
                open_partition_files(path, "pread", entry, is_bound=self._options.is_bound).close()
        except ForeignPayloadError as error:
            payload = path.with_suffix(".bin")
            self._ledger.leave(Fault(str(payload), f"{error.what}: {_MOVE_AWAY}", partition=part_id))
        except (FormatError, IntegrityError, CheckpointError) as error:
            self._ledger.leave(Fault(error.path or str(path), error.what, error.offset, partition=part_id))

    def _repair(self, part_id: int, path: Path, entry: PartitionEntry | None) -> None:
        payload = path.with_suffix(".bin")
        if entry is None and not payload.is_file():
            what = "payload is missing, and there is no set manifest to say which it was: pull or split it again"
            self._ledger.leave(Fault(str(payload), what, partition=part_id))
            return
        found = find_manifest(path, entry, self._copies)
        if found is None:
            self._ledger.leave(Fault(str(path), self._lost_manifest(part_id), partition=part_id))
            return
        if self._options.only_manifests:
            self._write_manifest(path, found)
            return
        if not payload.is_file() or payload.stat().st_size == 0:
            self._make_payload(path, entry, found, is_missing=True)
            return
        self._write_manifest(path, found)
        parts = PartitionParts(found.data, found.manifest, None if entry is None else entry.payload_bytes)
        with output_errors(payload):
            reader = FileReader(payload, io="pread", changed_error=IntegrityError)
        with reader:
            patches = header_patches(parts, reader)
            index = find_index(parts, reader, self._copies)
            if index is not None:
                self._mend_payload(parts, reader, index, patches)
                return
        self._make_payload(path, entry, found, is_missing=False)

    def _is_left(self, part_id: int) -> bool:
        return any(fault.partition == part_id for fault in self._ledger.left())

    def _lost_manifest(self, part_id: int) -> str:
        return (
            "manifest is lost, and so is the copy of it that the payload carries; what brings it back is another copy"
            f" of the set, or the split it came from, run again with --only {part_id} --force"
        )

    def _write_manifest(self, path: Path, found: FoundManifest) -> None:
        if not found.is_lost:
            return
        if not self._options.dry_run:
            write_whole_file(path, found.data)
        part_id = found.manifest.part_id
        self._ledger.mend(Mended(str(path), "manifest", found.source, 0, len(found.data), part_id))

    def _mend_payload(self, parts: PartitionParts, reader: FileReader, found: FoundIndex, patches: list[Patch]) -> None:
        """Put right what surrounds the data, then chunk by chunk the data."""
        manifest, path = parts.manifest, self._root / manifest_name(parts.manifest.part_id)
        fault = find_fault(found.records, [t.size_bytes for t in manifest.stored_tensors()], manifest.data_stop)
        if fault is not None:
            raise IntegrityError(f"chunk {fault[0]:,} {fault[1]}", path=reader.path)
        partition = OpenPartition(path, manifest, found.records, reader, is_bound=self._options.is_bound)
        options = self._options
        counter = ProgressCounter("verify", reader.size_bytes, options.progress)
        damage = find_damage(partition, options.threads, counter, look=options.check_chunks, decode=options.decode)
        within = [chunk for chunk in range(manifest.chunk_count) if partition.encoded(chunk)[1] <= reader.size_bytes]
        if found.source is not None and within and set(within) <= set(damage.chunks) and (patches or len(within) > 1):
            # Neither its index nor any chunk, nor, if there is but one, its header: it may be somebody else's.
            raise ForeignPayloadError("payload holds no byte of this partition")
        behind, size_bytes = tail_patches(parts, reader, found)
        patches = [*patches, *behind]
        for fault_left in damage.hopeless:
            what = f"{fault_left.what}: it was stored wrong, split the partition again"
            self._ledger.leave(fault_left._replace(what=what))
        if patches or damage.chunks or damage.padding or size_bytes != reader.size_bytes:
            self._write(partition, patches, damage, size_bytes)

    def _write(self, partition: OpenPartition, patches: Sequence[Patch], damage: Damage, size_bytes: int) -> None:
        payload, part_id = partition.reader.path, partition.manifest.part_id
        notes = [patch.mended for patch in patches]
        notes += [Mended(str(payload), "padding", THE_SET, start, stop, part_id) for start, stop in damage.padding]
        found_bytes = partition.reader.size_bytes
        if size_bytes != found_bytes:
            start, stop = sorted((size_bytes, found_bytes))
            notes.append(Mended(str(payload), f"length of {size_bytes:,} bytes", THE_SET, start, stop, part_id))
        if self._options.dry_run:
            for note in notes:
                self._ledger.mend(note)
            for chunk in damage.chunks:
                self._would_mend(partition, chunk)
            return
        out = PayloadFile(payload, direct=False)
        try:
            mender = ChunkMender(partition, self._chunk_sources, out, self._ledger)
            total = sum(stop - start for start, stop, _ in map(partition.encoded, damage.chunks))
            counter = ProgressCounter("repair", total, self._options.progress)
            # What the set itself is enough for comes first: those blocks count, then, for what parity can do.
            for start, stop in damage.padding:
                out.write(start, bytes(stop - start))
            for patch in patches:
                out.write(patch.offset, patch.data)
            mender.mend(damage.chunks, max(self._options.threads, self._options.connections), counter)
            out.finish(size_bytes)
        finally:
            out.close()
        with output_errors(payload):
            reader = FileReader(payload, io="pread", changed_error=IntegrityError)
        with reader:
            mender.confirm(OpenPartition(partition.path, partition.manifest, partition.index, reader))
        for note in notes:
            self._ledger.mend(note)

    def _would_mend(self, partition: OpenPartition, chunk: int) -> None:
        source = next((each for each in self._chunk_sources if each.may_have(partition, chunk)), None)
        if source is not None:
            self._ledger.mend(chunk_mended(partition, chunk, source.location))
        else:
            what = "stored bytes are damaged (no source was given)"
            self._ledger.leave(chunk_fault(partition, chunk, what, "chunk"))

    def _make_payload(
        self, path: Path, entry: PartitionEntry | None, found: FoundManifest, *, is_missing: bool
    ) -> None:
        """Receive or encode the payload as a whole, from the first source that can give it."""
        part_id, reasons = found.manifest.part_id, []
        payload = self._root / payload_name(part_id)
        # A copy that has no right chunk index has no right payload either, and what is there is not risked for it.
        sources = [source for source in self._sources if is_missing or isinstance(source, CheckpointSource)]
        for source in sources:
            if self._options.dry_run:
                self._ledger.mend(Mended(str(payload), "payload", source.location, partition=part_id))
                return
            try:
                if isinstance(source, SetCopy):
                    self._receive(entry, source)
                else:
                    self._encode(path, found, source)
            except (NetworkError, IntegrityError, CheckpointError, FormatError) as error:
                reasons.append(f"{source.location}: {error.what}")
                continue
            self._ledger.mend(Mended(str(payload), "payload", source.location, partition=part_id))
            if found.is_lost:
                self._ledger.mend(Mended(str(path), "manifest", found.source, 0, len(found.data), part_id))
            return
        if not self._options.dry_run and (found.is_lost or not path.is_file()):
            write_whole_file(path, found.data)  # a payload that was received in part takes it along
        why = "payload is missing" if is_missing else "chunk index is damaged"
        reason = "; ".join(reasons) or "no checkpoint was given"
        self._ledger.leave(Fault(str(payload), f"{why} ({reason})", partition=part_id))

    def _require_space(self, needed_bytes: int) -> None:
        free = free_bytes(self._root)
        if free < needed_bytes:
            raise NoSpaceError(
                "too little free space for a whole payload",
                path=self._root,
                expected=f"{needed_bytes:,} bytes free",
                found=free,
                hint=f"Free {needed_bytes - free:,} bytes more, then repair again.",
            )

    def _receive(self, entry: PartitionEntry | None, source: SetCopy) -> None:
        if entry is None or self._set is None:
            raise IntegrityError("without the set manifest nothing says whether its payload is the right one")
        receiver = PartitionReceiver(
            self._root,
            self._set,
            entry,
            connections=self._options.connections,
            threads=self._options.threads,
        )
        self._require_space(receiver.missing_bytes)
        counter = ProgressCounter("repair", entry.payload_bytes, self._options.progress)
        source.count(receiver.receive(source.open, counter.add).fetched_bytes)

    def _encode(self, path: Path, found: FoundManifest, source: CheckpointSource) -> None:
        if self._set is None:
            raise IntegrityError("without the set manifest nothing says how its payload was encoded")
        self._require_space(self._set.partitions[found.manifest.part_id].payload_bytes)
        codec = cast(CodecName, self._set.codec)  # parsing has seen to it that it is one
        options = self._options
        rebuild_payload(path, found.data, found.manifest, codec, source, options.threads, options.progress)
