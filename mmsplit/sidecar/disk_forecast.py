"""How much more disk something needs that writes files and deletes others on its way.  Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class DiskStep(NamedTuple):
    """`written` is written, at most `worst_bytes` and about `expected_bytes` of it; then `deleted` gives `freed_bytes`.

    Bytes are those of the file system that is written to: what is deleted elsewhere frees nothing there.
    """

    written: tuple[str, ...]
    worst_bytes: int
    expected_bytes: int
    deleted: tuple[str, ...]
    freed_bytes: int

    def as_json(self) -> dict[str, object]:
        """Return the step as JSON shows it."""
        return {**self._asdict(), "written": list(self.written), "deleted": list(self.deleted)}


class DiskForecast(NamedTuple):
    """What a run that deletes as it goes will do to the disk, said before it does anything.

    `extra_bytes` is the most that will be in use beyond what is now, however badly the weights compress;
    `expected_bytes` the same for the compression that a sample of them showed.  `free_bytes` are free now.
    """

    steps: tuple[DiskStep, ...]
    extra_bytes: int
    expected_bytes: int
    free_bytes: int

    def as_json(self) -> dict[str, object]:
        """Return the forecast as JSON shows it."""
        return {**self._asdict(), "steps": [step.as_json() for step in self.steps]}


def forecast(steps: Iterable[DiskStep], base_bytes: int, free_bytes: int) -> DiskForecast:
    """Return what the steps need, one after the other; `base_bytes` are written beside them, and stay."""
    steps = tuple(steps)
    worst = peak((step.worst_bytes, step.freed_bytes) for step in steps)
    expected = peak((step.expected_bytes, step.freed_bytes) for step in steps)
    return DiskForecast(steps, base_bytes + worst, base_bytes + expected, free_bytes)


def peak(steps: Iterable[tuple[int, int]]) -> int:
    """Return the most that is in use beyond the beginning, given what each step writes and then frees."""
    used = most = 0
    for written, freed in steps:
        used += written
        most = max(most, used)
        used -= freed
    return most
