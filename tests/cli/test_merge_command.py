"""`mmsplit merge` claims what was compared, and nothing more."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import llama_weights, write_checkpoint

from mmsplit.cli import run


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "1 shard(s), SHA-256 as split"),
        (["--no-source-sha256"], "1 shard(s), the checksums of all chunks are right; no SHA-256 was recorded"),
    ],
)
def test_the_last_line_says_what_was_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    """A SHA-256 that nobody recorded was not compared."""
    write_checkpoint(tmp_path / "source", [llama_weights(2)])
    assert run(["split", str(tmp_path / "source"), "-o", str(tmp_path / "set"), "-n", "2", *options]) == 0
    assert run(["merge", str(tmp_path / "set"), "-o", str(tmp_path / "out"), "-q"]) == 0
    assert line in capsys.readouterr().err
