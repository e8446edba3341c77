"""Is cutting a set another way as fast as copying it?

`mmsplit repartition` of a set of two partitions into five, against `cp` of the same files and `sync` of the copy, and
against a fresh `mmsplit split` of the checkpoint into five, which gives the same bytes.

Counted: wall and CPU seconds of the whole process, from an input that is in the page cache to output that is durable.
Tied weights are referred to, so that all sides write the same number of bytes; speeds are per byte of the set.

mmsplit compares every chunk with its checksum while it copies; `cp` compares nothing.
"""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import harness
import inputs
from harness import BenchError, Comparison, Result, Side, Target, Work

_THREADS = 2
_BEFORE, _AFTER = 2, 5
_PLAN = ("--tied", "reference", "--threads", _THREADS, "--quiet")


def bench(work: Work) -> Result:
    """Compare repartition with copying the set, and with splitting again."""
    work.need(int(inputs.llama_bytes(small=work.small) * 3.3))
    checkpoint = inputs.llama(work.inputs, small=work.small)
    source, expected, output = (work.path / name for name in ("set", "expected", "output"))
    for place, parts in ((source, _BEFORE), (expected, _AFTER)):
        harness.run_process(harness.mmsplit_command("split", checkpoint, "-o", place, "-n", parts, *_PLAN))
    files = sorted(path for path in source.iterdir() if path.is_file())
    moved = sum(path.stat().st_size for path in files)
    question = "Is cutting a set another way as fast as copying it?"
    result = Result("repartition_vs_copy", question, f"a set of {moved:,} bytes in {_BEFORE} partitions, cached")
    result.notes.append("mmsplit compares every chunk with its checksum while it copies; cp compares nothing.")

    def side(label: str, command: list[object], same_as: Path, warm: list[Path]) -> Side:
        return Side(
            label,
            partial(harness.run_process, command),
            prepare=partial(work.clear, output),
            check=partial(_require_same_set, output, same_as),
            warm=warm,
        )

    again = harness.mmsplit_command("repartition", source, "-o", output, "-n", _AFTER, *_PLAN)
    fresh = harness.mmsplit_command("split", checkpoint, "-o", output, "-n", _AFTER, *_PLAN)
    place, copy = shlex.quote(str(source)), shlex.quote(str(output))
    script = f"mkdir {copy} && cp --reflink=never {place}/* {copy}/ && sync {copy}/* {copy}"
    repartition = side("mmsplit repartition", again, expected, files)
    copied = side("cp + sync", ["sh", "-c", script], source, files)
    split = side("mmsplit split", fresh, expected, [inputs.shard_of(checkpoint)])
    compare = partial(harness.compare, moved_bytes=moved, pairs=work.pairs)
    against_copy = compare("repartition, against copy", a=repartition, b=copied)
    ready = compare(
        "repartition, against copy, memory ready", a=repartition.with_memory_ready(), b=copied.with_memory_ready()
    )
    against_split = compare("repartition, against a fresh split", a=repartition, b=split)
    result.comparisons = [against_copy, ready, against_split]
    result.targets = [
        _target("`cp` of the same set + `sync`", against_copy, 1.0),
        _target("`cp` of the same set + `sync`, memory ready", ready, 1.0),
        _target("`mmsplit split` of the checkpoint", against_split, 1.0),
    ]
    return result


def _target(against: str, comparison: Comparison, least: float) -> Target:
    met = comparison.ratio >= least
    return Target(f"repartition, {_BEFORE} to {_AFTER}", against, f"at least {least}x", comparison.shown_ratio(), met)


def _require_same_set(output: Path, expected: Path) -> None:
    """Every file, the new manifests among them, is that of a fresh split, or of the set that was copied."""
    names = sorted(path.name for path in expected.iterdir())
    if sorted(path.name for path in output.iterdir()) != names:
        raise BenchError("the output has other files than the set that it must be")
    for name in names:
        harness.require_same(output / name, expected / name)


if __name__ == "__main__":
    harness.main(bench, harness.parser(__doc__).parse_args())
