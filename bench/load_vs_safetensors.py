"""How soon is a partition in memory?

`Partition.load` of all its tensors, verified, against safetensors `load_file` of a file with the same
tensors; both then touch every page of every tensor, and both start from a page cache that holds none of it.

Counted: wall and CPU seconds from opening the file to the last page touched, in a process of its own; imports are
left out on both sides.  After the clock each side's tensors are hashed, and must be the same.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import harness
import inputs
from harness import BenchError, Comparison, Result, Run, Side, Target, Work

_LEAST = 1.2


def bench(work: Work) -> Result:
    """Compare loading the second of two partitions with loading a safetensors file of the same tensors."""
    work.need(int(2.3 * inputs.llama_bytes(small=work.small)))
    checkpoint = inputs.llama(work.inputs, small=work.small)
    output = work.path / "set"
    harness.run_process(harness.mmsplit_command("split", checkpoint, "-o", output, "--num-parts", 2, "--quiet"))
    manifest, payload = output / "partition_1.json", output / "partition_1.bin"
    plain = work.path / "partition_1.safetensors"
    moved = _write_plain(manifest, plain)
    what = f"a partition of {moved:,} bytes of BF16, stored in {payload.stat().st_size:,}, cold"
    result = Result("load_vs_safetensors", "How soon is a partition in memory?", what)
    result.notes.append("mmsplit compares the checksum of every chunk; safetensors has none to compare.")
    seen: dict[str, str] = {}
    cold = [manifest, payload, plain]
    ours = _side("mmsplit", manifest, seen, cold)
    compared = []
    for library in ("safetensors.numpy", "safetensors.torch"):
        if library.endswith("torch") and importlib.util.find_spec("torch") is None:
            result.skip("safetensors.torch load_file", "torch is not installed")
            continue
        peer = _side(library, plain, seen, cold)
        compared.append(harness.compare(f"load, against {library}, cold", moved, ours, peer, work.pairs))
        ready = ours.with_memory_ready(), peer.with_memory_ready()
        compared.append(harness.compare(f"load, against {library}, cold, memory ready", moved, *ready, work.pairs))
    result.comparisons = compared
    result.targets = [_target(comparison) for comparison in compared]
    return result


def _target(comparison: Comparison) -> Target:
    against = f"{comparison.b.label} + touching every page, cold"
    measured, met = comparison.shown_ratio(), comparison.ratio >= _LEAST
    return Target("load a whole partition, cold", against, f"at least {_LEAST}x", measured, met)


def _write_plain(manifest: Path, plain: Path) -> int:
    """Write the partition's tensors as a safetensors file; return their bytes."""
    from safetensors.numpy import save_file

    from mmsplit import open_partition

    with open_partition(manifest) as partition:
        save_file({name: partition[name] for name in partition}, plain)
        return partition.total_bytes


def _side(library: str, path: Path, seen: dict[str, str], cold: list[Path]) -> Side:
    label = "mmsplit Partition.load" if library == "mmsplit" else f"{library}.load_file"
    loader = _Loader(library, path, seen)
    return Side(label, loader.run, check=loader.check, cold=cold, size=partial(_size, path))


def _size(path: Path) -> int:
    return path.with_suffix(".bin").stat().st_size if path.suffix == ".json" else path.stat().st_size


class _Loader:
    """Runs sides/load.py; all runs of all sides must see the same bytes in the same tensors."""

    def __init__(self, library: str, path: Path, seen: dict[str, str]) -> None:
        self._library = library
        self._path = path
        self._seen = seen
        self._checksums: dict[str, str] = {}

    def run(self) -> Run:
        run, said = harness.run_side("load.py", self._library, self._path)
        self._checksums = said["checksums"]
        return run

    def check(self) -> None:
        if not self._seen:
            self._seen.update(self._checksums)
        if not self._checksums or self._checksums != self._seen:
            raise BenchError(f"{self._library} loaded other bytes")


if __name__ == "__main__":
    harness.main(bench, harness.parser(__doc__).parse_args())
