"""How long does it take to look at a very large model?

`mmsplit plan` and `mmsplit inspect` of DeepSeek-V3: 163 shards, 91,991 tensors, 688.6 GB.  The shards are sparse
files with the true headers, which is all that these commands read; they are in the page cache.

Counted: wall and CPU seconds and peak resident memory of the whole process.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path

import harness
import inputs
from harness import BenchError, Result, Run, Samples, Side, Target, Work

_MOST_SECONDS = 1.0
_MOST_MIB = 200


def bench(work: Work) -> Result:
    """Run both commands, and compare what they say with what the model has."""
    work.need(50_000_000)
    model = inputs.deepseek_v3(work.inputs)
    _check_totals(model)
    what = f"DeepSeek-V3, {inputs.DEEPSEEK_SHARDS} sparse shards, {inputs.DEEPSEEK_TENSORS:,} tensors"
    result = Result("plan_deepseek", "How long does it take to look at a very large model?", what)
    plan = _measure("mmsplit plan", work, "plan", model, "--num-parts", 8)
    inspect = _measure("mmsplit inspect", work, "inspect", model)
    both = [a.seconds + b.seconds for a, b in zip(plan.runs, inspect.runs, strict=True)]
    result.figures = {
        "plan": plan.as_json(),
        "inspect": inspect.as_json(),
        "plan_and_inspect_seconds": harness.summary([round(seconds, 4) for seconds in both]),
    }
    result.targets = [target for samples in (plan, inspect) for target in _targets(samples)]
    together = statistics.median(both)
    what = "`mmsplit plan` and `mmsplit inspect`, one after the other"
    met = together <= _MOST_SECONDS
    result.targets.append(Target(what, "—", f"at most {_MOST_SECONDS} s", f"{together:.2f} s", met))
    return result


def _targets(samples: Samples) -> list[Target]:
    seconds = samples.median_seconds()
    mib = max(run.peak_rss_bytes for run in samples.runs) / (1 << 20)
    what = f"`{samples.label}` of DeepSeek-V3, whole process"
    return [
        Target(what, "—", f"at most {_MOST_SECONDS} s", f"{seconds:.2f} s", seconds <= _MOST_SECONDS),
        Target(f"{what}, peak memory", "—", f"at most {_MOST_MIB} MiB", f"{mib:.0f} MiB", mib <= _MOST_MIB),
    ]


def _measure(label: str, work: Work, *words: object) -> Samples:
    return harness.measure(Side(label, partial(_run, words)), work.pairs)


def _run(words: tuple[object, ...]) -> Run:
    run = harness.run_process(harness.mmsplit_command(*words))
    if "lm_head" not in run.output:
        raise BenchError(f"mmsplit {words[0]} did not reach the last layer")
    return run


def _check_totals(model: Path) -> None:
    """The plan must give every byte of every tensor to a partition, and inspect must see every tensor."""
    planned = json.loads(harness.run_process(harness.mmsplit_command("plan", model, "-n", 8, "--json")).output)
    planned_bytes = sum(part["total_bytes"] for part in planned["partitions"])
    seen = json.loads(harness.run_process(harness.mmsplit_command("inspect", model, "--json")).output)
    found = (planned_bytes, seen["tensors"], seen["shards"])
    expected = (inputs.DEEPSEEK_BYTES, inputs.DEEPSEEK_TENSORS, inputs.DEEPSEEK_SHARDS)
    if found != expected:
        raise BenchError(f"plan and inspect see {found} bytes, tensors and shards instead of {expected}")


if __name__ == "__main__":
    harness.main(bench, harness.parser(__doc__).parse_args())
