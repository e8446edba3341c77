"""Does memory grow with the checkpoint?

Peak private memory of `mmsplit split`, `verify` and `merge`, on a checkpoint of 2.47 GB and on one of 25 GB (the
same tensors ten times over; sparse files with zeros for weights, unless --real).

Counted, every few milliseconds while the process runs: RssAnon of /proc/PID/status and Private_Dirty of
/proc/PID/smaps_rollup, which are memory that nobody else could use; and VmHWM, which counts mapped files too, though
their pages can be dropped at any time.  Merging the 25 GB is left out without --real: it would write 25 GB of zeros.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import inputs
from harness import BenchError, Result, Target, Work

_MOST_MIB = 160
_SECONDS_BETWEEN_LOOKS = 0.005
#: smaps_rollup walks the page tables, so it is looked at less often.
_LOOKS_PER_ROLLUP = 10
#: "The same for both": the larger checkpoint may take this much more; its manifests and index are ten times as long.
_SAME_MIB = 16


@dataclass
class Peaks:
    """The highest values seen while a process ran, in KiB, and how often it was looked at."""

    rss_anon: int = 0
    private_dirty: int = 0
    high_water: int = 0
    looks: int = 0

    def watch(self, process_id: int) -> None:
        """Look until the process is gone."""
        directory = Path("/proc") / str(process_id)
        try:
            while self._look(directory):
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        except OSError:
            return  # it has ended

    def private_mib(self) -> float:
        """The larger of the two measures of private memory."""
        return max(self.rss_anon, self.private_dirty) / 1024

    def as_json(self) -> dict[str, object]:
        return {
            "rss_anon_mib": round(self.rss_anon / 1024, 1),
            "private_dirty_mib": round(self.private_dirty / 1024, 1),
            "vm_hwm_mib": round(self.high_water / 1024, 1),
            "looks": self.looks,
        }

    def _look(self, directory: Path) -> bool:
        status = (directory / "status").read_text()
        if "RssAnon" not in status:
            return False  # a zombie has no memory any more
        self.rss_anon = max(self.rss_anon, _kib(status, "RssAnon"))
        self.high_water = max(self.high_water, _kib(status, "VmHWM"))
        if self.looks % _LOOKS_PER_ROLLUP == 0:
            rollup = (directory / "smaps_rollup").read_text()
            self.private_dirty = max(self.private_dirty, _kib(rollup, "Private_Dirty"))
        self.looks += 1
        return True


def _kib(text: str, field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)
    return int(found[1]) if found else 0


def bench(work: Work) -> Result:
    """Measure every verb on both sizes."""
    real: bool = work.options.real
    size = inputs.llama_bytes(small=work.small)
    work.need(int(size * (inputs.REPEATS * 2.8 + 1) if real else size * 3.3))
    checkpoint = inputs.llama(work.inputs, small=work.small)
    result = Result("memory", "Does memory grow with the checkpoint?", f"{size / 1e9:.2f} GB, and ten times as much")
    result.notes.append("The larger checkpoint has real weights." if real else "The larger checkpoint is sparse.")
    peaks = {"1x": _measure(work, checkpoint, merge=True)}
    large = inputs.repeated(work.path, checkpoint, real=real)
    peaks["10x"] = _measure(work, large, merge=real)
    work.clear(large)
    result.figures = {name: {verb: peak.as_json() for verb, peak in verbs.items()} for name, verbs in peaks.items()}
    result.targets = [
        _target(f"{verb}, {size * factor / 1e9:.2f} GB", peaks[name][verb])
        for name, factor in (("1x", 1), ("10x", inputs.REPEATS))
        for verb in peaks[name]
    ]
    result.targets += [_growth(verb, peaks["1x"][verb], peaks["10x"][verb]) for verb in peaks["10x"]]
    return result


def _measure(work: Work, checkpoint: Path, *, merge: bool) -> dict[str, Peaks]:
    output, merged = work.path / "set", work.path / "merged"
    steps: dict[str, list[object]] = {
        "split": ["split", checkpoint, "-o", output, "--num-parts", 2, "--quiet"],
        "verify": ["verify", output, "--level", "full", "--quiet"],
    }
    if merge:
        steps["merge"] = ["merge", output, "-o", merged, "--quiet"]
    peaks: dict[str, Peaks] = {}
    for verb, words in steps.items():
        peaks[verb] = Peaks()
        harness.run_process(harness.mmsplit_command(*words), watch=peaks[verb].watch)
        if peaks[verb].looks < 10:
            raise BenchError(f"{verb} was looked at only {peaks[verb].looks} times: no figure")
        print(f"{checkpoint.name}: {verb}: {_shown(peaks[verb].as_json())}", flush=True)
    if merge:
        for shard in sorted(checkpoint.glob("*.safetensors")):
            harness.require_same(merged / shard.name, shard)
    work.clear(output, merged)
    return peaks


def _shown(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in figures.items())


def _target(what: str, peaks: Peaks) -> Target:
    mib = peaks.private_mib()
    return Target(f"private memory, {what}", "—", f"at most {_MOST_MIB} MiB", f"{mib:.0f} MiB", mib <= _MOST_MIB)


def _growth(verb: str, small: Peaks, large: Peaks) -> Target:
    more = large.private_mib() - small.private_mib()
    target = f"the same, to {_SAME_MIB} MiB"
    return Target(f"private memory, {verb}, growth from 1x to 10x", "—", target, f"{more:+.0f} MiB", more <= _SAME_MIB)


def _options() -> Any:
    parser = harness.parser(__doc__)
    parser.add_argument("--real", action="store_true", help="write 25 GB of weights instead of sparse files; merge too")
    return parser.parse_args()


if __name__ == "__main__":
    harness.main(bench, _options())
