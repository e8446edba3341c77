"""The forecast is the worst moment of what the steps do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mmsplit.sidecar.disk_forecast import DiskStep, forecast, peak

STEPS = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), max_size=12)


@given(STEPS)
def test_peak_is_the_largest_sum_before_a_deletion(steps: list[tuple[int, int]]) -> None:
    """By the definition, moment by moment."""
    moments = [
        sum(written for written, _ in steps[: at + 1]) - sum(freed for _, freed in steps[:at])
        for at in range(len(steps))
    ]
    assert peak(steps) == max([0, *moments])


@given(STEPS, st.integers(0, 1000))
def test_expected_is_at_most_the_worst(steps: list[tuple[int, int]], base: int) -> None:
    """If it is so of each step."""
    made = [DiskStep(("a",), written, written // 2, ("b",), freed) for written, freed in steps]
    disk = forecast(made, base, 5)
    assert base <= disk.expected_bytes <= disk.extra_bytes
    assert disk.as_json()["extra_bytes"] == disk.extra_bytes
