"""Laws of the round trip, for arbitrary checkpoints: what comes out is what went in, and nothing else decides it."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from checkpoints import CAUSAL_CONFIG, MIB, Weight, llama_weights, tree, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsplit.dtypes import DTYPES
from mmsplit.errors import PlanError
from mmsplit.sidecar.output_directory import Existing
from mmsplit.verbs.merge import merge
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

_STEMS = ["model.embed_tokens", "model.norm", "lm_head", "odd", *(f"model.layers.{k}.mlp.up_proj" for k in range(4))]
_LARGE = 4 * MIB + 70_001  # just over one chunk


class _Case(NamedTuple):
    shards: list[list[Weight]]
    index: bool
    metadata: dict[str, str] | None
    files: dict[str, bytes]
    pad: int


def _shapes(dtype: str) -> st.SearchStrategy[tuple[int, ...]]:
    def whole_bytes(shape: tuple[int, ...]) -> bool:
        return math.prod(shape) * DTYPES[dtype].bits % 8 == 0

    return st.lists(st.integers(0, 40), max_size=4).map(tuple).filter(whole_bytes)


_weights = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda dtype: st.builds(Weight, st.just(""), st.just(dtype), _shapes(dtype), st.sampled_from([0, 20, 100, 256]))
)


@st.composite
def _cases(draw: st.DrawFn) -> _Case:
    names = draw(st.lists(st.sampled_from(_STEMS), min_size=1, max_size=8, unique=True))
    weights = [draw(_weights)._replace(name=f"{name}.weight") for name in names]
    if draw(st.integers(0, 7)) == 0:
        weights[0] = Weight(weights[0].name, "U8", (_LARGE,), 10)
    count = draw(st.integers(1, min(4, len(weights))))
    return _Case(
        shards=[weights[k::count] for k in range(count)],
        index=draw(st.booleans()),
        metadata=draw(st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2)),
        files=draw(
            st.sampled_from(
                [{}, {"config.json": CAUSAL_CONFIG}, {"config.json": b"?", "deep/er/vocab.txt": b"\0" * 99}]
            )
        ),
        pad=draw(st.integers(0, 9)),
    )


@given(
    case=_cases(),
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
        source = write_checkpoint(
            root / "model", case.shards, index=case.index, metadata=case.metadata, files=case.files, pad=case.pad
        )
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
