"""How to verify a little at a time: which part, since when, how fast, and where it is written down."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from mmsplit.cli.options import PATH
from mmsplit.sidecar.scrub_run import Scrub

F = TypeVar("F", bound=Callable[..., Any])

_AGE: Final = re.compile(r"(\d{1,6})([hdw])", re.ASCII)
_HOURS: Final = {"h": 1, "d": 24, "w": 7 * 24}
_RATE: Final = re.compile(r"(\d{1,15})\s?(|[kKMGT]i?B?|B)(/s)?", re.ASCII)
_POWERS: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class _Since(click.ParamType[datetime | timedelta]):
    """A moment, or an age."""

    name = "when"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime | timedelta:
        """Take 12h, 30d, 2w, or a date with or without a time."""
        if isinstance(value, datetime | timedelta):
            return value
        age = _AGE.fullmatch(str(value))
        if age:
            return timedelta(hours=int(age[1]) * _HOURS[age[2]])
        try:
            moment = datetime.fromisoformat(str(value))
            return moment.astimezone(UTC)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is neither an age such as 12h, 30d or 2w nor a date such as 2026-01-31", param, ctx)


class _Rate(click.ParamType[int]):
    """Bytes per second."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Take 100MB, 50MiB, 1000000."""
        if isinstance(value, int):
            return value
        rate = _RATE.fullmatch(str(value).strip())
        if rate is None or int(rate[1]) == 0:
            self.fail(f"{value!r} is not a rate such as 100MB or 50MiB per second", param, ctx)
        unit = rate[2].removesuffix("B")
        step = 1024 if unit.endswith("i") else 1000
        return int(rate[1]) * int(step ** _POWERS[unit.removesuffix("i").upper()])


def scrub_options(command: F) -> F:
    """Add the options for checking a little every night."""
    for option in reversed(
        (
            click.option(
                "--subset",
                metavar="N/M",
                help="Only the chunks of the N-th of M equal parts, as 3/7: for each night one.",
            ),
            click.option(
                "--since",
                type=_Since(),
                help="With --history: only chunks not verified since then (12h, 30d, 2w, or a date).",
            ),
            click.option(
                "--history",
                type=PATH,
                help="Append what was verified, and what was found, to this file of JSON lines.",
            ),
            click.option("--max-rate", type=_Rate(), help="Read at most so much per second: 100MB."),
        )
    ):
        command = option(command)
    return command


def scrub_of(
    subset: str | None, since: datetime | timedelta | None, history: Path | None, max_rate: int | None
) -> Scrub | None:
    """Return what these options say; None if none was given."""
    if (subset, since, history, max_rate) == (None, None, None, None):
        return None
    return Scrub(subset=subset, since=since, history=history, max_rate=max_rate)
