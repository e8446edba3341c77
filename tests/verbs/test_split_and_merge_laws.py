"""Laws of the round trip, for arbitrary checkpoints: what comes out is what went in, and nothing else decides it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from arbitrary_checkpoints import cases
from checkpoints import MIB, Weight, llama_weights, tree, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsplit.errors import PlanError
from mmsplit.sidecar.output_directory import Existing
from mmsplit.verbs.merge import merge
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify


@given(
    case=cases(),
    num_parts=st.integers(1, 4),
    codec=st.sampled_from(["planes", "zstd", "raw"]),
    threads=st.sampled_from([1, 2, 5]),
    tied=st.sampled_from(["duplicate", "reference", "colocate"]),
    io=st.sampled_from(["auto", "pread"]),
    direct=st.booleans(),
)
@settings(max_examples=120, deadline=None, database=None)
def test_merge_after_split_gives_the_same_bytes(case, num_parts, codec, threads, tied, io, direct) -> None:
    """Every file of the checkpoint comes back byte for byte, and the set in between verifies at every level."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = case.write(root / "model")
        options = {"tied": tied, "codec": codec, "threads": threads, "io": io, "direct": direct}
        try:
            split(source, root / "set", num_parts, **options)
        except PlanError:
            assert num_parts > 1  # fewer layers than partitions
            return
        merge(root / "set", root / "back", threads=threads, io=io)
        assert tree(root / "back") == tree(source)
        assert verify(root / "set", level="full", against=source, threads=threads, io=io).problems == ()


def _variants() -> list[dict[str, object]]:
    return [
        {"threads": 1, "io": "pread", "direct": False},
        {"threads": 1, "io": "mmap", "direct": True},
        {"threads": 3, "io": "auto", "direct": False},
        {"threads": 16, "io": "pread", "direct": True},
    ]


@pytest.mark.parametrize("codec", ["planes", "zstd", "raw"])
def test_only_input_and_plan_decide_the_bytes(tmp_path: Path, codec: str) -> None:
    """Threads, ways of reading and ways of writing do not show in any file of the set."""
    weights = [*llama_weights(4), Weight("model.layers.1.big", "BF16", (3 * MIB + 5,), 40)]
    source = write_checkpoint(tmp_path / "model", [weights[::2], weights[1::2]], index=True, pad=3)
    first = None
    for number, options in enumerate(_variants()):
        split(source, tmp_path / str(number), 3, codec=codec, **options)
        made = tree(tmp_path / str(number))
        assert first is None or made == first, options
        first = made


@pytest.mark.parametrize("existing", ["refuse", "resume", "force"])
def test_a_first_run_is_the_same_whatever_it_would_do_to_others(tmp_path: Path, existing: Existing) -> None:
    """Where nothing is, `--resume` and `--force` start like a plain run."""
    source = write_checkpoint(tmp_path / "model", [llama_weights(2)])
    split(source, tmp_path / "plain", 2)
    result = split(source, tmp_path / "other", 2, existing=existing)
    assert tree(tmp_path / "other") == tree(tmp_path / "plain")
    assert (result.resumed_bytes, result.already_finished) == (0, False)
