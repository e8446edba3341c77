"""A line for each verification; whatever is not one of ours, or not whole, counts as if it were not there."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mmsplit.errors import OutputError
from mmsplit.sidecar.partition_reader import Fault
from mmsplit.sidecar.scrub import Stretch
from mmsplit.sidecar.scrub_history import HistoryEntry, append_entry, read_entries, verified_since

TIME = datetime(2026, 11, 1, 2, 0, tzinfo=UTC)
ENTRY = HistoryEntry(TIME, "sha256:a", None, "stored", False, "3/7", None, (Stretch(0, 10),), 4, 100, 0)


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    """Entry by entry, in order, each on its line."""
    path = tmp_path / "history.jsonl"
    second = ENTRY._replace(since=TIME - timedelta(days=30), partition=3, of=None, stretches=())
    append_entry(path, ENTRY, ())
    append_entry(path, second, ())
    assert read_entries(path) == (ENTRY, second)
    assert path.read_text().count("\n") == 2


def test_a_line_is_for_programs(tmp_path: Path) -> None:
    """When, what, how, and what was found: the first twenty, and how many in all."""
    path = tmp_path / "history.jsonl"
    faults = [Fault("partition_0.bin", "stored bytes are damaged", k, k + 1, 0) for k in range(30)]
    append_entry(path, ENTRY._replace(faults=30), faults)
    line = json.loads(path.read_text())
    assert (line["format"], line["time"], line["subset"], line["level"]) == (
        "mmsplit-history",
        "2026-11-01T02:00:00+00:00",
        "3/7",
        "stored",
    )
    assert (line["of"], line["chunks"], line["bytes"], line["faults"]) == ("sha256:a", 4, 100, 30)
    assert len(line["problems"]) == 20
    assert line["problems"][1]["what"] == "stored bytes are damaged"


@pytest.mark.parametrize(
    "junk",
    [
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"format": "mmsplit-history"}',
        b'{"format": "other", "format_version": 1}',
        b"[" * 100_000,
        b"",
    ],
)
def test_other_lines_do_not_count(tmp_path: Path, junk: bytes) -> None:
    """Before, between and after."""
    path = tmp_path / "history.jsonl"
    path.write_bytes(junk + b"\n")
    append_entry(path, ENTRY, ())
    with path.open("ab") as file:
        file.write(junk + b"\n")
    append_entry(path, ENTRY, ())
    assert read_entries(path) == (ENTRY, ENTRY)


def test_every_way_to_cut_a_line(tmp_path: Path) -> None:
    """A crash in the middle of a line costs that line, not the next one."""
    path = tmp_path / "history.jsonl"
    append_entry(path, ENTRY, ())
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole + whole[:length])
        append_entry(path, ENTRY._replace(chunks=9), ())
        entries = read_entries(path)
        assert entries[0] == ENTRY
        assert entries[-1] == ENTRY._replace(chunks=9)
        # All but the line end is a whole line, too.
        assert len(entries) == (3 if length == len(whole) - 1 else 2)


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({}, True),
        ({"time": TIME - timedelta(seconds=1)}, False),
        ({"time": TIME + timedelta(days=1)}, True),
        ({"of": "sha256:b"}, False),
        ({"of": None}, False),
        ({"level": "quick"}, False),
        ({"level": "full"}, True),
        ({"faults": 1}, False),
    ],
)
def test_what_counts_as_verified(change: dict[str, object], counts: bool) -> None:
    """The same set, closely enough, late enough, and nothing found."""
    entry = ENTRY._replace(**change)  # type: ignore[arg-type]
    assert verified_since([entry], "sha256:a", "stored", TIME, digests=False) == (ENTRY.stretches if counts else ())


@pytest.mark.parametrize("digests", [True, False])
def test_what_was_held_to_checksums_only_is_not_held_to_digests(digests: bool) -> None:
    """Who trusts a root asks for digests."""
    entry = ENTRY._replace(digests=digests)
    assert verified_since([entry], "sha256:a", "stored", TIME, digests=True) == (ENTRY.stretches if digests else ())


def test_a_history_that_cannot_be_written(tmp_path: Path) -> None:
    """It says which file."""
    with pytest.raises(OutputError, match="history"):
        append_entry(tmp_path / "none" / "history.jsonl", ENTRY, ())
    assert read_entries(tmp_path / "none" / "history.jsonl") == ()
