"""scripts/hf_model_helper.py: a real process against the loopback Hub downloads, splits, goes on, and says what."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, llama_weights, tree, write_checkpoint
from loopback_hub import LoopbackHub

import mmsplit

SCRIPT = Path(__file__).parents[2] / "scripts" / "hf_model_helper.py"
ID = "meta-llama/Llama-3.2-1B"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    files = {"config.json": CAUSAL_CONFIG, "tokenizer.json": b'{"version": 1}'}
    return write_checkpoint(tmp_path / "hub" / ID, [llama_weights(4)], files=files)


@pytest.fixture
def hub(model: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(model.parent.parent) as hub:
        yield hub


def run_script(hub: LoopbackHub, place: Path, *options: str) -> subprocess.CompletedProcess[str]:
    place.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--model-id", ID, "--cache-dir", "./models", "--num-parts", "2", *options],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(place / "home")},
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("options", [(), ("--keep-source",)], ids=["streamed", "keep-source"])
def test_downloads_and_splits_in_one_go(
    model: Path, hub: LoopbackHub, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Leaves config, tokenizer and the set, and keeps the shards only if asked to; says what each partition holds."""
    commit = hub.repositories[ID].branches["main"]
    place = tmp_path / "place"
    done = run_script(hub, place, *options)
    assert done.returncode == 0, done.stderr
    mmsplit.split(model, tmp_path / "local", 2, model_id=ID, revision=commit)
    assert tree(place / "models" / ID) == tree(tmp_path / "local")
    assert bool(list(place.rglob("*.safetensors"))) == bool(options)
    plan = mmsplit.plan(model, 2)
    for part in plan.partitions:
        row = next(line for line in done.stdout.splitlines() if line.split()[:1] == [str(part.part_id)])
        assert f"{part.layers[0].name} … {part.layers[-1].name}" in row
        assert f"{part.total_params / 1e3:.3g} k" in row
    assert commit in done.stdout


def test_run_again_it_says_that_it_is_done(hub: LoopbackHub, tmp_path: Path) -> None:
    """A finished set is left as it is, and a revision asked for by name is the same set."""
    place = tmp_path / "place"
    run_script(hub, place)
    out = place / "models" / ID
    made = tree(out)
    again = run_script(hub, place)
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout
    assert tree(out) == made
    run_script(hub, place / "other", "--revision", "main")
    assert tree(place / "other" / "models" / ID) == made


def test_goes_on_after_a_failure(hub: LoopbackHub, tmp_path: Path) -> None:
    """What ended one run is one line and an exit code; the next run makes the same set."""
    place = tmp_path / "place"
    (place / "models" / ID).mkdir(parents=True)
    (place / "models" / ID / "partition_1.bin").mkdir()  # in the way of the second partition
    failed = run_script(hub, place)
    assert failed.returncode == mmsplit.OutputError.exit_code
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in failed.stderr
    (place / "models" / ID / "partition_1.bin").rmdir()
    done = run_script(hub, place)
    assert done.returncode == 0, done.stderr
    assert mmsplit.verify(place / "models" / ID, level="full").ok


def test_a_model_that_is_not_there_is_one_line(hub: LoopbackHub, tmp_path: Path) -> None:
    """With the exit code of the network's errors, and no traceback."""
    result = run_script(hub, tmp_path / "place", "--revision", "v9")
    assert result.returncode == mmsplit.NetworkError.exit_code
    assert result.stderr.startswith(f"error: {ID}: no revision 'v9'")
    assert "Traceback" not in result.stderr
