"""Repeat every measurement: all benchmarks one after the other, then the README's figures and the plots.

    python bench/run_all.py --yes --dir /mnt/disk    on the disk to measure, without asking
    python bench/run_all.py --small                  try everything in a minute or two; keeps no figures

Checkpoints are made once and removed at the end.  A benchmark that fails is named at the end; the others still run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import harness

NAMES: Final = (
    "startup",
    "plan_deepseek",
    "split_vs_copy",
    "repartition_vs_copy",
    "verify_vs_cat",
    "load_vs_safetensors",
    "codec_vs_zipnn",
    "memory",
)


def main() -> None:
    options = _arguments()
    failed = [] if _run("harness.py", "--self-check", *_directory(options)) else ["harness.py --self-check"]
    if not failed:
        try:
            with tempfile.TemporaryDirectory(prefix="mmsplit-bench-", dir=options.dir) as inputs:
                failed = [name for name in options.only or NAMES if not _run_bench(name, Path(inputs), options)]
        except KeyboardInterrupt:
            sys.exit("bench: interrupted")
        except OSError as error:
            sys.exit(f"bench: {error.strerror or error}: {error.filename or 'no file named'}")
    if not options.small and not failed:
        failed = [script for script in ("report.py", "plots.py") if not _run(script)]
    if failed:
        sys.exit(f"bench: failed: {', '.join(failed)}")


def _arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"some of: {', '.join(NAMES)}")
    return parser.parse_args()


def _directory(options: argparse.Namespace) -> list[str]:
    return [] if options.dir is None else ["--dir", str(options.dir)]


def _run_bench(name: str, inputs: Path, options: argparse.Namespace) -> bool:
    words = ["--pairs", str(options.pairs), "--inputs", str(options.inputs or inputs), *_directory(options)]
    words += ["--small"] * options.small + ["--yes"] * options.yes
    if options.results is not None:
        words += ["--results", str(options.results)]
    return _run(f"{name}.py", *words)


def _run(script: str, *words: str) -> bool:
    print(f"\n=== {script} {' '.join(words)}", flush=True)
    return subprocess.run([sys.executable, harness.BENCH / script, *words], check=False).returncode == 0


if __name__ == "__main__":
    main()
