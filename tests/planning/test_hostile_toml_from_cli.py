"""Every bad file of nodes and of rules as a person meets it: one line on stderr, exit code 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import llama_weights, write_checkpoint
from test_cuts import BAD_RULES
from test_nodes import BAD as BAD_NODES

from mmsplit.cli import run

#: What no parser sees: bytes that are no text, and more of them than such a file ever has.
RAW = {
    "no text": b"# caf\xe9",
    "zeros": bytes(100),
    "a byte order mark of UTF-16": "[[node]]".encode("utf-16"),
    "too long": b"#" * (2 << 20),
}
CASES = [
    *(("--nodes", case, text.encode()) for case, (text, _) in BAD_NODES.items()),
    *(("--rule", case, text.encode()) for case, (text, _) in BAD_RULES.items()),
    *((option, case, data) for option in ("--nodes", "--rule") for case, data in RAW.items()),
]


@pytest.mark.parametrize("command", ["plan", "split"])
def test_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    """The line names the file, and says what was found and what to do."""
    source = write_checkpoint(tmp_path / "model", [llama_weights(3)])
    path, output = tmp_path / "bad.toml", tmp_path / "out"
    for option, case, data in CASES:
        path.write_bytes(data)
        words = [command, str(source), option, str(path), *(["-o", str(output), "-q"] if command == "split" else [])]
        assert run(words) == 2, (option, case)
        said = capsys.readouterr()
        assert said.out == "", case
        assert said.err.startswith(f"mmsplit: error: {path}"), (case, said.err)
        assert said.err.count("\n") == 1, (case, said.err)
        assert said.err.removesuffix("\n").isprintable(), (case, said.err)
        assert said.err.rstrip()[-1] in ".?", (case, said.err)
        assert len(said.err) < 1000 + len(str(path)), case
        assert not output.exists(), case
        path.unlink()


@pytest.mark.parametrize("option", ["--nodes", "--rule"])
def test_a_file_that_is_not_there_and_one_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    source = write_checkpoint(tmp_path / "model", [llama_weights(3)])
    for path in (tmp_path / "none.toml", tmp_path):
        assert run(["plan", str(source), option, str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"mmsplit: error: {path}")
