"""Is verifying as fast as reading?

`mmsplit verify SET` (level stored: the checksum of every stored byte) against `cat` of its payloads to /dev/null,
both from a page cache that holds none of them.

Counted: wall and CPU seconds of the whole process.
"""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path

import harness
import inputs
from harness import BenchError, Result, Run, Side, Target, Work

_LEAST = 0.9


def bench(work: Work) -> Result:
    """Compare verify with cat, cold."""
    work.need(2 * inputs.llama_bytes(small=work.small))
    checkpoint = inputs.llama(work.inputs, small=work.small)
    output = work.path / "set"
    harness.run_process(harness.mmsplit_command("split", checkpoint, "-o", output, "--num-parts", 2, "--quiet"))
    payloads = sorted(output.glob("partition_*.bin"))
    moved = sum(path.stat().st_size for path in payloads)
    result = Result("verify_vs_cat", "Is verifying as fast as reading?", f"a set of {moved:,} bytes, cold")
    files = sorted(path for path in output.iterdir() if path.is_file())
    verify = _Verify(output, moved)
    words = " ".join(shlex.quote(str(path)) for path in payloads)
    cat = partial(harness.run_process, ["sh", "-c", f"cat {words} > /dev/null"])
    comparison = harness.compare(
        "verify against cat, cold",
        moved,
        Side("mmsplit verify", verify.run, check=verify.check, cold=files),
        Side("cat > /dev/null", cat, cold=files),
        work.pairs,
    )
    result.comparisons = [comparison]
    met = comparison.ratio >= _LEAST
    against, target = "`cat FILE > /dev/null`, cold", f"at least {_LEAST}x"
    result.targets = [Target("`verify` (stored), cold", against, target, comparison.shown_ratio(), met)]
    return result


class _Verify:
    """Verifies the set, and checks that all of it was looked at."""

    def __init__(self, output: Path, expected_bytes: int) -> None:
        self._command = harness.mmsplit_command("verify", output, "--quiet", "--json")
        self._expected_bytes = expected_bytes
        self._said = ""

    def run(self) -> Run:
        run = harness.run_process(self._command)
        self._said = run.output
        return run

    def check(self) -> None:
        said = json.loads(self._said)
        # Headers and chunk indexes are read, too, but not counted as checked.
        if not said["ok"] or said["checked_bytes"] < 0.98 * self._expected_bytes:
            raise BenchError("verify did not look at the whole set, or found it damaged")


if __name__ == "__main__":
    harness.main(bench, harness.parser(__doc__).parse_args())
