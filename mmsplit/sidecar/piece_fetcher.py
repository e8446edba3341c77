"""Fetches pieces of a payload over several connections, in bounded memory; what arrives wrong is fetched again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from mmsplit.checkpoint import aligned_buffer
from mmsplit.errors import IntegrityError
from mmsplit.remote.remote_file import GoOn, RemoteFile
from mmsplit.sidecar.manifest import Manifest
from mmsplit.sidecar.partition_check import Add
from mmsplit.sidecar.payload_file import PayloadFile
from mmsplit.sidecar.payload_pieces import PIECE_BYTES, PayloadPieces, Piece
from mmsplit.workers import JobStream, WorkerGroup

#: What arrives wrong is asked for this often in all before it is an error.
FETCH_ATTEMPTS: Final = 3
_MOST_REQUEST_BYTES: Final = 64 << 20
#: So many requests for each connection, if there is enough to fetch, so that all end at about the same time.
_REQUESTS_PER_CONNECTION: Final = 4


class Published(NamedTuple):
    """A payload as it was published: where it lies, and all that is known of it before its data is fetched.

    `tail` is what follows its data.
    """

    file: RemoteFile
    manifest: Manifest
    tail: bytes
    pieces: PayloadPieces


class Run(NamedTuple):
    """Neighbouring pieces [`first`, `last`), to be fetched by one request."""

    first: int
    last: int


def fetch_pieces(published: Published, missing: Sequence[int], out: PayloadFile, *, connections: int, add: Add) -> int:
    """Fetch pieces by their numbers, in order, and write each to its place; return the bytes that were fetched.

    Each connection has a buffer of one piece.  Raises `IntegrityError` for one that arrives damaged again and again.
    """
    runs = list(iter_runs(published.pieces, missing, connections))
    fetchers: list[_PieceFetcher] = []
    with WorkerGroup() as group:

        def make_worker() -> Callable[[Run], None]:
            fetcher = _PieceFetcher(published, out, add, group.go_on)
            fetchers.append(fetcher)
            return fetcher.fetch

        group.start_many("pull", min(connections, len(runs)), JobStream(iter(runs)), make_worker)
    return sum(fetcher.fetched_bytes for fetcher in fetchers)


def iter_runs(pieces: PayloadPieces, numbers: Sequence[int], connections: int) -> Iterator[Run]:
    """Join neighbours into requests: large ones, but enough of them to keep all connections busy."""
    total = sum(pieces[number].size_bytes for number in numbers)
    most = min(_MOST_REQUEST_BYTES, max(PIECE_BYTES, total // (connections * _REQUESTS_PER_CONNECTION)))
    first = last = -1
    for number in numbers:
        if number == last and pieces[number].stop - pieces[first].start <= most:
            last = number + 1
            continue
        if first >= 0:
            yield Run(first, last)
        first, last = number, number + 1
    if first >= 0:
        yield Run(first, last)


class _PieceFetcher:
    """Fetches runs one after the other through a buffer of its own; one per thread."""

    def __init__(self, published: Published, out: PayloadFile, add: Add, go_on: GoOn) -> None:
        self.fetched_bytes = 0
        self._file = published.file
        self._manifest = published.manifest
        self._pieces = published.pieces
        self._out = out
        self._add = add
        self._go_on = go_on
        self._buffer = memoryview(aligned_buffer(PIECE_BYTES))

    def fetch(self, run: Run) -> None:
        """Fetch, check and write a run; pieces that arrive damaged are fetched again after it."""
        damaged = [piece for piece in self._iter_arriving(run) if not self._write_if_right(piece)]
        for piece in damaged:
            self._fetch_again(piece)

    def _iter_arriving(self, run: Run) -> Iterator[Piece]:
        """Yield each piece of a run when all of it is in the buffer."""
        number, filled = run.first, 0
        piece = self._pieces[number]
        for block in self._file.stream(piece.start, self._pieces[run.last - 1].stop, self._go_on):
            self.fetched_bytes += len(block)
            rest = memoryview(block)
            while rest:
                part = rest[: piece.size_bytes - filled]
                self._buffer[filled : filled + len(part)] = part
                rest, filled = rest[len(part) :], filled + len(part)
                if filled == piece.size_bytes:
                    yield piece
                    number, filled = number + 1, 0
                    piece = self._pieces[number] if number < run.last else piece

    def _fetch_again(self, piece: Piece) -> None:
        data = self._buffer[: piece.size_bytes]
        for _ in range(FETCH_ATTEMPTS - 1):
            self._file.read_into(piece.start, data, self._go_on)
            self.fetched_bytes += piece.size_bytes
            if self._write_if_right(piece):
                return
        chunk = self._pieces.first_damaged(piece, data)
        assert chunk is not None  # or the last attempt would have been written
        start, stop = self._pieces.chunk_range(chunk)
        raise IntegrityError(
            f"chunk of {stop - start:,} bytes arrives damaged, {FETCH_ATTEMPTS} times in a row",
            path=self._file.location,
            tensor=self._pieces.tensor_of(chunk, self._manifest),
            offset=start,
            hint="Verify the set where it was published; a proxy in between may be at fault, too."
            " What is right stays: the same command goes on from there.",
        )

    def _write_if_right(self, piece: Piece) -> bool:
        data = self._buffer[: piece.size_bytes]
        if self._pieces.first_damaged(piece, data) is not None:
            return False
        self._pieces.clear_padding(piece, data)
        if piece.is_aligned:
            self._out.write_block(piece.start, data)
        else:
            self._out.write(piece.start, data)
        self._add(piece.size_bytes)
        return True
