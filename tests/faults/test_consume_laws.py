"""Laws of `--consume` over checkpoints of many shapes: the same set, no more disk than was said, nothing lost."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from checkpoints import Weight, tree, write_checkpoint
from consuming import MERGED, MODEL, ORIGINAL, SET, judge, shards_of
from fault_layer import Crash, Fault, Layer, Operation, files_below
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsplit.sidecar.disk_forecast import DiskForecast
from mmsplit.verbs.merge import merge
from mmsplit.verbs.split import split

#: What may be announced beyond what was needed: manifests, states and the rounding of files, which are of no account.
_SLACK_BYTES = 200_000


def _peak(before: Path, operations: Sequence[Operation]) -> int:
    """How many bytes more than in the beginning were in files at the worst moment."""
    sizes = {number: path.stat().st_size for number, path in enumerate(files_below(before))}
    names = {path.relative_to(before).as_posix(): number for number, path in enumerate(files_below(before))}
    begin = most = sum(sizes.values())
    for operation in operations:
        if operation.kind == "create":
            names[operation.path], sizes[operation.file] = operation.file, 0
        elif operation.kind == "write":
            sizes[operation.file] = max(sizes[operation.file], operation.offset + len(operation.data))
        elif operation.kind == "resize":
            sizes[operation.file] = operation.offset
        elif operation.kind == "unlink":
            sizes.pop(names.pop(operation.path))
        elif operation.kind == "rename":
            if operation.other in names:
                sizes.pop(names[operation.other])
            names[operation.other] = names.pop(operation.path)
        most = max(most, sum(sizes.values()))
    return most - begin


@st.composite
def models(draw: st.DrawFn) -> tuple[list[list[Weight]], int]:
    """Blocks of several sizes, dealt to shards in order or not, and a number of partitions."""
    blocks = draw(st.integers(2, 6))
    weights = [Weight("model.embed_tokens.weight", "BF16", (draw(st.integers(1, 200)), 64))]
    for block in range(blocks):
        rows = draw(st.integers(1, 400))
        weights.append(
            Weight(f"model.layers.{block}.mlp.up_proj.weight", "BF16", (rows, 64), draw(st.integers(0, 256)))
        )
    weights.append(Weight("model.norm.weight", "F32", (5,)))
    if draw(st.booleans()):
        weights = draw(st.permutations(weights))
    count = draw(st.integers(1, min(5, len(weights))))
    cuts = sorted(draw(st.sets(st.integers(1, len(weights) - 1), min_size=count - 1, max_size=count - 1)))
    shards = [list(weights[a:b]) for a, b in zip([0, *cuts], [*cuts, len(weights)], strict=True)]
    return shards, draw(st.integers(1, blocks))


@given(models(), st.integers(0, 10_000))
@settings(max_examples=12, deadline=None)
def test_same_set_no_more_disk_nothing_lost(made: tuple[list[list[Weight]], int], moment: int) -> None:
    """Split, merge back, both with --consume; and once more, dying at any call and going on."""
    shards, num_parts = made
    root = Path(tempfile.mkdtemp())
    try:
        out = root / "out"
        for name in (MODEL, ORIGINAL):
            write_checkpoint(out / name, shards)
        split(out / MODEL, root / "plain", num_parts, threads=1, model_id="m")
        shutil.copytree(out, root / "before")
        shutil.copytree(out, root / "again" / "out")
        told: list[DiskForecast] = []
        with Layer(out, keep=True) as layer:
            split(out / MODEL, out / SET, num_parts, threads=1, consume=True, announce=told.append, model_id="m")
        assert tree(out / SET) == tree(root / "plain")
        real = _peak(root / "before", layer.operations)
        assert real <= told[0].extra_bytes <= 2 * real + _SLACK_BYTES
        assert told[0].expected_bytes <= real * 1.1 + _SLACK_BYTES
        shutil.copytree(out, root / "between")
        with Layer(out, keep=True) as merged:
            merge(out / SET, out / MERGED, threads=1, consume=True, announce=told.append)
        assert shards_of(out / MERGED) == shards_of(out / ORIGINAL)
        real = _peak(root / "between", merged.operations)
        assert real <= told[1].extra_bytes <= real + _SLACK_BYTES
        _die_and_go_on(root / "again" / "out", num_parts, moment % layer.calls)
        assert tree(root / "again" / "out" / SET) == tree(root / "plain")
    finally:
        shutil.rmtree(root)


def _die_and_go_on(out: Path, num_parts: int, at: int) -> None:
    with pytest.raises(Crash), Layer(out, Fault(at, "torn" if at % 2 else "crash")):
        split(out / MODEL, out / SET, num_parts, threads=1, consume=True, model_id="m")
    assert judge(out, {}) == []
    split(out / MODEL, out / SET, num_parts, threads=1, consume=True, existing="resume", model_id="m")
