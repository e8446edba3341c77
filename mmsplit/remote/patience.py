"""How often, and after what pauses, a failed transfer is tried again."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Final, NamedTuple, NoReturn

from mmsplit.errors import NetworkError
from mmsplit.remote.remote_file import GoOn, never_stop
from mmsplit.remote.transfer_log import Traffic

#: A cancelled caller is noticed after so long at the latest, also in the middle of a pause.
_STEP_SECONDS: Final = 0.2


class Limits(NamedTuple):
    """When to give up.  Failures are counted since the last byte that arrived."""

    failures: int = 8
    #: For a host that has never answered: more likely a wrong name or no network than a bad moment.
    failures_before_contact: int = 3
    #: For a server that refuses what a fresh redirect points at.
    refusals: int = 3
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 20.0
    #: The longest pause a server may ask for; one that asks for more is not waited for.
    longest_retry_after_seconds: float = 600.0
    #: How long a connection may be silent; None for what huggingface_hub was told (HF_HUB_DOWNLOAD_TIMEOUT).
    silence_seconds: float | None = None


class Clock(NamedTuple):
    """Time and chance, so that tests need neither."""

    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.time
    chance: Callable[[], float] = random.random


class TransferInterrupted(Exception):  # noqa: N818 - not the end: another attempt may mend it
    """A request or a body ended badly in a way that another attempt may mend.

    `reason` is a clause for the user, without secrets.  `retry_after_seconds` is what the server asked for.
    `most_failures` overrides `Limits.failures`, and `final_error` is raised when the attempts are used up, instead
    of a general one.
    """

    def __init__(
        self,
        reason: str,
        *,
        retry_after_seconds: float | None = None,
        most_failures: int | None = None,
        final_error: NetworkError | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds
        self.most_failures = most_failures
        self.final_error = final_error


class Attempts:
    """Counts the failures of one transfer since its last progress, and pauses between attempts.

    Not shared between threads.  `where` is the file or page for messages; it holds no secrets.
    """

    def __init__(self, where: str, limits: Limits, clock: Clock, traffic: Traffic, go_on: GoOn = never_stop) -> None:
        self._where = where
        self._limits = limits
        self._clock = clock
        self._traffic = traffic
        self._go_on = go_on
        self._failure_count = 0

    def progressed(self) -> None:
        """Forget the failures so far: a byte has arrived."""
        self._failure_count = 0

    def failed(self, interruption: TransferInterrupted, offset: int | None = None) -> None:
        """Count a failure and pause before the next attempt.

        `offset` is the byte reached.  Raises `NetworkError` when it is time to give up.
        """
        self._failure_count += 1
        asked = interruption.retry_after_seconds
        most = self._limits.failures if interruption.most_failures is None else interruption.most_failures
        if asked is not None and asked > self._limits.longest_retry_after_seconds:
            self._give_up(interruption, f"; the server asks to wait {asked:,.0f} seconds", offset)
        if self._failure_count >= most:
            self._give_up(interruption, f"; gave up after {self._failure_count} attempts", offset)
        self._traffic.retried()
        self._pause(self._pause_seconds(asked))

    def _give_up(self, interruption: TransferInterrupted, why: str, offset: int | None) -> NoReturn:
        final = interruption.final_error or NetworkError(
            interruption.reason + why,
            path=self._where,
            offset=offset,
            hint="Run the same command again: it continues from what is there.",
        )
        raise final from None  # the interruption says nothing that the error does not

    def _pause_seconds(self, asked: float | None) -> float:
        limits = self._limits
        usual = min(limits.longest_pause_seconds, limits.first_pause_seconds * 2.0 ** (self._failure_count - 1))
        if asked is not None:
            # Never earlier than asked, and not all clients in the same instant.
            return asked + limits.first_pause_seconds * self._clock.chance()
        return usual * (0.5 + 0.5 * self._clock.chance())

    def _pause(self, seconds: float) -> None:
        steps = math.ceil(seconds / _STEP_SECONDS)
        for _ in range(steps):
            self._go_on()
            self._clock.sleep(seconds / steps)
        self._go_on()


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Parse a Retry-After header, seconds or an HTTP date, into seconds from `now`; None if it is neither."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:12])
    from email.utils import parsedate_to_datetime  # and with it sockets: rarely needed, long to import

    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, OverflowError, TypeError):
        return None
