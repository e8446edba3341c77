"""`verify` a little at a time: all of a set in n parts, what is new since then, no faster than asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, MIB, Weight, flip, llama_weights, write_checkpoint

from mmsplit.errors import RequestError
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.sidecar.scrub_run import Scrub
from mmsplit.verbs.repair import repair
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

DAY = timedelta(days=1)


class _Calendar:
    """Days that pass when the test says so."""

    def __init__(self) -> None:
        self.today = datetime(2026, 11, 1, 2, tzinfo=UTC)

    def now(self) -> datetime:
        return self.today


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of two partitions, some 20 MB, chunks of many sizes."""
    root = tmp_path_factory.mktemp("scrub")
    weights = [*llama_weights(3), Weight("model.layers.0.big.weight", "U8", (9 * MIB,), 256)]
    weights.append(Weight("model.layers.2.big.weight", "BF16", (3 * MIB,), 120))
    write_checkpoint(root / "model", [weights], files={"config.json": CAUSAL_CONFIG})
    split(root / "model", root / "set", 2)
    return root / "set"


@pytest.fixture
def damaged(made: Path, tmp_path: Path) -> Path:
    """A copy of the set that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "damaged"))


def _entries(history: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in history.read_text().splitlines()]


@pytest.mark.parametrize("parts", [1, 3, 7, 50])
def test_all_subsets_are_the_whole(made: Path, tmp_path: Path, parts: int) -> None:
    """Each chunk is in one of them: their chunks and bytes add up."""
    history = tmp_path / "history.jsonl"
    checked = 0
    for number in range(1, parts + 1):
        result = verify(made, scrub=Scrub(subset=f"{number}/{parts}", history=history))
        assert result.ok
        checked += result.checked_bytes
    assert checked == verify(made).checked_bytes
    chunks = 0
    for part_id in range(2):
        with open_partition_files(made / f"partition_{part_id}.json") as partition:
            chunks += len(partition.index)
    assert sum(int(str(entry["chunks"])) for entry in _entries(history)) == chunks


def test_damage_is_found_by_one_subset(damaged: Path) -> None:
    """Every chunk in turn; the same subset every time, and not the others."""
    with open_partition_files(damaged / "partition_1.json", "pread") as partition:
        places = [partition.encoded(chunk)[0] for chunk in range(len(partition.index))]
    for place in places:
        flip(damaged / "partition_1.bin", place)
        found = [number for number in range(1, 6) if not verify(damaged, scrub=Scrub(subset=f"{number}/5")).ok]
        assert len(found) == 1
        flip(damaged / "partition_1.bin", place)


def test_structure_and_small_files_are_looked_at_every_time(damaged: Path) -> None:
    """They cost little, and nothing can be said about a chunk without them."""
    flip(damaged / "config.json", 3)
    flip(damaged / "partition_0.bin", 20)
    for number in (1, 2, 3):
        assert len(verify(damaged, scrub=Scrub(subset=f"{number}/3")).problems) == 2


def test_a_week_of_nights(made: Path, tmp_path: Path) -> None:
    """One of seven each night; then `since` has nothing left to do until the first is a week old."""
    history, calendar = tmp_path / "history.jsonl", _Calendar()
    everything = verify(made).checked_bytes
    for number in range(1, 8):
        verify(made, scrub=Scrub(subset=f"{number}/7", history=history, now=calendar.now))
        calendar.today += DAY

    def left(age: timedelta, level: str = "stored", subset: str | None = None) -> int:
        scrub = Scrub(subset=subset, since=age, history=history, now=calendar.now)
        copy = history.read_bytes()
        result = verify(made, level=level, scrub=scrub)  # type: ignore[arg-type]
        history.write_bytes(copy)  # looking is not verifying
        return result.checked_bytes

    assert left(7 * DAY) == 0
    assert 0 < left(6 * DAY) <= left(5 * DAY) < left(2 * DAY) < left(DAY / 2) == everything
    assert left(7 * DAY, "full") == everything
    assert left(6 * DAY, subset="7/7") == 0
    assert left(6 * DAY, subset="1/7") == left(6 * DAY)
    calendar.today = datetime(2026, 10, 1, tzinfo=UTC)  # the clock was wrong: what lies ahead does not count
    assert left(365 * DAY) == everything


def test_what_since_did_is_recorded_exactly(made: Path, tmp_path: Path) -> None:
    """A run with `since` covers the rest, so that the next one has nothing to do."""
    history, calendar = tmp_path / "history.jsonl", _Calendar()
    first = verify(made, scrub=Scrub(subset="2/3", history=history, now=calendar.now)).checked_bytes
    scrub = Scrub(since=calendar.today, history=history, now=calendar.now)
    rest = verify(made, scrub=scrub).checked_bytes
    assert first + rest == verify(made).checked_bytes
    assert verify(made, scrub=scrub).checked_bytes == 0


def test_a_run_that_found_damage_does_not_count(damaged: Path, made: Path, tmp_path: Path) -> None:
    """What was found is in the history; after the repair the same chunks are looked at again."""
    history, calendar = tmp_path / "history.jsonl", _Calendar()
    with open_partition_files(damaged / "partition_0.json", "pread") as partition:
        flip(damaged / "partition_0.bin", partition.encoded(1)[0])
    scrub = Scrub(since=DAY, history=history, now=calendar.now)
    assert not verify(damaged, scrub=scrub).ok
    (entry,) = _entries(history)
    assert (entry["faults"], entry["since"]) == (1, "2026-10-31T02:00:00+00:00")
    assert repair(damaged, made).ok
    result = verify(damaged, scrub=scrub)
    assert result.ok
    assert result.checked_bytes == verify(made).checked_bytes
    assert verify(damaged, scrub=scrub).checked_bytes == 0


def test_a_history_is_of_one_set(made: Path, tmp_path: Path) -> None:
    """Another set in the same file, or a partition by itself, is told apart by its digest."""
    history, calendar = tmp_path / "history.jsonl", _Calendar()
    scrub = Scrub(since=DAY, history=history, now=calendar.now)
    split(made.parent / "model", tmp_path / "other", 2, codec="raw")
    assert verify(made, scrub=scrub).checked_bytes > 0
    for path in (tmp_path / "other", made / "partition_1.json", made / "partition_0.bin"):
        assert verify(path, scrub=scrub).checked_bytes > 0
        assert verify(path, scrub=scrub).checked_bytes == 0
    assert [entry["partition"] for entry in _entries(history)][-1] == 0


def test_a_set_without_its_manifest_is_looked_at_as_a_whole(damaged: Path, tmp_path: Path) -> None:
    """There is nothing that says what the history is of."""
    (damaged / "partition_set.json").unlink()
    scrub = Scrub(since=DAY, history=tmp_path / "history.jsonl", now=_Calendar().now)
    for _ in range(2):
        assert verify(damaged, scrub=scrub).checked_bytes > 0


def test_a_rate_is_kept_to(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every range asks for its bytes before it is read, all of them together for all bytes."""
    from mmsplit.sidecar.pace import Pace

    taken: list[int] = []

    def take(_: Pace, count: int, go_on: Callable[[], None]) -> None:
        go_on()
        taken.append(count)

    monkeypatch.setattr(Pace, "take", take)
    result = verify(made, scrub=Scrub(max_rate=1))
    assert sum(taken) == result.checked_bytes
    taken.clear()
    result = verify(made, scrub=Scrub(max_rate=1, subset="2/3"))
    assert sum(taken) == result.checked_bytes > 0


def test_a_truncated_payload_does_not_move_the_subsets(damaged: Path) -> None:
    """Places are counted by what the set manifest says, not by what the disk has."""
    with open_partition_files(damaged / "partition_1.json", "pread") as partition:
        flip(damaged / "partition_1.bin", partition.encoded(2)[0])
    found = [n for n in range(1, 8) if not verify(damaged, scrub=Scrub(subset=f"{n}/7")).ok]
    (damaged / "partition_0.bin").write_bytes((damaged / "partition_0.bin").read_bytes()[:-1000])

    def kinds(number: int) -> set[str]:
        return {fault.kind for fault in verify(damaged, scrub=Scrub(subset=f"{number}/7")).problems}

    assert [n for n in range(1, 8) if "chunk" in kinds(n)] == found


@pytest.mark.parametrize(
    ("scrub", "level", "match"),
    [
        (Scrub(subset="8/7"), "stored", "not a subset"),
        (Scrub(since=DAY), "stored", "--history"),
        (Scrub(max_rate=0), "stored", "not a rate"),
        (Scrub(subset="1/2"), "quick", "looks at no chunk"),
    ],
)
def test_what_makes_no_sense_is_refused(made: Path, scrub: Scrub, level: str, match: str) -> None:
    """Rather than to verify less than was meant."""
    with pytest.raises(RequestError, match=match):
        verify(made, level=level, scrub=scrub)  # type: ignore[arg-type]


def test_a_quick_look_goes_into_the_history_too(made: Path, tmp_path: Path) -> None:
    """It covers no chunk."""
    history, calendar = tmp_path / "history.jsonl", _Calendar()
    verify(made, level="quick", scrub=Scrub(history=history, now=calendar.now))
    assert _entries(history)[0]["stretches"] == []
    assert verify(made, scrub=Scrub(since=DAY, history=history, now=calendar.now)).checked_bytes > 0
