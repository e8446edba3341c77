"""scripts/check_layers: its answers and its exit codes."""

import gzip
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "data"))

from make_fixture import load_checker


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    return load_checker()


def entry(**changes: Any) -> dict[str, Any]:
    """A corpus entry of two blocks, with an embedding before and a head behind them."""
    tensors = [["embed_tokens.weight", "F32", [1], None], ["lm_head.weight", "F32", [1], None]]
    tensors += [[f"layers.{i}.mlp.{part}.weight", "F32", [1], i] for i in (0, 1) for part in ("up", "down")]
    made = {
        "config": {"num_hidden_layers": 2},
        "blocks": [{"path": "layers.0", "stack": 0}, {"path": "layers.1", "stack": 0}],
        "stacks": [{"path": "layers", "source": "no_split", "primary": True}],
        "layouts": {"memory": {"tensors": tensors}, "disk": "memory"},
        "forward": {"ok": True, "calls": "range"},
    }
    return {**made, **changes}


def write(folder: Path, **entries: Any) -> Path:
    for name, content in entries.items():
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(json.dumps(content).encode()))
    return folder


def test_a_good_corpus_scores_full(tmp_path: Path, checker: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Every question is asked of a plain entry, and answered right."""
    assert checker.main([str(write(tmp_path, plain=entry())), "--json", "--min-cut", "100"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert {question: score[question]["right"] for question in checker.QUESTIONS} == dict.fromkeys(checker.QUESTIONS, 1)


#: Tensors whose true blocks contradict their names, by the question that must notice.
BAD = {
    "cut": [["layers.0.mlp.up.weight", "F32", [1], 0], ["layers.1.mlp.up.weight", "F32", [1], 0]],
    "shared": [["layers.0.mlp.up.weight", "F32", [1], 0], ["layers.0.mlp.down.weight", "F32", [1], 1]],
    "order": [["layers.0.mlp.up.weight", "F32", [1], 1], ["layers.1.mlp.up.weight", "F32", [1], 0]],
    "tail": [["lm_head.weight", "F32", [1], None], ["lm_head_behind.x.weight", "F32", [1], 0]],
}


@pytest.mark.parametrize("question", BAD)
def test_a_wrong_answer_is_a_failure_with_its_reason(
    question: str, tmp_path: Path, checker: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Truth that the rules miss on purpose shows in the score, in words, and in the exit code."""
    bad = entry(layouts={"memory": {"tensors": BAD[question]}, "disk": "memory"})
    assert checker.main([str(write(tmp_path, bad=bad)), f"--min-{question}", "99"]) == 1
    output = capsys.readouterr()
    assert f"{question:<10} bad: " in output.out
    assert "below 99" in output.err


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip",
        gzip.compress(b"no json"),
        gzip.compress(b"[]"),
        gzip.compress(b"{}"),
        gzip.compress(b"{}")[:12],
    ],
    ids=["no gzip", "no json", "a list", "no entry", "cut short"],
)
def test_a_broken_file_is_one_line_and_exit_2(
    content: bytes, tmp_path: Path, checker: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad input is named, without a traceback."""
    (tmp_path / "broken.json.gz").write_bytes(content)
    assert checker.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "broken.json.gz" in error


def test_a_folder_must_be_there_and_hold_entries(tmp_path: Path, checker: ModuleType) -> None:
    """Checking nothing is not a success."""
    assert checker.main([str(tmp_path / "missing")]) == 2
    assert checker.main([str(tmp_path)]) == 2
    assert checker.main([str(write(tmp_path, plain=entry())), "--layout", "hub_legacy"]) == 2
