"""A partition arriving: its manifest, its chunk index, then its data, each checked before it counts as there.

Strategy.  The set manifest binds the partition's manifest by SHA-256, that the chunk index likewise, and the index
every chunk by BLAKE3; so whatever lies on disk, from an earlier run or with a flipped bit, is hashed, and exactly what
is not right is fetched.  There is no journal that could lie.  Header and padding follow from the manifest and are not
taken from anybody.  The payload is complete, synced and named before the manifest gets its name: no manifest, no
partition.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmsplit.checkpoint import FileReader
from mmsplit.digests import sha256_of
from mmsplit.errors import FormatError, IntegrityError, OutputExistsError
from mmsplit.regular_files import read_regular
from mmsplit.remote.remote_file import RemoteFile
from mmsplit.sidecar.framing import pack_header
from mmsplit.sidecar.manifest import Manifest, parse_manifest
from mmsplit.sidecar.output_files import (
    PARTIAL_SUFFIX,
    open_new,
    output_errors,
    sync_directory,
    write_all,
    write_whole_file,
)
from mmsplit.sidecar.partition_check import Add, find_intact
from mmsplit.sidecar.partition_reader import MAX_MANIFEST_BYTES
from mmsplit.sidecar.payload_file import PayloadFile
from mmsplit.sidecar.payload_pieces import PayloadPieces
from mmsplit.sidecar.payload_tail import find_index, has_possible_tail
from mmsplit.sidecar.piece_fetcher import FETCH_ATTEMPTS, Published, fetch_pieces
from mmsplit.sidecar.set_manifest import PartitionEntry, SetManifest
from mmsplit.sidecar.set_reader import open_partition_of_set

#: Opens a published file by name.
OpenFile = Callable[[str], RemoteFile]


class Received(NamedTuple):
    """What became of one partition: bytes that were fetched for it, and bytes of its payload that were there.

    The first may exceed its size: what arrives damaged is fetched again.
    """

    part_id: int
    fetched_bytes: int
    present_bytes: int


class PartitionReceiver:
    """One partition of a set on its way into `root`, which the caller holds locked.

    `connections` ranges are fetched at once, each through a buffer of 4 MiB; `threads` hash what is on disk.
    """

    def __init__(
        self,
        root: Path,
        manifest: SetManifest,
        entry: PartitionEntry,
        *,
        connections: int,
        threads: int,
        direct: bool = True,
    ) -> None:
        self.entry = entry
        self._root = root
        self._set = manifest
        self._connections = connections
        self._threads = threads
        self._direct = direct
        self._json_path = root / entry.manifest_file
        self._payload_path = root / entry.payload_file
        self._json_partial = _partial(self._json_path)
        self._partial = _partial(self._payload_path)
        self._fetched_bytes = 0

    @property
    def is_there(self) -> bool:
        """Whether both files of the partition are there, be they right or wrong."""
        return os.path.lexists(self._json_path) and os.path.lexists(self._payload_path)

    @property
    def missing_bytes(self) -> int:
        """How much more of the disk the payload may take."""
        taken = 0
        for path in (self._payload_path, self._partial):
            with output_errors(path):
                if path.is_file():
                    stat = path.stat()
                    # A file that is written at several places at once has holes, which take nothing yet.
                    taken = max(taken, 512 * getattr(stat, "st_blocks", stat.st_size // 512))
        return max(0, self.entry.payload_bytes - taken)

    def receive(self, open_file: OpenFile, add: Add) -> Received:
        """Fetch what is missing or wrong, and name the files.

        Whatever has the partition's names in `root` is taken for its unfinished state: the caller has seen to it that
        it is.  Raises `IntegrityError` if what was published is damaged, or arrives so; `NetworkError`,
        `OutputError`.  What is right by then stays, under the names of work in progress.
        """
        json = self._read_json() or self._fetch_json(open_file)
        self._demote()
        _write_unsynced(self._json_partial, json)
        published = self._look_up(open_file, json)
        present_bytes = self._receive_payload(published, add)
        write_whole_file(self._json_path, json)
        # The one judge of what is a partition has the last word on what was published.
        open_partition_of_set(self._root, self._set, self.entry.part_id, "pread").close()
        return Received(self.entry.part_id, self._fetched_bytes, present_bytes)

    def _read_json(self) -> bytes | None:
        """Return the partition's manifest from the disk, if it is there and the one of the set."""
        for path in (self._json_path, self._json_partial):
            with output_errors(path):
                if path.is_file() and path.stat().st_size <= MAX_MANIFEST_BYTES:
                    data = read_regular(path)
                    if sha256_of(data) == self.entry.manifest_sha256:
                        return data
        return None

    def _fetch_json(self, open_file: OpenFile) -> bytes:
        file = open_file(self.entry.manifest_file)
        if file.size_bytes > MAX_MANIFEST_BYTES:
            raise IntegrityError("published manifest is too large", path=file.location, found=file.size_bytes)
        found = ""
        for _ in range(FETCH_ATTEMPTS):
            data = file.read(0, file.size_bytes)
            self._fetched_bytes += len(data)
            found = sha256_of(data)
            if found == self.entry.manifest_sha256:
                return data
        raise IntegrityError(
            "published manifest is not the one that its set was made with",
            path=file.location,
            expected=self.entry.manifest_sha256,
            found=found,
            hint="Perhaps the set is being published right now: run again. Otherwise it must be published anew.",
        )

    def _demote(self) -> None:
        """Make what has the partition's names work in progress, its manifest first."""
        for path in (self._json_path, self._payload_path, self._json_partial, self._partial):
            if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
                raise OutputExistsError(
                    "not a regular file, but in the place of one", path=path, hint="Move it away, then run again."
                )
        with output_errors(self._root):
            if self._json_path.exists():
                os.replace(self._json_path, self._json_partial)
                sync_directory(self._root)
            if self._payload_path.exists():
                os.replace(self._payload_path, self._partial)

    def _look_up(self, open_file: OpenFile, json: bytes) -> Published:
        manifest = parse_manifest(json, self.entry.manifest_file)
        of_the_set = (self.entry.part_id, len(self._set.partitions), self._set.plan_digest, self._set.source_digest)
        if _identity(manifest) != of_the_set:
            raise IntegrityError("published manifest is that of another partition", path=self.entry.manifest_file)
        file = open_file(self.entry.payload_file)
        size = self.entry.payload_bytes
        if file.size_bytes != size:
            self._require_this_partition(open_file, manifest)
            raise IntegrityError(
                "published payload has another size than its set says",
                path=file.location,
                expected=size,
                found=file.size_bytes,
                hint="Perhaps it is being published right now: run again. Otherwise it must be published anew.",
            )
        if has_possible_tail(manifest, json, size):
            for attempt in range(1 + FETCH_ATTEMPTS):
                tail = self._fetch_tail(file, manifest) if attempt else self._read_tail(manifest)
                index = find_index(tail, manifest, json)
                if index is not None:
                    return Published(file, manifest, tail, PayloadPieces(index, manifest.data_stop))
        self._require_this_partition(open_file, manifest)
        raise IntegrityError(
            "published payload has no sound chunk index, manifest copy and trailer",
            path=file.location,
            offset=manifest.data_stop,
            hint="Verify the set where it was published.",
        )

    def _require_this_partition(self, open_file: OpenFile, manifest: Manifest) -> None:
        """Raise `IntegrityError` if what was published is a sound partition, only not `manifest`'s, that is at hand."""
        file = open_file(self.entry.manifest_file)
        if file.size_bytes > MAX_MANIFEST_BYTES:
            return
        data = file.read(0, file.size_bytes)
        self._fetched_bytes += len(data)
        try:
            published = parse_manifest(data, file.location)
        except (FormatError, IntegrityError):
            return
        differences = [
            f"its {field.replace('_', ' ')} is {getattr(published, field)!r}, not {getattr(manifest, field)!r}"
            for field in ("model_id", "revision", "plan_digest", "source_digest")
            if getattr(published, field) != getattr(manifest, field)
        ]
        if differences:
            raise IntegrityError(
                f"published partition is not the one of this set: {differences[0]}",
                path=file.location,
                hint="Give a copy of this very set, or the checkpoint.",
            )

    def _read_tail(self, manifest: Manifest) -> bytes:
        """Return what an earlier run wrote behind the payload's data, or nothing."""
        with output_errors(self._partial):
            if not self._partial.exists() or self._partial.stat().st_size != self.entry.payload_bytes:
                return b""
            with FileReader(self._partial, io="pread") as reader:
                return reader.read(manifest.data_stop, reader.size_bytes)

    def _fetch_tail(self, file: RemoteFile, manifest: Manifest) -> bytes:
        data = file.read(manifest.data_stop, self.entry.payload_bytes)
        self._fetched_bytes += len(data)
        return data

    def _receive_payload(self, published: Published, add: Add) -> int:
        """Complete and name the payload; return how many of its bytes were there."""
        manifest, pieces = published.manifest, published.pieces
        out = PayloadFile(self._partial, direct=self._direct)
        try:
            # The header first, by which the file is known for ours.
            out.write(0, pack_header(*_identity(manifest)))
            intact = find_intact(pieces, self._partial, self._threads, add)
            missing = np.flatnonzero(~intact).tolist()
            self._fetched_bytes += fetch_pieces(published, missing, out, connections=self._connections, add=add)
            out.write(manifest.data_stop, published.tail)
            out.finish(self.entry.payload_bytes)
        finally:
            out.close()
        add(self.entry.payload_bytes - pieces.size_bytes)
        with output_errors(self._payload_path):
            os.replace(self._partial, self._payload_path)
        sync_directory(self._root)
        return sum(pieces[number].size_bytes for number in np.flatnonzero(intact).tolist())


def _identity(manifest: Manifest) -> tuple[int, int, str, str]:
    return manifest.part_id, manifest.num_parts, manifest.plan_digest, manifest.source_digest


def _write_unsynced(path: Path, data: bytes) -> None:
    """Write what may be lost: whoever finds it compares its digest."""
    with output_errors(path):
        fd = open_new(path)
        try:
            write_all(fd, memoryview(data), 0)
        finally:
            os.close(fd)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL_SUFFIX)
