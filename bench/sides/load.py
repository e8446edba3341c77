"""Load every tensor of one file into memory and touch every page.  load.py LIBRARY FILE

LIBRARY is mmsplit, safetensors.numpy or safetensors.torch.  Prints seconds and CPU seconds, imports left out, then
(after the clock) a checksum of every tensor's bytes, so that the sides can be compared.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - imported before the clock starts, for both libraries
import numpy as np
import xxhash

_PAGE_BYTES = 4096


def _mmsplit(path: Path) -> Callable[[], dict[str, Any]]:
    from mmsplit import open_partition

    def load() -> dict[str, Any]:
        with open_partition(path) as partition:
            return partition.load()

    return load


def _safetensors_numpy(path: Path) -> Callable[[], dict[str, Any]]:
    from safetensors.numpy import load_file

    return lambda: dict(load_file(path))


def _safetensors_torch(path: Path) -> Callable[[], dict[str, Any]]:
    import torch
    from safetensors.torch import load_file

    return lambda: {name: tensor.view(torch.uint8).numpy() for name, tensor in load_file(path).items()}


_LIBRARIES = {"mmsplit": _mmsplit, "safetensors.numpy": _safetensors_numpy, "safetensors.torch": _safetensors_torch}


def main() -> None:
    load = _LIBRARIES[sys.argv[1]](Path(sys.argv[2]))
    cpu, started = time.process_time(), time.perf_counter()
    tensors = load()
    touched = sum(int(_bytes(array)[::_PAGE_BYTES].sum(dtype=np.uint64)) for array in tensors.values())
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    checksums = {name: xxhash.xxh3_128_hexdigest(_bytes(tensors[name]).data) for name in sorted(tensors)}
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "touched": touched, "checksums": checksums}))


def _bytes(array: Any) -> Any:
    return array.reshape(-1).view(np.uint8)


if __name__ == "__main__":
    main()
