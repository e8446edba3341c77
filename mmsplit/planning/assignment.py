"""The optimum contiguous assignment of units to partitions.  Pure integers, exact.

Given units in forward order, partitions in node order and a weight per partition (how much of the whole it
should carry), find the cut with the smallest possible `max(load / weight)`; among all such cuts the one with the
smallest sum of squares, so that the partitions that are not the bottleneck come out even, too.

Method: for a bound T a left-to-right sweep tells which cut positions are reachable when no partition exceeds T
(O(parts x units)); a binary search finds the smallest T for which the end is reachable; a dynamic programme over
the reachable positions picks the evenest cut.  Greedy filling would be wrong here: each partition must hold at
least one unit, and weights differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple


class TiedUnits(NamedTuple):
    """Units that share one weight: `stored` has it, each of `uses` needs it.

    A partition that holds a use but not `stored` bears `cost` once more, for its copy.
    """

    stored: int
    uses: tuple[int, ...]
    cost: int


class Load:
    """Cost of the half-open range of units [start, stop), copies of tied weights included.

    It never falls when a range grows: growing over `stored` costs at least the copy it saves.
    """

    def __init__(self, costs: Sequence[int], tied: Sequence[TiedUnits] = (), follow: Sequence[tuple[int, int]] = ()):
        """`follow` are pairs (unit, cost): cost that lies with whichever partition holds that unit."""
        self._prefix = [0, *accumulate(costs)]
        self._tied = tied
        self._follow = follow
        self.unit_count = len(costs)

    def of(self, start: int, stop: int) -> int:
        """Return the cost of [start, stop)."""
        cost = self._prefix[stop] - self._prefix[start]
        for stored, uses, copy_cost in self._tied:
            if not start <= stored < stop and any(start <= use < stop for use in uses):
                cost += copy_cost
        for unit, follow_cost in self._follow:
            if start <= unit < stop:
                cost += follow_cost
        return cost


def assign_contiguous(load: Load, weights: Sequence[Fraction], tie_break: Load) -> tuple[int, ...]:
    """Return the first unit of each partition: `len(weights)` numbers, the first of them 0.

    Requires 1 <= len(weights) <= load.unit_count and positive weights.  `tie_break` decides between cuts that
    `load` finds equal (units that cost nothing).
    """
    whole = math.lcm(*(weight.numerator for weight in weights))
    scales = [int(whole / weight) for weight in weights]  # load * scale is load / weight as an integer
    low, high = 0, load.of(0, load.unit_count) * max(scales)
    while low < high:
        middle = (low + high) // 2
        if _reachable(load, scales, middle)[-1][load.unit_count]:
            high = middle
        else:
            low = middle + 1
    return _evenest(load, scales, low, tie_break)


def _lowest_starts(load: Load, scale: int, bound: int) -> list[int]:
    """For each stop, the smallest start whose load stays within the bound (it may equal stop: no unit fits)."""
    starts, start = [0], 0
    for stop in range(1, load.unit_count + 1):
        while start < stop and load.of(start, stop) * scale > bound:
            start += 1
        starts.append(start)
    return starts


def _reachable(load: Load, scales: Sequence[int], bound: int) -> list[list[bool]]:
    """reachable[k][j]: the first k partitions can hold exactly the units [0, j), each at least one of them."""
    rows = [[True] + [False] * load.unit_count]
    starts_of_scale: dict[int, list[int]] = {}
    for scale in scales:
        if scale not in starts_of_scale:
            starts_of_scale[scale] = _lowest_starts(load, scale, bound)
        starts = starts_of_scale[scale]
        counts = [0, *accumulate(rows[-1])]
        rows.append([counts[stop] > counts[starts[stop]] for stop in range(load.unit_count + 1)])
    return rows


def _evenest(load: Load, scales: Sequence[int], bound: int, tie_break: Load) -> tuple[int, ...]:
    rows = _reachable(load, scales, bound)
    count = load.unit_count
    best: list[tuple[int, int] | None] = [(0, 0)] + [None] * count
    choices: list[list[int]] = []
    for part, scale in enumerate(scales):
        starts = _lowest_starts(load, scale, bound)
        row: list[tuple[int, int] | None] = [None] * (count + 1)
        choice = [0] * (count + 1)
        left = len(scales) - part - 1
        for stop in range(part + 1, count - left + 1) if left else (count,):
            if not rows[part + 1][stop]:
                continue
            for start in range(max(starts[stop], part), stop):
                before = best[start]
                if before is None:
                    continue
                own, bytes_ = load.of(start, stop), tie_break.of(start, stop)
                value = (before[0] + own * own * scale, before[1] + bytes_ * bytes_ * scale)
                current = row[stop]
                if current is None or value < current:
                    row[stop], choice[stop] = value, start
        best = row
        choices.append(choice)
    first, stop = [], count
    for choice in reversed(choices):
        stop = choice[stop]
        first.append(stop)
    return tuple(reversed(first))
