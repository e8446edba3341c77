"""Is a split as fast as a copy?

`mmsplit split` (planes, 2 threads, 2 partitions) against `cp` of the same files and `sync` of the copy, and against
what else a user could do with the bytes: `zstd -1 -T2`, and a script that loads the file and saves halves of it.

Counted: wall and CPU seconds of the whole process, from a source that is in the page cache to output that is
durable.  The naive script's imports are not counted.  Speeds are per byte of the source.

mmsplit hashes the whole source (SHA-256, which merge needs) and checksums every chunk while it splits; no peer
does.  What `sha256sum` of the same file takes by itself is measured beside it, and the split that leaves it out.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import statistics
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import harness
import inputs
import numpy as np
from harness import BenchError, Comparison, Result, Run, Side, Target, Work

_THREADS = 2


def bench(work: Work) -> Result:
    """Compare split with its peers, pair by pair."""
    source_bytes = inputs.llama_bytes(small=work.small)
    work.need(int(source_bytes * 3.3))
    checkpoint = inputs.llama(work.inputs, small=work.small)
    shard = inputs.shard_of(checkpoint)
    moved = shard.stat().st_size
    question = "Is a split as fast as a copy?"
    result = Result("split_vs_copy", question, f"{checkpoint.name}: one shard of {moved:,} bytes, BF16, cached")
    result.notes += [
        "mmsplit also computes the SHA-256 of the source, xxh3 and BLAKE3 of every chunk; the peers do not.",
        "'default' writes the tied embedding into both partitions (--tied duplicate), 'same bytes' writes it once"
        " (--tied reference), as the peers do.",
    ]
    sides = _Sides(work, checkpoint)
    copy = sides.copy()
    pairs = work.pairs
    default = sides.split("mmsplit split, default")
    same = sides.split("mmsplit split, same bytes", "--tied", "reference")
    raw = sides.split("mmsplit split --codec raw, same bytes", "--tied", "reference", "--codec", "raw")
    unhashed = sides.split("mmsplit split --no-source-sha256", "--tied", "reference", "--no-source-sha256")
    by_name = {
        "same": harness.compare("split, same bytes, against copy", moved, same, copy, pairs),
        "ready": harness.compare(
            "split, same bytes, against copy, memory ready",
            moved,
            same.with_memory_ready(),
            copy.with_memory_ready(),
            pairs,
        ),
        "default": harness.compare("split, default, against copy", moved, default, copy, pairs),
        "raw": harness.compare("split --codec raw, same bytes, against copy", moved, raw, copy, pairs),
        "unhashed": harness.compare("split --no-source-sha256, against copy", moved, unhashed, copy, pairs),
        "naive": harness.compare("split, same bytes, against a naive script", moved, same, sides.naive(), pairs),
    }
    missing = harness.missing_tools("zstd")
    if missing is None:
        by_name["zstd"] = harness.compare("split, same bytes, against zstd", moved, same, sides.zstd(), pairs)
    else:
        result.skip("zstd -1 -T2", missing)
    result.comparisons = list(by_name.values())
    _add_figures(result, sides, by_name, moved)
    return result


def _add_figures(result: Result, sides: _Sides, by_name: dict[str, Comparison], moved: int) -> None:
    hashed = harness.measure(sides.sha256sum(), 3)
    same, default = by_name["same"].a, by_name["default"].a
    cpu_per_gb = statistics.median(run.cpu_seconds for run in same.runs) / (moved / 1e9)
    unhashed_cpu_per_gb = by_name["unhashed"].a.median_cpu_seconds() / (moved / 1e9)
    default_cpu_per_gb = default.median_cpu_seconds() / (sides.raw_bytes[default.label] / 1e9)
    stored = (same.stored_bytes or 0) / sides.raw_bytes[same.label]
    result.figures = {
        "sha256sum_seconds": round(hashed.median_seconds(), 4),
        "split_cpu_seconds_per_gb": round(cpu_per_gb, 4),
        "split_unhashed_cpu_seconds_per_gb": round(unhashed_cpu_per_gb, 4),
        "split_default_cpu_seconds_per_gb_of_tensors": round(default_cpu_per_gb, 4),
        "split_stored_share_of_raw": round(stored, 5),
    }
    print(f"sha256sum alone: {hashed.median_seconds():.3f} s; CPU per GB split: {cpu_per_gb:.3f} s; size {stored:.4f}")
    against = "`cp` of the same files + `sync`"
    result.targets = [
        _speed_target("split, default codec, 2 threads, same bytes", against, by_name["same"], 1.0, ", aim at 1.3x"),
        _speed_target("split, same bytes, memory ready", f"{against}, memory ready", by_name["ready"], 1.0, ""),
        _speed_target("split, all defaults (tied embedding twice)", against, by_name["default"], 1.0, ""),
        Target("CPU per GB split", "—", "at most 1.1 s, aim at 0.9 s", f"{cpu_per_gb:.2f} s", cpu_per_gb <= 1.1),
        Target(
            "CPU per GB split, `--no-source-sha256`",
            "—",
            "at most 1.1 s, aim at 0.9 s",
            f"{unhashed_cpu_per_gb:.2f} s",
            unhashed_cpu_per_gb <= 1.1,
        ),
        _speed_target("split `--no-source-sha256`, same bytes", against, by_name["unhashed"], 1.0, ""),
        Target("size of the set, of its tensors (BF16 of the synthetic model)", "—", "—", f"{stored:.4f}", True),
        _speed_target("split `--codec raw`, same bytes", against, by_name["raw"], 0.95, ", checksums included"),
        _speed_target("split, same bytes", "naive `load_file` + `save_file` + sync", by_name["naive"], None, ""),
    ]
    if "zstd" in by_name:
        zstd = _speed_target("split, same bytes", "`zstd -1 -T2` + `sync`", by_name["zstd"], None, "")
        result.targets.append(zstd)


def _speed_target(what: str, against: str, comparison: Comparison, least: float | None, more: str) -> Target:
    text = "—" if least is None else f"at least {least}x{more}"
    return Target(what, against, text, comparison.shown_ratio(), comparison.ratio >= (least or 0))


class _Sides:
    """Makes the sides: each removes its output before the clock and checks it after."""

    def __init__(self, work: Work, checkpoint: Path) -> None:
        self._work = work
        self._checkpoint = checkpoint
        self._shard = inputs.shard_of(checkpoint)
        self._output = work.path / "output"
        self._verified: dict[str, str] = {}
        #: Bytes of tensors that each kind of split wrote, copies of tied ones included.
        self.raw_bytes: dict[str, int] = {}

    def split(self, label: str, *options: str) -> Side:
        fixed = ("--num-parts", 2, "--threads", _THREADS, "--quiet")
        command = harness.mmsplit_command("split", self._checkpoint, "-o", self._output, *fixed, *options)
        return self._side(label, partial(harness.run_process, command), partial(self._check_set, label))

    def copy(self) -> Side:
        source, output = shlex.quote(str(self._checkpoint)), shlex.quote(str(self._output))
        command = f"mkdir {output} && cp --reflink=never {source}/* {output}/ && sync {output}/* {output}"
        check = partial(self._check_same, self._shard.name)
        return self._side("cp + sync", partial(harness.run_process, ["sh", "-c", command]), check)

    def zstd(self) -> Side:
        source, output = shlex.quote(str(self._shard)), shlex.quote(str(self._output))
        packed = f"{output}/packed.zst"
        command = f"mkdir {output} && zstd -q -1 -T2 {source} -o {packed} && sync {packed} {output}"
        return self._side("zstd -1 -T2 + sync", partial(harness.run_process, ["sh", "-c", command]), self._check_zstd)

    def naive(self) -> Side:
        def run() -> Run:
            return harness.run_side("naive_split.py", self._shard, self._output)[0]

        return self._side("naive load_file + save_file + sync", run, self._check_naive)

    def sha256sum(self) -> Side:
        return Side("sha256sum", partial(harness.run_process, ["sha256sum", self._shard]), warm=[self._shard])

    def _side(self, label: str, run: Callable[[], Run], check: Callable[[], object]) -> Side:
        return Side(
            label,
            run,
            prepare=partial(self._work.clear, self._output),
            check=check,
            warm=[self._shard],
            size=self._stored_bytes,
        )

    def _stored_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._output.iterdir() if path.suffix != ".json")

    def _check_set(self, label: str) -> None:
        """The first set of a kind is merged and compared byte for byte; later ones must be the same set, intact."""
        manifest = (self._output / "partition_set.json").read_bytes()
        digest = hashlib.sha256(manifest).hexdigest()
        if label not in self._verified:
            merged = self._work.path / "merged"
            harness.run_process(harness.mmsplit_command("merge", self._output, "-o", merged, "--quiet"))
            harness.require_same(merged / self._shard.name, self._shard)
            shutil.rmtree(merged)
            self._verified[label] = digest
            self.raw_bytes[label] = json.loads(manifest)["total_bytes"]
        if self._verified[label] != digest:
            raise BenchError(f"{label} made another set than before")
        harness.run_process(harness.mmsplit_command("verify", self._output, "--quiet"))

    def _check_same(self, name: str) -> None:
        harness.require_same(self._output / name, self._shard)

    def _check_zstd(self) -> None:
        command = 'zstd -q -d -c "$0" | cmp -s - "$1"'
        if subprocess.run(["sh", "-c", command, self._output / "packed.zst", self._shard], check=False).returncode:
            raise BenchError("zstd does not give the original back")

    def _check_naive(self) -> None:
        import ml_dtypes  # noqa: F401 - without it numpy does not know bfloat16
        from safetensors.numpy import load_file

        rest = load_file(self._shard)
        for part in sorted(self._output.iterdir()):
            for name, array in load_file(part).items():
                original = rest.pop(name)
                same = array.dtype == original.dtype and array.shape == original.shape
                if not same or not np.array_equal(array.view(np.uint16), original.view(np.uint16)):
                    raise BenchError(f"the naive script wrote another {name}")
        if rest:
            raise BenchError(f"the naive script left out {len(rest)} tensors")


if __name__ == "__main__":
    harness.main(bench, harness.parser(__doc__).parse_args())
