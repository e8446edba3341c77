"""`--consume`: the option, and what is said before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from mmsplit.cli.render import size
from mmsplit.sidecar.disk_forecast import DiskForecast

F = TypeVar("F", bound=Callable[..., Any])
#: Steps shown one by one; of more, only how many there are.
_STEPS_SHOWN = 12


def consume_option(what: str, when: str) -> Callable[[F], F]:
    """Return the decorator that adds `--consume`."""
    text = f"Delete each {what} as soon as {when}, read back from the disk; says first how much more disk it takes."
    return click.option("--consume", is_flag=True, help=text)


def announce_disk(disk: DiskForecast) -> None:
    """Say on stderr what a run that deletes as it goes will do to the disk."""
    expected = "" if disk.expected_bytes == disk.extra_bytes else f", about {size(disk.expected_bytes)} expected"
    free = f"; {size(disk.free_bytes)} free" if disk.free_bytes else ""
    click.echo(f"note: at most {size(disk.extra_bytes)} more disk needed{expected}{free}", err=True)
    for step in disk.steps[:_STEPS_SHOWN]:
        if step.deleted:
            after = f"after {_names(step.written)}" if step.written else "first"
            click.echo(f"note: {after}: delete {_names(step.deleted)}, {size(step.freed_bytes)}", err=True)
    if len(disk.steps) > _STEPS_SHOWN:
        click.echo(f"note: and {len(disk.steps) - _STEPS_SHOWN} steps more, as --json shows", err=True)


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]} ({len(names)})"
