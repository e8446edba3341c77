"""Tiny checkpoints of many shapes, written byte by byte so that nothing of mmsplit is needed to make them.

A checkpoint is described by shards, a shard by tensors (`Weight`).  Data is from a seed: the same description gives
the same bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmsplit.dtypes import DTYPES

MIB = 1 << 20


class Weight(NamedTuple):
    """One tensor to write.  `noise` is how many of its bytes in 256 are random; the rest repeat."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    noise: int = 64


def write_shard(path: Path, weights: Sequence[Weight], *, seed: int = 0, metadata: object = None, pad: int = 0) -> None:
    """Write one safetensors file; `pad` spaces after the header put the weights on any offset."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    position, pieces = 0, []
    for number, weight in enumerate(weights):
        size = size_of(weight)
        header[weight.name] = {
            "dtype": weight.dtype,
            "shape": list(weight.shape),
            "data_offsets": [position, position + size],
        }
        pieces.append(data_of(size, weight.noise, seed * 1009 + number))
        position += size
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))


def size_of(weight: Weight) -> int:
    """Bytes of a tensor; its elements must fill whole bytes."""
    bits = DTYPES[weight.dtype].bits
    for size in weight.shape:
        bits *= size
    assert bits % 8 == 0
    return bits // 8


def data_of(size: int, noise: int, seed: int) -> bytes:
    """Bytes that compress about as well as `noise` says (0: very, 256: not at all)."""
    rng = np.random.Generator(np.random.PCG64(seed))
    data = rng.integers(0, 256, size, np.uint8)
    data[rng.integers(0, 256, size, np.uint16) >= noise] = 0x3C
    return data.tobytes()


def write_checkpoint(
    root: Path,
    shards: Sequence[Sequence[Weight]],
    *,
    index: bool = False,
    metadata: object = None,
    files: Mapping[str, bytes] | None = None,
    pad: int = 0,
    seed: int = 0,
) -> Path:
    """Write a directory: `model.safetensors`, or numbered shards, with or without their index."""
    root.mkdir(parents=True, exist_ok=True)
    names = (
        ["model.safetensors"]
        if len(shards) == 1 and not index
        else [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    )
    for number, (name, weights) in enumerate(zip(names, shards, strict=True)):
        write_shard(root / name, weights, seed=seed + number, metadata=metadata, pad=pad)
    if index:
        weight_map = {w.name: name for name, weights in zip(names, shards, strict=True) for w in weights}
        index_json = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (root / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2))
    for relative, data in (files or {}).items():
        place = root / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return root


def llama_weights(blocks: int, *, rows: int = 64, columns: int = 32, head: bool = False) -> list[Weight]:
    """Weights named like a small decoder's; without `head` its head is tied to the embedding."""
    weights = [Weight("model.embed_tokens.weight", "BF16", (rows, columns)), Weight("model.norm.weight", "F32", (5,))]
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        weights += [
            Weight(f"{prefix}.input_layernorm.weight", "F32", (7,), 256),
            Weight(f"{prefix}.self_attn.q_proj.weight", "BF16", (rows, columns)),
            Weight(f"{prefix}.mlp.up_proj.weight", "F16", (rows, columns), 256),
        ]
    if head:
        weights.append(Weight("lm_head.weight", "BF16", (rows, columns)))
    return weights


#: A config that says: a decoder with a head, tied unless the head is stored.
CAUSAL_CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}).encode()


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root` by relative name."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def open_descriptors() -> int:
    """How many files this process holds open, where the system tells."""
    table = Path("/proc/self/fd")
    return len(list(table.iterdir())) if table.is_dir() else 0


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def sample(numbers: Iterable[int], count: int, seed: int = 0) -> list[int]:
    """At most `count` of the numbers, in order, always the same ones."""
    everything = list(numbers)
    chosen = random.Random(seed).sample(range(len(everything)), min(count, len(everything)))
    return [everything[position] for position in sorted(chosen)]
