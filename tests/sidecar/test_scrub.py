"""Every chunk is in exactly one subset, subsets are even by bytes, and what is covered is taken out exactly."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsplit.errors import RequestError
from mmsplit.sidecar.chunk_index import ChunkIndex, empty_index
from mmsplit.sidecar.scrub import Stretch, Subset, chunks_within, parse_subset, without


def _index(stored: list[int]) -> ChunkIndex:
    index = empty_index(len(stored))
    index["stored_bytes"] = stored
    index["stored_offset"] = 4096 + np.concatenate(([0], np.cumsum(stored)[:-1])).astype(np.uint64)
    return index


_SET = st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=30), min_size=1, max_size=4)


@given(_SET, st.integers(1, 12))
def test_each_chunk_is_in_exactly_one_subset(payloads: list[list[int]], parts: int) -> None:
    """Over all subsets of a set, each chunk once; and no subset has more than its share and a chunk and the rest."""
    sizes = [4096 + sum(stored) + 500 for stored in payloads]
    starts = np.concatenate(([0], np.cumsum(sizes)))
    total = int(starts[-1])
    seen = [np.zeros(len(stored), int) for stored in payloads]
    for number in range(1, parts + 1):
        stretch = Subset(number, parts).stretch_of(total)
        chosen = 0
        for k, stored in enumerate(payloads):
            wanted = chunks_within(_index(stored), int(starts[k]), [stretch])
            seen[k] += wanted
            chosen += int(np.array(stored)[wanted].sum())
        assert chosen <= total / parts + 5000
    assert all((count == 1).all() for count in seen)


@given(
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 40)), max_size=8),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_what_is_covered_is_taken_out(covered: list[tuple[int, int]], start: int, length: int) -> None:
    """Place by place, against a set of numbers; what is left is in order and does not touch."""
    stretches = [Stretch(a, a + n) for a, n in covered]
    left = without(Stretch(start, start + length), stretches)
    expected = set(range(start, start + length)) - {place for a, b in stretches for place in range(a, b)}
    assert [place for a, b in left for place in range(a, b)] == sorted(expected)
    assert all(a < b for a, b in left)


def test_subsets_cover_a_set_of_any_size() -> None:
    """Also one larger than floats are exact for, and one smaller than the number of subsets."""
    for total in (0, 1, 3, 7, 2**61 + 1):
        stretches = [Subset(number, 7).stretch_of(total) for number in range(1, 8)]
        assert stretches[0].start == 0
        assert stretches[-1].stop == total
        assert all(a.stop == b.start for a, b in pairwise(stretches))


@pytest.mark.parametrize(
    "text", ["", "3", "0/7", "8/7", "3/0", "-1/7", "3/7/1", " 3/7", "3/7\n", "\u0663/\u0667", "a/b", "03/7"]
)
def test_what_is_no_subset_is_refused(text: str) -> None:
    """With what one looks like."""
    with pytest.raises(RequestError, match=r"not a subset.*3/7"):
        parse_subset(text)


def test_a_subset_reads_as_it_is_written() -> None:
    """There and back."""
    assert parse_subset("3/7") == (3, 7)
    assert str(parse_subset("3/7")) == "3/7"
