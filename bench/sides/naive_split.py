"""The split people write today: load the whole file, save each half of the layers.  naive_split.py SHARD OUTPUT

Prints seconds and CPU seconds, imports left out.  The new files are synced, as every other side's are.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import ml_dtypes  # noqa: F401 - without it numpy does not know bfloat16
from safetensors.numpy import load_file, save_file


def main() -> None:
    shard, output = Path(sys.argv[1]), Path(sys.argv[2])
    cpu, started = time.process_time(), time.perf_counter()
    tensors = load_file(shard)
    numbers = {name: int(found[1]) for name in tensors if (found := re.search(r"layers\.(\d+)\.", name))}
    half = (max(numbers.values()) + 1) // 2
    first = {name for name in tensors if numbers.get(name, 0 if "embed" in name else half) < half}
    output.mkdir(parents=True)
    save_file({name: tensors[name] for name in tensors if name in first}, output / "part_0.safetensors")
    save_file({name: tensors[name] for name in tensors if name not in first}, output / "part_1.safetensors")
    for path in (output / "part_0.safetensors", output / "part_1.safetensors", output):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}))


if __name__ == "__main__":
    main()
