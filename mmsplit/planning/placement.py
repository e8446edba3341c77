"""The optimum contiguous assignment of units to unequal sites.  Pure, exact, and fast for hundreds of units and sites.

Sites stand in a pipeline; each holds a run of consecutive units, perhaps none.  A run must fit the site's memory and
disk; among the assignments that fit, the one with the smallest `max(work / strength)` is the optimum, and among those
the one with the smallest sum of `work² / strength`, so that the sites that are not the bottleneck come out even, too.

Method: all loads only grow when a run grows.  So for a bound T it is best that each site takes as much as T and its
room allow, and one sweep tells whether the end is reached.  T is found by bisection over the values it can take: a
success lowers the upper bound to what was achieved, a failure raises the lower bound to the least that would have
let any site take one unit more.  Numbers are integers and fractions; the result is exact.

In any order: the farthest that a set of sites can reach is the farthest, over the site that stands last, from where
the others reach.  Sites of the same kind are one, so there are few sets where machines are bought by the dozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Final, NamedTuple

from mmsplit.planning.assignment import Load

#: So many sets of sites are tried in `order="any"`: 13 different machines, or hundreds of few kinds.
MAX_SETS: Final = 10_000
#: Steps that evening out may take; a model of thousands of layers on many machines is left as the sweep found it.
_MAX_STEPS: Final = 3_000_000
#: Fixed point of the sum of squares, in bits.
_SQUARE_BITS: Final = 32


class Site(NamedTuple):
    """Room and strength of one machine.  `disk` None is room enough; a site with `strength` 0 gets nothing."""

    memory: int
    disk: int | None
    strength: Fraction


class Placement(NamedTuple):
    """Who holds what: `order` are indexes of sites as the pipeline runs; the k-th of them holds units
    [`stops[k-1]`, `stops[k]`), the first from 0.  `bottleneck` is the largest work / strength.
    """

    order: tuple[int, ...]
    stops: tuple[int, ...]
    bottleneck: Fraction

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The half-open range of units of each site, in pipeline order."""
        return tuple(pairwise((0, *self.stops)))


class PlacementProblem:
    """Units and sites.  `need` counts against a site's memory, `stored` against its disk, `work` is balanced.

    The loads are of the same units, and none falls when a range of them grows.
    """

    def __init__(self, sites: Sequence[Site], need: Load, stored: Load, work: Load) -> None:
        self.sites = tuple(sites)
        self.need = need
        self.stored = stored
        self.work = work
        self.unit_count = need.unit_count

    def solve(self) -> Placement | None:
        """Return the optimum with the sites in the order given, or None if nothing fits."""
        bottleneck = self._least_bound(lambda reach: self._stops(reach)[-1])
        return None if bottleneck is None else self._evened(tuple(range(len(self.sites))), bottleneck)

    def solve_in_any_order(self) -> Placement | None:
        """Return the optimum over all orders of the sites; the order given, if it is as good.

        Requires `count_sets() <= MAX_SETS`.
        """
        kept = self.solve()
        best = self._least_bound(lambda reach: self._best_order(reach)[1])
        if best is None or (kept is not None and kept.bottleneck == best):
            return kept
        return self._evened(self._best_order(_Reach(self, best))[0], best)

    def count_sets(self) -> int:
        """Return the number of sets of sites that are different."""
        return math.prod(self.sites.count(kind) + 1 for kind in dict.fromkeys(self.sites))

    def units_that_fit(self) -> int:
        """Return how many units fit, counted from the first, with the sites in the order given."""
        return self._stops(_Reach(self, None))[-1]

    def units_that_fit_in_any_order(self) -> int:
        """Return how many units fit at most, over all orders.  Requires `count_sets() <= MAX_SETS`."""
        return self._best_order(_Reach(self, None))[1]

    def least_overflow(self) -> int | None:
        """Return the least memory that is wanting over all sites together, in the order given.

        None where it would take too long to tell.  Disks and strengths do not count.
        """
        count = self.unit_count
        if len(self.sites) * count * count > _MAX_STEPS:
            return None
        row = [0] + [self.need.of(0, count)] * count
        for site in self.sites:
            row = [
                min(row[start] + max(0, self.need.of(start, stop) - site.memory) for start in range(stop + 1))
                for stop in range(count + 1)
            ]
        return row[count]

    def overflow_of_one(self) -> tuple[int, int]:
        """Return the site whose memory has to grow least if it alone grows, and by how much (0: all fits).

        Requires a site with a strength above 0; one with 0 would get nothing however it grows.
        """
        reach = _Reach(self, None)
        first = [0, *self._stops(reach)]
        last = self._lowest_starts(reach, range(len(self.sites)))
        more = {
            index: max(0, self.need.of(start, max(start, stop)) - site.memory)
            for index, (site, start, stop) in enumerate(zip(self.sites, first, last[1:], strict=False))
            if site.strength > 0
        }
        best = min(more, key=lambda index: more[index])
        return best, more[best]

    def _least_bound(self, sweep: Callable[[_Reach], int]) -> Fraction | None:
        """Return the least bound under which a sweep reaches the last unit; None if it does under none."""
        reach = _Reach(self, None)
        if sweep(reach) < self.unit_count:
            return None
        low, high = Fraction(0), reach.largest
        while low < high:
            reach = _Reach(self, (low + high) / 2)
            if sweep(reach) == self.unit_count:
                high = reach.largest
            else:
                low = reach.next_bound
        return high

    def _stops(self, reach: _Reach, order: Sequence[int] | None = None) -> list[int]:
        """Return where each site's run ends at most, when every site takes as much as it can."""
        stops, stop = [], 0
        for index in range(len(self.sites)) if order is None else order:
            stop = reach.farthest(self.sites[index], stop)
            stops.append(stop)
        return stops

    def _lowest_starts(self, reach: _Reach, order: Sequence[int]) -> list[int]:
        """Return where each site's run must begin at least for the sites from it on to hold the rest."""
        starts, start = [self.unit_count], self.unit_count
        for index in reversed(order):
            stop = start
            while start > 0 and reach.farthest(self.sites[index], start - 1) >= stop:
                start -= 1
            starts.append(start)
        return starts[::-1]

    def _best_order(self, reach: _Reach) -> tuple[tuple[int, ...], int]:
        """Return the order of sites that reaches farthest, and how far.  Sets are numbers in a mixed radix."""
        kinds = list(dict.fromkeys(self.sites))
        members = [[index for index, site in enumerate(self.sites) if site == kind] for kind in kinds]
        strides = [1]
        for same in members:
            strides.append(strides[-1] * (len(same) + 1))
        reached, last_kind = [0] * strides[-1], [0] * strides[-1]
        for number in range(1, strides[-1]):
            best = -1
            for kind, site in enumerate(kinds):
                if number // strides[kind] % (len(members[kind]) + 1):
                    stop = reach.farthest(site, reached[number - strides[kind]])
                    if stop > best:
                        best, last_kind[number] = stop, kind
            reached[number] = best
        order, number = [], strides[-1] - 1
        while number:
            order.append(members[last_kind[number]].pop())
            number -= strides[last_kind[number]]
        return tuple(reversed(order)), reached[-1]

    def _evened(self, order: tuple[int, ...], bottleneck: Fraction) -> Placement:
        """Among the assignments that the bottleneck allows, return the one with the least sum of squares."""
        reach = _Reach(self, bottleneck)
        highest = [0, *self._stops(reach, order)]
        lowest = self._lowest_starts(reach, order)
        spans = [range(low, high + 1) for low, high in zip([0, *lowest[1:]], highest, strict=True)]
        if sum(len(starts) * len(stops) for starts, stops in pairwise(spans)) > _MAX_STEPS:
            return Placement(order, tuple(highest[1:]), bottleneck)
        values: dict[int, tuple[int, int]] = {0: (0, 0)}
        choices: list[dict[int, int]] = []
        for index, starts, stops in zip(order, spans, spans[1:], strict=False):
            values, choice = self._extend(self.sites[index], reach, values, starts, stops)
            choices.append(choice)
        run_stops, stop = [], self.unit_count
        for choice in reversed(choices):
            run_stops.append(stop)
            stop = choice[stop]
        return Placement(order, tuple(reversed(run_stops)), bottleneck)

    def _extend(
        self, site: Site, reach: _Reach, values: dict[int, tuple[int, int]], starts: range, stops: range
    ) -> tuple[dict[int, tuple[int, int]], dict[int, int]]:
        """Add a site to the programme: for each stop, the least sum of squares, and the start that gives it."""
        extended: dict[int, tuple[int, int]] = {}
        choice: dict[int, int] = {}
        start = starts.start
        for stop in stops:
            while start < stop and reach.farthest(site, start) < stop:
                start += 1
            for begin in range(start, min(stop + 1, starts.stop)):
                before = values.get(begin)
                if before is None:
                    continue
                even = before[0] + _square(self.work.of(begin, stop), site.strength)
                value = (even, before[1] + self.need.of(begin, stop) ** 2)
                if stop not in extended or value < extended[stop]:
                    extended[stop], choice[stop] = value, begin
        return extended, choice


class _Reach:
    """How far a site's run can go under a bound on work / strength (None: no bound), and what that shows.

    `largest` is the largest work / strength of the runs asked for: under it as a bound they would be the same.
    `next_bound` is the least bound under which any of them would be longer.
    """

    def __init__(self, problem: PlacementProblem, bound: Fraction | None) -> None:
        self._problem = problem
        self._bound = bound
        self._known: dict[tuple[Site, int], int] = {}
        self.largest = Fraction(0)
        self._next: Fraction | None = None

    @property
    def next_bound(self) -> Fraction:
        """Requires that the bound has cut a run short."""
        if self._next is None:
            raise ValueError("no run was cut short by the bound")
        return self._next

    def farthest(self, site: Site, start: int) -> int:
        """Return the largest stop such that the site can hold [start, stop); `start` where it can hold nothing."""
        stop = self._known.get((site, start))
        if stop is None:
            stop = self._known[site, start] = self._find(site, start)
        return stop

    def _find(self, site: Site, start: int) -> int:
        problem, count = self._problem, self._problem.unit_count
        if site.strength == 0:
            return start
        stop = _last_within(problem.need, start, count, site.memory)
        if site.disk is not None:
            stop = _last_within(problem.stored, start, stop, site.disk)
        if self._bound is not None:
            room = stop
            stop = _last_within(problem.work, start, room, math.floor(self._bound * site.strength))
            if stop < room:
                longer = problem.work.of(start, stop + 1) / site.strength
                self._next = longer if self._next is None else min(self._next, longer)
        self.largest = max(self.largest, problem.work.of(start, stop) / site.strength)
        return stop


def _last_within(load: Load, start: int, stop: int, limit: int) -> int:
    """Return the largest end of a range from `start` that is at most `stop` and keeps within the limit."""
    low, high = start, stop
    while low < high:
        middle = (low + high + 1) // 2
        if load.of(start, middle) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def _square(work: int, strength: Fraction) -> int:
    if strength == 0:
        return 0
    return (work * work * strength.denominator << _SQUARE_BITS) // strength.numerator
