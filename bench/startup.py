"""What does it cost to start?

`python -c "import mmsplit"` against `python -c pass`, and `mmsplit --help`.

Counted: wall seconds of the whole process, Python's own start included.
"""

from __future__ import annotations

import sys
from functools import partial

import harness
from harness import BenchError, Comparison, Result, Run, Side, Target, Work

_MOST_IMPORT = 0.15
_MOST_HELP = 0.25


def bench(work: Work) -> Result:
    """Compare both with a Python that does nothing."""
    result = Result("startup", "What does it cost to start?", "nothing")
    nothing = Side("python -c pass", partial(harness.run_process, [sys.executable, "-c", "pass"]))
    imported = Side("import mmsplit", partial(harness.run_process, [sys.executable, "-c", "import mmsplit"]))
    shown = Side("mmsplit --help", _help)
    for side in (nothing, imported, shown):
        side.run()  # byte code is compiled, files are cached
    pairs = 4 * work.pairs
    result.comparisons = [
        harness.compare("import mmsplit, against nothing", 0, imported, nothing, pairs),
        harness.compare("mmsplit --help, against nothing", 0, shown, nothing, pairs),
    ]
    limits = (_MOST_IMPORT, _MOST_HELP)
    result.targets = [_target(*pair) for pair in zip(result.comparisons, limits, strict=True)]
    return result


def _target(comparison: Comparison, most: float) -> Target:
    seconds, empty = comparison.a.median_seconds(), comparison.b.median_seconds()
    measured = f"{seconds:.3f} s, of which Python alone {empty:.3f} s"
    return Target(f"`{comparison.a.label}`, whole process", "—", f"at most {most} s", measured, seconds <= most)


def _help() -> Run:
    run = harness.run_process(harness.mmsplit_command("--help"))
    if "split" not in run.output:
        raise BenchError("mmsplit --help shows no help")
    return run


if __name__ == "__main__":
    harness.main(bench, harness.parser(__doc__).parse_args())
