"""Blocking work for an event loop: in a thread of its own, which ends before a cancelled task does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mmsplit.workers import Progress, ProgressCallback

R = TypeVar("R")


class _Cancelled(Exception):  # noqa: N818 - not an error: somebody wants no more
    """Raised in a verb by its progress callback, when the task that waits for the verb was cancelled."""


async def run_in_thread(work: Callable[[ProgressCallback], R], progress: ProgressCallback | None) -> R:
    """Run `work` with a callback that ends it if this task is cancelled; return or raise only when it has ended."""
    cancelled = threading.Event()

    def report(state: Progress) -> None:
        if cancelled.is_set():
            raise _Cancelled
        if progress is not None:
            progress(state)

    executor = ThreadPoolExecutor(1, "mmsplit")
    job = asyncio.get_running_loop().run_in_executor(executor, work, report)
    executor.shutdown(wait=False)  # takes no more work; its thread ends with this one
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        cancelled.set()
        await _wait_until_done(job)
        raise


async def _wait_until_done(job: asyncio.Future[R]) -> None:
    """Wait for `job`, whatever becomes of it, and through further attempts to cancel."""
    while not job.done():
        try:
            await asyncio.wait([job])
        except asyncio.CancelledError:
            pass  # the first is on its way already, and must not overtake the thread
    if not job.cancelled():
        job.exception()  # looked at, so that nobody is told that it was not
