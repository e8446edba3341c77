"""`mmsplit repair` and the scrub options of `mmsplit verify` as commands."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, flip, llama_weights, tree, write_checkpoint

from mmsplit.cli import run
from mmsplit.cli.scrub_options import scrub_of
from mmsplit.sidecar.layout import DATA_START
from mmsplit.verbs.split import split


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_checkpoint(root / "model", [llama_weights(3)], files={"config.json": CAUSAL_CONFIG})
    split(root / "model", root / "set", 3)
    return root / "set"


@pytest.fixture
def damaged(made: Path, tmp_path: Path) -> Path:
    """A chunk that no other partition has, a trailer, and a manifest that is gone."""
    root = Path(shutil.copytree(made, tmp_path / "damaged"))
    flip(root / "partition_1.bin", DATA_START)
    flip(root / "partition_1.bin", (root / "partition_1.bin").stat().st_size - 3)
    (root / "partition_0.json").unlink()
    return root


def test_repair_shows_what_it_did(damaged: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each thing, where from, and how much was read."""
    assert run(["repair", str(damaged), "--from", str(made.parent / "model")]) == 0
    said = capsys.readouterr().out
    assert "partition_0.json  manifest" in said
    assert "chunk of model.layers" in said
    assert "3 thing(s) repaired in 3 partition(s)" in said
    assert tree(damaged) == tree(made)
    assert run(["repair", str(damaged)]) == 0
    assert capsys.readouterr().out == "ok: nothing to repair in 3 partition(s)\n"


def test_what_is_left_is_damage(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 5, and each problem on its line, as verify shows it."""
    assert run(["repair", str(damaged)]) == 5
    said = capsys.readouterr()
    assert "stored bytes are damaged (no source was given)" in said.out
    assert "layer model.layers" in said.out
    assert "1 problem(s) left, 2 thing(s) repaired" in said.err


def test_a_dry_run_says_that_there_is_damage(damaged: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 5, since nothing was done; 0 where there is nothing to do."""
    before = tree(damaged)
    assert run(["repair", str(damaged), "--from", str(made), "--dry-run"]) == 5
    assert "3 thing(s) to repair in 3 partition(s); nothing was done" in capsys.readouterr().out
    assert tree(damaged) == before
    assert run(["repair", str(made), "--dry-run"]) == 0


def test_repair_as_json(damaged: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The result for programs, and nothing else on stdout; several sources, options of all kinds."""
    words = ["repair", str(damaged), "--from", str(made.parent / "model"), "--from", str(made), "--json"]
    assert run([*words, "--level", "full", "--only", "1,0", "-q", "-t", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["partitions"], result["problems"]) == (True, [0, 1], [])
    assert {item["what"] for item in result["mended"]} == {"manifest", "chunk", "trailer"}
    assert result["root_digest"] == json.loads((made / "partition_set.json").read_bytes())["root_digest"]


def test_rebuild_manifest(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it does not look at does not fail it."""
    assert run(["repair", str(damaged), "--rebuild-manifest"]) == 0
    assert "1 thing(s) repaired" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--from", ""], 2),
        (["--from", "./nowhere"], 2),
        (["--only", "9"], 2),
        (["--level", "fast"], 2),
        (["--root", "sha256:" + "0" * 64], 5),
    ],
)
def test_repair_refuses(damaged: Path, words: list[str], code: int) -> None:
    """With the exit code of its kind, and nothing written."""
    before = tree(damaged)
    assert run(["repair", str(damaged), *words]) == code
    assert tree(damaged) == before


def test_repair_of_no_set(tmp_path: Path) -> None:
    """Exit code 4, and no directory is made."""
    assert run(["repair", str(tmp_path / "none")]) == 4
    assert not (tmp_path / "none").exists()
    assert run(["repair", str(tmp_path)]) == 4


def test_verify_a_part(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Subset, rate and history; then there is nothing left to verify."""
    history = str(tmp_path / "history.jsonl")
    words = ["verify", str(made), "--history", history]
    assert run([*words, "--subset", "1/1", "--max-rate", "1TB/s"]) == 0
    assert "subset 1/1" in capsys.readouterr().out
    assert run([*words, "--since", "2000-01-31"]) == 0
    assert "ok: 3 partition(s), 0 B read" in capsys.readouterr().out
    assert len(Path(history).read_text().splitlines()) == 2


def test_damage_goes_into_the_history(damaged: Path, tmp_path: Path) -> None:
    """For a monitor: exit code 5, and the faults in the line."""
    history = tmp_path / "history.jsonl"
    assert run(["verify", str(damaged), "--history", str(history), "-q"]) == 5
    line = json.loads(history.read_text())
    assert line["faults"] == len(line["problems"]) == 3


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--subset", "8/7"], 2),
        (["--subset", "x"], 2),
        (["--since", "yesterday", "--history", "h"], 2),
        (["--since", "30d"], 2),
        (["--max-rate", "0"], 2),
        (["--max-rate", "fast"], 2),
        (["--max-rate", "-1MB"], 2),
        (["--history", ""], 2),
        (["--history", "/nowhere/at/all/history.jsonl"], 6),
        (["--level", "quick", "--subset", "1/2"], 2),
    ],
)
def test_verify_refuses(made: Path, words: list[str], code: int) -> None:
    """Rather than to verify less, or faster, than was meant."""
    assert run(["verify", str(made), *words]) == code


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("100MB", 10**8), ("50MiB", 50 << 20), ("1000000", 10**6), ("64 KiB", 64 << 10), ("3k", 3000),
        ("2G/s", 2 * 10**9), ("512B", 512),
    ],
)  # fmt: skip
def test_rates(made: Path, monkeypatch: pytest.MonkeyPatch, text: str, rate: int) -> None:
    """As sizes are written: k, M, G, T, with i for powers of 1024."""
    import mmsplit.cli.verify_command as command

    asked = []

    def note(*values: object) -> None:
        asked.append(values[-1])

    monkeypatch.setattr(command, "scrub_of", note)
    assert run(["verify", str(made), "--max-rate", text]) == 0
    assert asked == [rate]


@pytest.mark.parametrize(
    ("text", "since"),
    [
        ("12h", timedelta(hours=12)),
        ("30d", timedelta(days=30)),
        ("2w", timedelta(weeks=2)),
        ("2026-01-31T02:00:00+01:00", datetime(2026, 1, 31, 1, tzinfo=UTC)),
        ("2026-01-31T02:00:00Z", datetime(2026, 1, 31, 2, tzinfo=UTC)),
    ],
)
def test_moments_and_ages(made: Path, monkeypatch: pytest.MonkeyPatch, text: str, since: object) -> None:
    """A date without a time zone is local."""
    import mmsplit.cli.verify_command as command

    asked = []

    def note(*values: object) -> None:
        asked.append(values[1])

    monkeypatch.setattr(command, "scrub_of", note)
    assert run(["verify", str(made), "--since", text]) == 0
    assert asked == [since]


def test_without_these_options_everything_is_verified() -> None:
    """No scrub, and no history."""
    assert scrub_of(None, None, None, None) is None
