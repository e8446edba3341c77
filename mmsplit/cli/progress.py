"""Progress on stderr: bytes, rate, time left; one line per stage, nothing for work under a second."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import Any, Final

from mmsplit.workers import Progress

_SECONDS_BETWEEN_LINES: Final = 10.0


class ProgressDisplay:
    """A progress callback that draws; used in a `with` block so that the line is ended whatever happens."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._lock = threading.Lock()
        self._stage: str | None = None
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        """Draw; may be called from any thread."""
        if self._quiet:
            return
        with self._lock:
            if progress.stage != self._stage or progress.total_bytes != self._bar.total:
                self._start(progress)
            self._bar.update(progress.done_bytes - self._bar.n)

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _start(self, progress: Progress) -> None:
        from tqdm import tqdm

        self._end()
        self._stage = progress.stage
        # A log file gets a line now and then, a terminal one that moves.
        between = 0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
        self._bar = tqdm(
            desc=progress.stage,
            total=progress.total_bytes,
            unit="B",
            unit_scale=True,
            delay=1,
            mininterval=between,
            maxinterval=between,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
