"""The optimum on unequal sites, against all assignments there are."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations_with_replacement, pairwise, permutations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmsplit.planning.assignment import Load, TiedUnits
from mmsplit.planning.placement import MAX_SETS, Placement, PlacementProblem, Site


class Example:
    """Units and sites, with the law of what fits written the plain way."""

    def __init__(
        self, needs: list[int], work: list[int], sites: list[Site], tied: Sequence[TiedUnits] = (), stored: int = 1
    ) -> None:
        self.needs, self.work, self.sites, self.tied = needs, work, sites, tied
        need, disk = Load(needs, tied), Load([stored] * len(needs))
        self.problem = PlacementProblem(sites, need, disk, Load(work))

    def __repr__(self) -> str:
        return f"Example({self.needs}, {self.work}, {self.sites}, {self.tied})"

    def need(self, start: int, stop: int) -> int:
        inside = range(start, stop)
        copies = sum(t.cost for t in self.tied if t.stored not in inside and any(use in inside for use in t.uses))
        return sum(self.needs[start:stop]) + copies

    def assignments(self, order: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
        """Every contiguous assignment, empty runs included, that fits or not."""
        for stops in combinations_with_replacement(range(len(self.needs) + 1), len(order) - 1):
            yield tuple(pairwise((0, *stops, len(self.needs))))

    def fits(self, site: Site, run: tuple[int, int]) -> bool:
        if run[0] == run[1]:
            return True
        return (
            site.strength > 0 and self.need(*run) <= site.memory and (site.disk is None or run[1] - run[0] <= site.disk)
        )

    def bottleneck(self, order: Sequence[int], runs: Sequence[tuple[int, int]]) -> Fraction | None:
        """The largest work / strength; None where a run does not fit."""
        worst = Fraction(0)
        for index, run in zip(order, runs, strict=True):
            site = self.sites[index]
            if not self.fits(site, run):
                return None
            if run[0] < run[1]:
                worst = max(worst, sum(self.work[slice(*run)]) / site.strength)
        return worst

    def best(self, order: Sequence[int]) -> Fraction | None:
        found = [self.bottleneck(order, runs) for runs in self.assignments(order)]
        return min((value for value in found if value is not None), default=None)

    def unevenness(self, order: Sequence[int], runs: Sequence[tuple[int, int]]) -> Fraction:
        total = Fraction(0)
        for index, run in zip(order, runs, strict=True):
            if run[0] < run[1]:
                total += sum(self.work[slice(*run)]) ** 2 / self.sites[index].strength
        return total


_STRENGTHS = st.one_of(
    st.just(Fraction(1)),
    st.integers(0, 5).map(Fraction),
    st.fractions(min_value=Fraction(1, 7), max_value=9, max_denominator=7),
)


@st.composite
def examples(draw: st.DrawFn, most_sites: int = 4) -> Example:
    count = draw(st.integers(1, 6))
    sizes = st.lists(st.integers(0, 20), min_size=count, max_size=count)
    needs = draw(sizes)
    sites = draw(
        st.lists(
            st.builds(Site, st.integers(0, 60), st.one_of(st.none(), st.integers(0, 4)), _STRENGTHS),
            min_size=1,
            max_size=most_sites,
        )
    )
    work = draw(st.one_of(st.just(needs), sizes))
    tied = []
    if count > 1 and draw(st.booleans()):
        stored, use = draw(st.permutations(range(count)))[:2]
        tied.append(TiedUnits(stored, (use,), draw(st.integers(0, needs[stored]))))
    return Example(needs, work, sites, tied)


def require_optimum(case: Example, placement: Placement | None, best: Fraction | None) -> None:
    """The placement is one that fits, has the best bottleneck, and is the evenest of those in its order."""
    assert (placement is None) == (best is None)
    if placement is None:
        return
    assert sorted(placement.order) == list(range(len(case.sites)))
    assert placement.stops[-1] == len(case.needs)
    assert placement.bottleneck == best == case.bottleneck(placement.order, placement.ranges)
    least = min(
        case.unevenness(placement.order, runs)
        for runs in case.assignments(placement.order)
        if case.bottleneck(placement.order, runs) == best
    )
    # Squares are rounded down to 2^-32 for each site.
    assert case.unevenness(placement.order, placement.ranges) - least <= Fraction(len(case.sites), 1 << 31)


@given(examples())
@example(Example([5, 5], [5, 5], [Site(4, None, Fraction(1)), Site(10, None, Fraction(1))]))
@example(Example([3, 3, 3], [3, 3, 3], [Site(9, 1, Fraction(9)), Site(9, None, Fraction(1))]))
@settings(max_examples=600, deadline=None, database=None)
def test_placement_is_the_best_of_all(case: Example) -> None:
    """In the order given: fits memory and disk, smallest bottleneck, then smallest sum of squares; or nothing fits."""
    order = range(len(case.sites))
    require_optimum(case, case.problem.solve(), case.best(order))


@given(examples(most_sites=3))
@settings(max_examples=300, deadline=None, database=None)
def test_any_order_is_the_best_of_all_orders(case: Example) -> None:
    """And the order given stays where it is as good."""
    orders = list(permutations(range(len(case.sites))))
    values = [value for value in map(case.best, orders) if value is not None]
    placement = case.problem.solve_in_any_order()
    require_optimum(case, placement, min(values, default=None))
    if placement is not None and case.best(orders[0]) == placement.bottleneck:
        assert placement.order == orders[0]


@given(examples())
@settings(max_examples=400, deadline=None, database=None)
def test_what_is_wanting_is_the_least(case: Example) -> None:
    """Over all sites together, and on one site alone; 0 exactly where all fits."""
    case.problem = PlacementProblem(
        [site._replace(disk=None, strength=Fraction(1)) for site in case.sites],
        case.problem.need,
        case.problem.stored,
        case.problem.work,
    )
    case.sites = list(case.problem.sites)
    order = range(len(case.sites))
    overflows = [
        [max(0, case.need(*run) - site.memory) for site, run in zip(case.sites, runs, strict=True)]
        for runs in case.assignments(order)
    ]
    assert case.problem.least_overflow() == min(map(sum, overflows))
    alone = [sum(over) for over in overflows if sum(map(bool, over)) <= 1]
    index, more = case.problem.overflow_of_one()
    assert more == min(alone)
    grown = [site._replace(memory=site.memory + more * (k == index)) for k, site in enumerate(case.sites)]
    again = PlacementProblem(grown, case.problem.need, case.problem.stored, case.problem.work)
    assert again.units_that_fit() == len(case.needs)
    assert (more == 0) == (case.problem.units_that_fit() == len(case.needs))


def test_what_gets_nothing_is_not_asked_to_grow() -> None:
    """A site of strength 0 would be given nothing, however large."""
    sites = [Site(9, None, Fraction(0)), Site(1, None, Fraction(1))]
    assert Example([5, 5], [5, 5], sites).problem.overflow_of_one() == (1, 9)


def test_large_and_odd_numbers_are_exact() -> None:
    """Terabytes and strengths that share no factor: one byte makes the difference."""
    big = 10**15
    sites = [Site(10 * big, None, Fraction(big + 1)), Site(10 * big, None, Fraction(big))]
    assert Example([big, big + 1], [big, big + 1], sites).problem.solve() == Placement(
        (0, 1), (1, 2), Fraction(big + 1, big)
    )
    swapped = Example([big + 1, big], [big + 1, big], sites).problem.solve()
    assert swapped is not None
    assert swapped.bottleneck == 1


def test_many_units_on_many_sites() -> None:
    """200 units on 64 sites, all different, work and all: the bottleneck cannot be lowered by a hair."""
    needs = [(7 * i * i) % 1009 + 500 for i in range(200)]
    sites = [Site(1300 + 97 * k % 2903 + 2000, None, Fraction(1300 + 97 * k % 2903)) for k in range(64)]
    problem = Example(needs, needs, sites).problem
    placement = problem.solve()
    assert placement is not None
    loads = [
        sum(needs[slice(*run)]) / sites[k].strength for k, run in zip(placement.order, placement.ranges, strict=True)
    ]
    assert max(loads) == placement.bottleneck
    hair = Fraction(1, 10**12)
    tighter = [
        site._replace(memory=min(site.memory, int((placement.bottleneck - hair) * site.strength))) for site in sites
    ]
    assert Example(needs, needs, tighter).problem.solve() is None


@pytest.mark.parametrize(("kinds", "sets"), [(13, 2**13), (1, 14)])
def test_sets_of_equal_sites_are_counted_once(kinds: int, sets: int) -> None:
    """So that dozens of machines of one kind may stand in any order."""
    sites = [Site(10 + k % kinds, None, Fraction(1)) for k in range(13)]
    problem = Example([1], [1], sites).problem
    assert problem.count_sets() == sets <= MAX_SETS
