"""Payloads with parity files, in the guise of another copy of the set: what is damaged is made again as it is read.

So whoever repairs from copies repairs from parity, and holds what it gets to the same checksums.  Which blocks are
damaged, the checksums in the parity file say; should these lie, those of the chunks do not.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmsplit.checkpoint import FileReader, Scratch
from mmsplit.codec.erasure import StripeCode
from mmsplit.digests import sha256_of
from mmsplit.errors import CheckpointError, FormatError, IntegrityError, MissingExtraError, RemoteNotFoundError
from mmsplit.remote.remote_file import GoOn, RemoteFile, never_stop
from mmsplit.remote.set_source import SetSource
from mmsplit.repairing.sources import SetCopy
from mmsplit.sidecar.manifest import payload_name
from mmsplit.sidecar.output_files import output_errors
from mmsplit.sidecar.parity_file import ParityFile
from mmsplit.sidecar.parity_layout import parity_name
from mmsplit.sidecar.parity_stripes import Band, StripeBuffer, stripes_at_once
from mmsplit.sidecar.partition_reader import OpenPartition, find_manifest_copy

_LOCATION: Final = "parity"
_MANIFEST: Final = re.compile(r"partition_(\d+)\.json\Z", re.ASCII)
_PAYLOAD: Final = re.compile(r"partition_(\d+)\.bin\Z", re.ASCII)


class ParityCopy(SetCopy):
    """What the parity files in `root` make of the payloads there.

    `digests` has for each partition the SHA-256 of its manifest, as far as the set manifest is there to say it: parity
    of another payload is not used.  Neither is one without a sound header.
    """

    def __init__(self, root: Path, digests: Mapping[int, str]) -> None:
        super().__init__(SetSource(_LOCATION, self._open_file, directory=root))
        self._root = root
        self._digests = digests
        self._opening = threading.Lock()
        # One at a time, as partitions are repaired: a set may have more of them than may be open.
        self._current: tuple[int, RestoredPayload | None] | None = None

    def open(self, name: str) -> RemoteFile:
        """Return a payload.  Raises `RemoteNotFoundError` if it has no parity that can be used."""
        return self._open_file(name)

    def may_have(self, partition: OpenPartition, chunk: int) -> bool:  # noqa: ARG002
        """Whether the partition has parity; whether that is enough shows when it is tried."""
        return self._payload_of(partition.manifest.part_id) is not None

    def whole_file(self, name: str, limit_bytes: int) -> bytes | None:
        """Return a manifest, from the payload that carries it."""
        match = _MANIFEST.match(name)
        payload = None if match is None else self._payload_of(int(match[1]))
        return None if payload is None else payload.manifest(limit_bytes)

    def close(self) -> None:
        """Close the parity file that is open."""
        if self._current is not None and self._current[1] is not None:
            self._current[1].close()
        self._current = None

    def _open_file(self, name: str) -> RemoteFile:
        match = _PAYLOAD.match(name)
        payload = None if match is None else self._payload_of(int(match[1]))
        if payload is None:
            raise RemoteNotFoundError("no parity", path=name)
        return payload

    def _payload_of(self, part_id: int) -> RestoredPayload | None:
        with self._opening:
            if self._current is None or self._current[0] != part_id:
                self.close()
                path, payload = self._root / payload_name(part_id), None
                if path.is_file():
                    parity = _open_parity(self._root / parity_name(part_id), part_id, self._digests.get(part_id))
                    payload = None if parity is None else RestoredPayload(path, parity)
                self._current = part_id, payload
            return self._current[1]


class RestoredPayload(RemoteFile):
    """A payload as it was when its parity was made.  Reading raises `IntegrityError` where too much of it is lost."""

    def __init__(self, path: Path, parity: ParityFile) -> None:
        self._path = path
        self._parity = parity
        self._lock = threading.Lock()
        self._code: StripeCode | None = None
        self._buffer: StripeBuffer | None = None

    @property
    def name(self) -> str:
        """The payload's name."""
        return self._path.name

    @property
    def location(self) -> str:
        """Where the parity lies, for messages."""
        return str(self._parity.path)

    @property
    def size_bytes(self) -> int:
        """Length of the payload when it was whole."""
        return self._parity.layout.payload_bytes

    def stream(self, start: int, stop: int, go_on: GoOn = never_stop) -> Iterator[bytes]:
        """Yield the bytes of [start, stop); what is damaged is made again from the other blocks of its stripes."""
        self._check_range(start, stop)
        layout = self._parity.layout
        size = layout.block_bytes
        # Opened for the time of the call: what was mended meanwhile counts, and the file may have grown.
        with output_errors(self._path):
            reader = FileReader(self._path, io="pread", changed_error=IntegrityError)
        with reader:
            position = start
            while position < stop:
                go_on()
                column, stripe = divmod(position // size, layout.stripe_count)
                most = min(stripes_at_once(layout), layout.stripe_count - stripe)
                end = min(stop, (position // size + most) * size)
                band = Band(stripe, stripe + -(-(end - position // size * size) // size))
                block = self._read(reader, column, band)
                skip = position % size
                yield block[skip : skip + end - position]
                position = end

    def manifest(self, limit_bytes: int) -> bytes | None:
        """Return the manifest that the payload carries, None if it cannot be made again, or is another."""
        data = find_manifest_copy(self)
        if data is None or len(data) > limit_bytes:
            return None
        is_it = self._parity.header.manifest_sha256 == sha256_of(data)
        return data if is_it else None

    def close(self) -> None:
        """Close the parity file."""
        self._parity.close()

    def _read(self, reader: FileReader, column: int, band: Band) -> bytes:
        """Return the blocks of a column in a band, from the payload if they are sound there."""
        layout = self._parity.layout
        first, count = column * layout.stripe_count + band.start, band.stop - band.start
        start, stop = first * layout.block_bytes, (first + count) * layout.block_bytes
        if stop <= reader.size_bytes:
            data = _read_or_none(reader, start, stop)
            if data is not None and self._are_sound(memoryview(data), first, count):
                return data
        with self._lock:  # the buffer is large, and the code holds the GIL anyway
            return self._restore(reader, column, band)

    def _are_sound(self, data: memoryview, first: int, count: int) -> bool:
        expected, known = self._parity.checksums(first, count)
        size = self._parity.layout.block_bytes
        found = (xxhash.xxh3_64_intdigest(data[number * size : (number + 1) * size]) for number in range(count))
        return bool(known.all()) and all(a == b for a, b in zip(found, expected.tolist(), strict=True))

    def _restore(self, reader: FileReader, column: int, band: Band) -> bytes:
        layout = self._parity.layout
        if self._buffer is None:
            self._buffer = StripeBuffer(layout)
        there = self._buffer.read(reader, band)
        found = self._buffer.checksums()
        for number in range(layout.data_count):
            first = number * layout.stripe_count + band.start
            count = max(0, min(band.stop - band.start, layout.block_count - first))  # behind the end all are sound
            expected, known = self._parity.checksums(first, count)
            there[number, :count] &= known & (found[number, :count] == expected)
        restored = self._restore_stripes(self._buffer, column, band, there)
        return b"".join(
            restored.get(stripe) or self._buffer.block(column, stripe) for stripe in range(band.start, band.stop)
        )

    def _restore_stripes(
        self, buffer: StripeBuffer, column: int, band: Band, there: NDArray[np.bool_]
    ) -> dict[int, bytes]:
        """Return the damaged blocks of a column as they were, by stripe."""
        layout, size = self._parity.layout, self._parity.layout.block_bytes
        parity = {
            stripe: self._sound_parity(stripe, np.flatnonzero(~there[:, stripe - band.start]).tolist())
            for stripe in range(band.start, band.stop)
            if not there[column, stripe - band.start]
        }
        if not parity:
            return {}
        for number, place in np.argwhere(~there).tolist():
            buffer.clear(number, band.start + place)
        encoded = buffer.encode(self._stripe_code())
        restored = {}
        for stripe, stored in parity.items():
            span = slice((stripe - band.start) * size, (stripe - band.start + 1) * size)
            lost = np.flatnonzero(~there[:, stripe - band.start]).tolist()
            differences = {number: encoded[number, span] ^ block for number, block in stored.items()}
            block = self._stripe_code().restore(column, lost, differences).tobytes()
            expected, known = self._parity.checksums(column * layout.stripe_count + stripe, 1)
            if known[0] and xxhash.xxh3_64_intdigest(block) != int(expected[0]):
                raise IntegrityError("parity does not give what it was made of", path=self._parity.path)
            restored[stripe] = block
        return restored

    def _sound_parity(self, stripe: int, lost: list[int]) -> dict[int, NDArray[np.uint8]]:
        """Return as many parity blocks of a stripe as it has lost blocks, by their numbers."""
        layout, scratch = self._parity.layout, Scratch()
        sound: dict[int, NDArray[np.uint8]] = {}
        for number in range(layout.parity_count):
            if len(sound) == len(lost):
                break
            block = self._parity.parity_block(number, stripe, scratch)
            if block is not None:
                sound[number] = np.frombuffer(block, np.uint8)
        if len(sound) < len(lost):
            raise IntegrityError(
                f"stripe {stripe:,} of {layout.stripe_count:,} has lost {len(lost)} of {layout.data_count} blocks, and"
                f" its {len(sound)} sound parity block(s) make no more than {len(sound)} again",
                path=self._parity.path,
            )
        return sound

    def _stripe_code(self) -> StripeCode:
        if self._code is None:
            try:
                self._code = StripeCode(self._parity.layout.data_count, self._parity.layout.parity_count)
            except MissingExtraError as error:  # other sources do without
                raise IntegrityError(f"{error.what}. {error.hint}", path=self._parity.path) from error
        return self._code


def _read_or_none(reader: FileReader, start: int, stop: int) -> bytes | None:
    try:
        return reader.read(start, stop)
    except (CheckpointError, IntegrityError):
        return None  # a disk that fails


def _open_parity(path: Path, part_id: int, manifest_sha256: str | None) -> ParityFile | None:
    """Open a parity file; None if it is not there, of another payload, or cannot be used."""
    if not path.is_file():
        return None
    try:
        parity = ParityFile(path)
    except (IntegrityError, FormatError):
        return None
    header = parity.header
    if header.part_id != part_id or manifest_sha256 not in (None, header.manifest_sha256):
        parity.close()
        return None
    return parity
