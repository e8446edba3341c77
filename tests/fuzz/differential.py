"""What mmsplit accepts, held against the libraries that files are made with: torch, and gguf where it is installed.

    python tests/fuzz/differential.py torch --runs 20000 --seed 3
    python tests/fuzz/differential.py gguf

Run by hand, in an environment that has them; `scripts/fuzz` needs neither.  Nothing is loaded that mmsplit refuses, and
torch with weights_only: of what remains a pickle may run nothing.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / room) for room in ("fuzz", "checkpoint", "")]

from form_mutators import mutate_gguf, mutate_torch  # noqa: E402
from target import CORPUS  # noqa: E402

from mmsplit.checkpoint.gguf_file import read_gguf_file  # noqa: E402
from mmsplit.checkpoint.strided import reach_count  # noqa: E402
from mmsplit.checkpoint.torch_file import read_torch_file  # noqa: E402
from mmsplit.errors import MmsplitError  # noqa: E402


def compare_torch(data: bytes) -> str:
    """Every tensor has the shape, the stride and the memory that torch sees; returns what came of it."""
    import torch

    try:
        file = read_torch_file(lambda start, stop: data[start:stop], len(data), "f")
    except MmsplitError:
        return "refused"
    try:
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; each is counted, for a person to judge
        return f"torch refuses: {type(error).__name__} {str(error)[:60]!r}"
    found = {".".join(path): tensor for path, tensor in _tensors(loaded, ())}
    for tensor in file.tensors:
        theirs = found.get(".".join((*file.wrapper, tensor.name)))
        if theirs is None:
            return f"WRONG torch has no {tensor.name!r}"
        if tuple(theirs.shape) != tensor.shape or (theirs.numel() > 1 and theirs.stride() != tensor.stride):
            return f"WRONG torch sees {theirs.shape}, {theirs.stride()} of {tensor}"
        reach = reach_count(tensor.shape, tensor.stride) * tensor.item_bytes
        start = theirs.storage_offset() * theirs.element_size()
        memory = bytes(theirs.untyped_storage().tolist()[start : start + reach]) if reach else b""
        if memory != data[tensor.start_offset : tensor.stop_offset]:
            return f"WRONG torch sees other bytes in {tensor.name!r}"
    return "same"


def _tensors(value: Any, path: tuple[str, ...]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _tensors(item, (*path, str(number)))


def compare_gguf(data: bytes) -> str:
    """Names, shapes, types and places are those that the gguf package sees."""
    import gguf

    try:
        file = read_gguf_file(lambda start, stop: data[start:stop], len(data), "f", "s")
    except MmsplitError:
        return "refused"
    with tempfile.NamedTemporaryFile() as place:
        Path(place.name).write_bytes(data)
        try:
            theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(place.name).tensors}
        except Exception as error:  # as above
            return f"gguf refuses: {type(error).__name__} {str(error)[:60]!r}"
        for tensor in file.tensors:
            other = theirs.get(tensor.name)
            if other is None:
                return f"WRONG gguf has no {tensor.name!r}"
            shape = tuple(int(size) for size in other.shape)[::-1]
            seen = shape, int(other.data_offset), int(other.n_bytes)
            if seen != (tensor.shape, tensor.start_offset, tensor.size_bytes):
                return f"WRONG gguf sees {tensor.name!r} as {seen}"
    return "same"


KINDS: dict[str, tuple[Callable[[bytes], str], Callable[[bytes, Random], bytes]]] = {
    "torch": (compare_torch, mutate_torch),
    "gguf": (compare_gguf, mutate_gguf),
}


def main() -> int:
    """Compare the seeds, then changed files; return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    compare, mutate = KINDS[options.kind]
    seeds = [path.read_bytes() for path in sorted((CORPUS / options.kind).iterdir()) if path.is_file()]
    random, outcomes = Random(f"{options.seed} {options.kind}"), Counter[str]()
    warnings.simplefilter("ignore")
    for number in range(options.runs):
        data = seeds[number] if number < len(seeds) else mutate(random.choice(seeds), random)
        outcome = compare(data)
        if outcome.startswith("WRONG") and not outcomes[outcome]:
            with tempfile.NamedTemporaryFile(prefix=f"{options.kind}-", delete=False) as kept:
                kept.write(data)
            sys.stdout.write(f"{outcome}: {kept.name}\n")
        outcomes[outcome] += 1
    for outcome, count in outcomes.most_common():
        sys.stdout.write(f"{count:8,}  {outcome}\n")
    return 1 if any(outcome.startswith("WRONG") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
