"""Every hostile file as a person meets it: a command, one line on stderr, exit code 3, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_gguf_hostile import HOSTILE as GGUF
from test_torch_hostile import HOSTILE as TORCH

from mmsplit.cli import run

CASES = {
    **{f"torch: {case}": ("pytorch_model.bin", *file_and_words) for case, file_and_words in TORCH.items()},
    **{f"gguf: {case}": ("model.gguf", *file_and_words) for case, file_and_words in GGUF.items()},
}


@pytest.mark.parametrize("command", ["plan", "split", "inspect"])
@pytest.mark.parametrize("as_directory", [False, True], ids=["file", "directory"])
def test_one_line_and_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, as_directory: bool
) -> None:
    """Whatever the file is, named by itself or found in its directory; all cases in turn, since each takes a moment."""
    for number, (case, (name, file, _)) in enumerate(CASES.items()):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        path.write_bytes(file)
        output = tmp_path / "out"
        source = str(path.parent if as_directory else path)
        words = {
            "plan": ["plan", source, "-n", "1"],
            "split": ["split", source, "-o", str(output), "-n", "1", "--quiet"],
            "inspect": ["inspect", source],
        }
        assert run(words[command]) == 3, case
        said = capsys.readouterr()
        assert said.out == "", case
        assert said.err.startswith(f"mmsplit: error: {path}"), (case, said.err)
        assert said.err.count("\n") == 1, (case, said.err)
        assert said.err.removesuffix("\n").isprintable(), (case, said.err)
        assert len(said.err) < 1000 + len(str(path)), case
        assert not output.exists(), case
        assert path.read_bytes() == file, case
