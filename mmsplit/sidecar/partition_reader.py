"""Opens one partition: manifest, payload and chunk index, held against each other.

There is one code path for reading and for verifying: every fault goes to `report`, which raises for those who want
to use the partition and collects for those who want to know all that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, NamedTuple, NoReturn, Protocol

import numpy as np
import xxhash

from mmsplit.checkpoint import FileReader, IoMode
from mmsplit.codec import Encoded
from mmsplit.digests import chunk_digest, sha256_of
from mmsplit.errors import FormatError, IntegrityError, MissingPartitionError
from mmsplit.regular_files import read_regular
from mmsplit.sidecar.chunk_index import CHUNK_RECORD, ChunkIndex, find_fault, tensor_checksum
from mmsplit.sidecar.framing import (
    HEADER_BYTES,
    TRAILER_BYTES,
    Trailer,
    pack_header,
    parse_trailer,
    require_payload_header,
)
from mmsplit.sidecar.layout import DATA_START, RECORD_BYTES, SLOT_ALIGNMENT
from mmsplit.sidecar.manifest import (
    LayerEntry,
    Manifest,
    TensorEntry,
    manifest_name,
    parse_manifest,
    payload_name,
    refuse_other_version,
)
from mmsplit.sidecar.output_files import refuse_shortage
from mmsplit.sidecar.set_manifest import PartitionEntry

MAX_MANIFEST_BYTES: Final = 1 << 30
_MANIFEST_NAME: Final = re.compile(r"^partition_(\d+)\.json$", re.ASCII)


#: chunk: stored bytes are not those of the index; decoded: they are, but do not give what was split; padding: bytes
#: between chunks are not zero; unreadable: the disk gives no bytes for a range, or the file ends before it.
FaultKind = Literal["structure", "chunk", "decoded", "padding", "unreadable"]


class Fault(NamedTuple):
    """Something that is not as it was written.  [`start`, `stop`) is the byte range in `file` that is affected.

    `chunk` is the number of the chunk in its partition, where the fault is that of one chunk.
    """

    file: str
    what: str
    start: int | None = None
    stop: int | None = None
    partition: int | None = None
    layer: str | None = None
    tensor: str | None = None
    kind: FaultKind = "structure"
    chunk: int | None = None


Report = Callable[[Fault], None]


class PayloadBytes(Protocol):
    """What gives ranges of a payload: its file, or what makes them again."""

    @property
    def size_bytes(self) -> int:
        """Length of the payload."""

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop)."""


class OpenPartition:
    """A partition whose structure is sound: manifest, chunk index and an open payload.

    With `is_bound` it was opened for somebody who trusts a root digest: manifest and index are those that the root
    binds, and `require_bound` compares chunks.
    """

    def __init__(
        self, path: Path, manifest: Manifest, index: ChunkIndex, reader: FileReader, *, is_bound: bool = False
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.index = index
        self.reader = reader
        self.is_bound = is_bound
        self.tensors = manifest.stored_tensors()

    def encoded(self, chunk: int) -> tuple[int, int, Encoded]:
        """Return payload range [start, stop) and encoding of a chunk."""
        record = self.index[chunk]
        start, stored = int(record["stored_offset"]), int(record["stored_bytes"])
        return start, start + stored, Encoded(int(record["codec"]), int(record["layout"]), stored)

    def has_digest(self, chunk: int, stored: memoryview) -> bool:
        """Whether the stored bytes of a chunk have the digest that the index has of them."""
        expected: bytes = self.index[chunk]["stored_blake3"].tobytes()
        return chunk_digest(stored) == expected

    def require_bound(self, chunk: int, stored: memoryview) -> None:
        """Compare a chunk's digest where a root is trusted; to be called before anything decodes the bytes."""
        if self.is_bound and not self.has_digest(chunk, stored):
            del stored  # a traceback that holds a view of the file would keep it open
            raise IntegrityError("stored bytes are not those that the root digest binds")

    def close(self) -> None:
        """Close the payload."""
        self.reader.close()

    def __enter__(self) -> OpenPartition:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def open_partition_files(
    path: Path, io: IoMode = "auto", entry: PartitionEntry | None = None, *, is_bound: bool = False
) -> OpenPartition:
    """Open a partition by its manifest or payload; raises on the first fault.  For the rest `read_partition_files`."""
    if path.suffix == ".bin":
        path = path.with_suffix(".json")

    def fail(fault: Fault) -> NoReturn:
        raise IntegrityError(
            fault.what,
            path=fault.file,
            tensor=fault.tensor,
            offset=fault.start,
            hint=f"See all damage with: mmsplit verify {path if entry is None else path.parent}",
        )

    partition = read_partition_files(path, fail, io, entry, is_bound=is_bound)
    if partition is None:  # pragma: no cover - whatever prevents it has been reported
        raise IntegrityError("partition cannot be opened", path=path)
    return partition


def read_partition_files(
    path: Path, report: Report, io: IoMode = "auto", entry: PartitionEntry | None = None, *, is_bound: bool = False
) -> OpenPartition | None:
    """Open a partition by its manifest at `path`, reporting every fault on the way; None if too little is sound.

    `entry` is what a set says of it, and `is_bound` that the entry is trusted: then nothing that its digest does not
    bind is even parsed.  Raises `FormatError` for a partition of a version not known here, and for what is no
    partition at all.
    """
    data = _read_manifest_file(path, report)
    if data is not None and entry is not None and sha256_of(data) != entry.manifest_sha256:
        report(Fault(str(path), "manifest is not the one the set was made with", 0, len(data)))
    trusted = entry.manifest_sha256 if is_bound and entry is not None else None
    payload = path.with_suffix(".bin")
    if not payload.is_file():
        if data is not None and trusted in (None, sha256_of(data)):
            try:
                parse_manifest(data, str(path))
            except IntegrityError as error:
                report(Fault(str(path), error.what))
        report(Fault(str(payload), "payload is missing"))
        return None
    try:
        reader = FileReader(payload, io=io, changed_error=IntegrityError)
    except OSError as error:
        refuse_shortage(error, payload)
        report(Fault(str(payload), f"payload cannot be read: {error.strerror}"))
        return None
    try:
        partition = _read_payload(path, data, reader, report, trusted)
    except BaseException:
        reader.close()
        raise
    if partition is None:
        reader.close()
    return partition


def read_manifest_copy(payload: Path) -> bytes:
    """Return the manifest that a payload carries, byte for byte the partition's JSON; raises if it is not sound."""
    with FileReader(payload, io="pread", changed_error=IntegrityError) as reader:
        _require_payload(reader)
        copy = find_manifest_copy(reader)
        if copy is None:
            raise IntegrityError("payload has no sound trailer; it is truncated, or not finished", path=payload)
        return copy


def find_manifest_copy(payload: PayloadBytes) -> bytes | None:
    """Return the manifest that a payload carries, None if it or the trailer is not sound."""
    trailer = _read_trailer(payload)
    return None if trailer is None else _manifest_copy(payload, trailer)


def _read_manifest_file(path: Path, report: Report) -> bytes | None:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            report(Fault(str(path), f"manifest is larger than {MAX_MANIFEST_BYTES:,} bytes"))
            return None
        return read_regular(path)
    except FileNotFoundError:
        report(Fault(str(path), "manifest is missing"))
        return None
    except OSError as error:
        refuse_shortage(error, path)
        report(Fault(str(path), f"manifest cannot be read: {error.strerror}"))
        return None


def _read_payload(
    path: Path, data: bytes | None, reader: FileReader, report: Report, trusted: str | None
) -> OpenPartition | None:
    payload = str(reader.path)
    _require_payload(reader)
    trailer = _read_trailer(reader)
    copy = None
    if trailer is None:
        start = max(0, reader.size_bytes - TRAILER_BYTES)
        report(
            Fault(
                payload,
                "payload does not end in its trailer; it is damaged or truncated",
                start,
                reader.size_bytes,
            )
        )
    else:
        copy = _manifest_copy(reader, trailer)
        if copy is None:
            stop = trailer.manifest_offset + trailer.manifest_bytes
            report(Fault(payload, "payload's copy of the manifest is damaged", trailer.manifest_offset, stop))
    manifest = _choose_manifest(path, data, trailer, copy, report, trusted)
    if manifest is None:
        return None
    header = pack_header(manifest.part_id, manifest.num_parts, manifest.plan_digest, manifest.source_digest)
    if reader.read(0, DATA_START) != header:
        report(
            Fault(
                payload,
                "file header is not that of the manifest's partition",
                0,
                DATA_START,
                manifest.part_id,
            )
        )
    named = _MANIFEST_NAME.match(path.name)
    if named and int(named[1]) != manifest.part_id:
        what = f"file holds partition {manifest.part_id}, not {named[1]}"
        place = str(path)
        if copy is not None and data != copy:
            what, place = f"payload is that of partition {manifest.part_id}: out of place", payload
        report(Fault(place, what, partition=int(named[1])))
    index_stop = manifest.data_stop + manifest.chunk_count * RECORD_BYTES
    if trailer is not None and (trailer.index_offset, trailer.manifest_offset) != (manifest.data_stop, index_stop):
        what = "payload's trailer does not lead to the manifest's chunk index"
        report(Fault(payload, what, reader.size_bytes - TRAILER_BYTES, reader.size_bytes, manifest.part_id))
    index = _read_index(manifest, reader, report, is_bound=trusted is not None)
    return None if index is None else OpenPartition(path, manifest, index, reader, is_bound=trusted is not None)


def _require_payload(reader: FileReader) -> None:
    if reader.size_bytes < DATA_START:
        raise IntegrityError("payload is truncated", path=reader.path, expected=DATA_START, found=reader.size_bytes)
    require_payload_header(reader.read(0, HEADER_BYTES), str(reader.path))


def _read_trailer(reader: PayloadBytes) -> Trailer | None:
    size = reader.size_bytes
    return parse_trailer(reader.read(max(0, size - TRAILER_BYTES), size), size)


def _manifest_copy(reader: PayloadBytes, trailer: Trailer) -> bytes | None:
    if trailer.manifest_bytes > MAX_MANIFEST_BYTES:
        return None
    data = reader.read(trailer.manifest_offset, trailer.manifest_offset + trailer.manifest_bytes)
    return data if xxhash.xxh3_64_intdigest(data) == trailer.manifest_xxh3 else None


def _choose_manifest(
    path: Path, data: bytes | None, trailer: Trailer | None, copy: bytes | None, report: Report, trusted: str | None
) -> Manifest | None:
    """Return the manifest that the payload carries, else the one on disk; only one of digest `trusted`, if given."""
    if data is not None and trailer is not None:
        is_other = data != copy if copy is not None else xxhash.xxh3_64_intdigest(data) != trailer.manifest_xxh3
        if is_other and (copy is None or trusted is not None or not _is_out_of_place(path, data, copy)):
            report(Fault(str(path), "manifest is not the one written with this payload", 0, len(data)))
    if trusted is not None:
        data, copy = (None if text is None or sha256_of(text) != trusted else text for text in (data, copy))
    if data is not None:
        refuse_other_version(data, str(path))
    try:
        if copy is not None:
            return parse_manifest(copy, str(path))
        if data is not None:
            return parse_manifest(data, str(path))
    except FormatError as error:
        # The copy has its checksum, so it is what was written; JSON beside a payload of our version is damaged.
        if copy is not None:
            raise
        report(Fault(str(path), error.what))
    except IntegrityError as error:
        report(Fault(str(path), error.what))
    return None


def _is_out_of_place(path: Path, data: bytes, copy: bytes) -> bool:
    """Whether the manifest is of the partition that its name says, and the payload's copy is of another one."""
    named = _MANIFEST_NAME.match(path.name)
    try:
        found = parse_manifest(data, str(path)).part_id, parse_manifest(copy, str(path)).part_id
    except (FormatError, IntegrityError):
        return False
    return named is not None and found[0] == int(named[1]) != found[1]


def _read_index(manifest: Manifest, reader: FileReader, report: Report, *, is_bound: bool) -> ChunkIndex | None:
    payload, size = str(reader.path), manifest.chunk_count * RECORD_BYTES
    start, stop = manifest.data_stop, manifest.data_stop + size
    if stop > reader.size_bytes or manifest.data_stop % SLOT_ALIGNMENT:
        report(Fault(payload, "payload is too short for its chunk index", start, stop, manifest.part_id))
        return None
    data = reader.read(start, stop)
    if sha256_of(data) != manifest.index_sha256:
        report(Fault(payload, "chunk index is damaged", start, stop, manifest.part_id))
        if is_bound:
            return None
    index = np.frombuffer(data, CHUNK_RECORD)
    fault = find_fault(index, [tensor.size_bytes for tensor in manifest.stored_tensors()], manifest.data_stop)
    if fault is not None:
        record = start + fault[0] * RECORD_BYTES
        what = f"chunk {fault[0]:,} {fault[1]}"
        report(Fault(payload, what, record, record + RECORD_BYTES, manifest.part_id))
        return None
    for layer in manifest.layers:
        for fault_in_layer in _layer_faults(layer, manifest, index, str(reader.path)):
            report(fault_in_layer)
    return index


def _layer_faults(layer: LayerEntry, manifest: Manifest, index: ChunkIndex, payload: str) -> list[Fault]:
    if not layer.stored:
        return []
    faults = []
    chunks = sum(tensor.chunk_count for tensor in layer.tensors)
    if chunks:
        first = layer.tensors[0].first_chunk
        rows = index[first : first + chunks]
        stop = int(rows["stored_offset"][-1]) + int(rows["stored_bytes"][-1])
        if int(rows["stored_offset"][0]) != layer.start or not layer.start <= stop <= layer.stop <= manifest.data_stop:
            faults.append(
                Fault(
                    payload,
                    "layer does not lie where the manifest says",
                    layer.start,
                    layer.stop,
                    manifest.part_id,
                    layer.name,
                )
            )
    for tensor in layer.tensors:
        if tensor_checksum(_raw_checksums(tensor, index)) != tensor.xxh3:
            faults.append(
                Fault(
                    payload,
                    "checksum in the manifest is not that of the chunk index",
                    layer.start,
                    layer.stop,
                    manifest.part_id,
                    layer.name,
                    tensor.name,
                )
            )
    return faults


def _raw_checksums(tensor: TensorEntry, index: ChunkIndex) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    return index["raw_xxh3"][tensor.first_chunk : tensor.first_chunk + tensor.chunk_count]


def require_partition(path: Path, part_id: int) -> None:
    """Raise `MissingPartitionError` unless manifest and payload of a partition are there."""
    for name in (manifest_name(part_id), payload_name(part_id)):
        if not (path / name).is_file():
            raise MissingPartitionError(
                f"partition {part_id} is not here",
                path=path / name,
                hint="Copy it into the set, then run again.",
            )
