"""One verification of a part: what is asked for, what of it the history has, and the line that is added to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from mmsplit.errors import RequestError
from mmsplit.sidecar.chunk_check import Wanted
from mmsplit.sidecar.pace import Pace
from mmsplit.sidecar.partition_reader import Fault, OpenPartition
from mmsplit.sidecar.scrub import Stretch, Subset, chunks_within, parse_subset, without
from mmsplit.sidecar.scrub_history import HistoryEntry, append_entry, read_entries, verified_since


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Scrub(NamedTuple):
    """How to verify a little at a time; each field by itself or with others.

    `subset` "3/7" looks at the third of seven equal parts.  `history` is a file of JSON lines that gets one for each
    verification.  With `since`, a moment or an age, only chunks are looked at that the history does not have as
    verified from then on.  `max_rate` is in bytes per second, for all threads together.  `now` tells the time.
    """

    subset: str | None = None
    since: datetime | timedelta | None = None
    history: str | Path | None = None
    max_rate: int | None = None
    now: Callable[[], datetime] = _utc_now


class ScrubRun:
    """A scrub of one set, or of one partition.

    `of` is its digest, None if that could not be read; `partition` is the single partition's number.  `payload_bytes`
    are the lengths that the payloads should have, in order.  With `is_bound` a root digest is trusted, so what the
    history has counts only if chunks were held to their digests.  Raises `RequestError` for what cannot be done.
    """

    def __init__(
        self,
        scrub: Scrub,
        level: str,
        of: str | None,
        partition: int | None,
        payload_bytes: Sequence[int],
        *,
        is_bound: bool = False,
    ) -> None:
        self.pace = None if scrub.max_rate is None else Pace(scrub.max_rate)
        self._subset = Subset(1, 1) if scrub.subset is None else parse_subset(scrub.subset)
        self._level = level
        self._of = of
        self._partition = partition
        self._is_bound = is_bound
        self._scrub = scrub
        self._begun = scrub.now()
        self._starts = [0, *accumulate(payload_bytes)]
        if level == "quick" and (scrub.subset, scrub.since, scrub.max_rate) != (None, None, None):
            raise RequestError("level quick looks at no chunk, so there is nothing to choose from", hint="Use stored.")
        self._since = self._moment()
        whole = Stretch(0, self._starts[-1])
        self._stretches: tuple[Stretch, ...] = ()
        if level != "quick":
            self._stretches = without(self._subset.stretch_of(whole.stop), self._known())
        self._chunks = 0

    @property
    def size_bytes(self) -> int:
        """About how much there is to read."""
        return sum(stop - start for start, stop in self._stretches)

    def wanted(self, number: int, partition: OpenPartition) -> Wanted:
        """Flag the chunks to look at in the payload that is the `number`-th, from 0."""
        wanted = chunks_within(partition.index, self._starts[number], self._stretches)
        self._chunks += int(wanted.sum())
        return wanted

    def finish(self, checked_bytes: int, problems: Sequence[Fault]) -> None:
        """Add the line to the history, if there is one.  Raises `OutputError`."""
        if self._scrub.history is None:
            return
        entry = HistoryEntry(
            time=self._begun,
            of=self._of,
            partition=self._partition,
            level=self._level,
            digests=self._level == "full" or (self._is_bound and self._level != "quick"),
            subset=self._scrub.subset,
            since=self._since,
            stretches=self._stretches,
            chunks=self._chunks,
            bytes=checked_bytes,
            faults=len(problems),
        )
        append_entry(Path(self._scrub.history), entry, problems)

    def _moment(self) -> datetime | None:
        since = self._scrub.since
        if since is None:
            return None
        if self._scrub.history is None:
            raise RequestError("what was verified since then is in no history", hint="Name it: --history FILE.")
        if isinstance(since, timedelta):
            return self._begun - since
        return since.astimezone(UTC)  # without a time zone it is local time

    def _known(self) -> tuple[Stretch, ...]:
        if self._since is None or self._scrub.history is None or self._of is None:
            return ()
        # A clock that was wrong must not keep chunks from being verified for years.
        past = [entry for entry in read_entries(Path(self._scrub.history)) if entry.time <= self._begun]
        return verified_since(past, self._of, self._level, self._since, digests=self._is_bound)
