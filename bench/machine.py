"""What the figures depend on: processor, memory, kernel, file system, versions.  No names, no paths."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Final

_PACKAGES: Final = ("mmsplit", "numpy", "zstandard", "xxhash", "safetensors", "ml_dtypes", "torch", "zipnn", "blosc2")


def describe(directory: Path) -> dict[str, object]:
    """Return what this machine is, and the file system of `directory`."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "file_system": _file_system(directory),
        "busy_cores_before": round(busy_cores(), 2),
    }


def busy_cores(seconds: float = 3.0) -> float:
    """Return how many processors others keep busy, seen over some seconds in which this process sleeps.

    Not the load average: it remembers the benchmark that ran before.
    """
    before, started = _cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    return (_cpu_seconds() - before) / (time.monotonic() - started)


def versions() -> dict[str, str]:
    """Return the versions of Python, of mmsplit (with its commit) and of the peers that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    spec = importlib.util.find_spec("mmsplit")
    home = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path(__file__).parent
    commit = _first_line("git", "-C", str(home), "describe", "--always", "--dirty")
    if commit:
        found["mmsplit commit"] = commit
    found["coreutils"] = _number(_first_line("cp", "--version"))
    found["zstd"] = _number(_first_line("zstd", "--version"))
    return {name: version for name, version in found.items() if version}


def _cpu_seconds() -> float:
    """Seconds that all processors together have worked since the machine started."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _file_system(directory: Path) -> str:
    """Return the type of the file system that holds `directory`: the longest mount point above it."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, this_kind, *_ = line.split()
        inside = str(directory.resolve()) == point or str(directory.resolve()).startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, this_kind
    return kind


def _first_line(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [""])[0]


def _number(line: str) -> str:
    found = re.search(r"\d+(\.\d+)+", line)
    return found[0] if found else ""
