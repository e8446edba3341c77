"""Small ranges are asked for once, with a little around them; the memory for it is bounded."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsplit.remote import small_ranges
from mmsplit.remote.small_ranges import SmallRanges

DATA = random.Random(1).randbytes(10_000)


class _File:
    """A remote file that counts what is asked of it."""

    def __init__(self, name: str = "f") -> None:
        self.name = name
        self.size_bytes = len(DATA)
        self.asked: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> bytes:
        assert 0 <= start <= stop <= len(DATA)
        self.asked.append((start, stop))
        return DATA[start:stop]


RANGES = st.tuples(st.integers(0, len(DATA)), st.integers(0, 700)).map(lambda r: (r[0], min(r[0] + r[1], len(DATA))))


@settings(max_examples=200)
@given(st.lists(RANGES, max_size=30), st.integers(0, 4000))
def test_any_reads_give_the_bytes_of_the_file(ranges: list[tuple[int, int]], budget: int) -> None:
    """In any order, overlapping or not, whether or not there is room to keep them."""
    file, kept = _File(), SmallRanges(budget)
    for start, stop in [*ranges, *ranges]:
        assert kept.read(file, start, stop) == DATA[start:stop]


def test_a_range_and_what_is_around_it_is_asked_for_once() -> None:
    """By file: another one has other bytes there."""
    file, twin, kept = _File(), _File("g"), SmallRanges(1 << 20)
    kept.read(file, 1000, 1050)
    assert kept.read(file, 990, 1060) == DATA[990:1060]
    kept.read(file, 4000, 4010)
    assert kept.read(file, 1000, 1050) == DATA[1000:1050]
    assert len(file.asked) == 2
    kept.read(twin, 1000, 1050)
    assert len(twin.asked) == 1


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ranges are read as asked and not kept; without room nothing is."""
    monkeypatch.setattr(small_ranges, "_MOST_BYTES", 2000)
    file, kept = _File(), SmallRanges(600)
    for _ in range(2):
        kept.read(file, 3000, 6000)
    assert file.asked == [(3000, 6000)] * 2
    kept.read(file, 0, 10)
    kept.read(file, 7000, 7100)
    kept.read(file, 7000, 7100)
    assert len(file.asked) == 5
    kept.read(file, 0, 10)
    assert len(file.asked) == 5
