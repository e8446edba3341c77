"""A checkpoint to try things on: the tensors of Llama-3.2-1B with weights that behave like trained ones.

Names, shapes, dtypes, the tied head and config.json are those of the published model (config.json and header of
meta-llama/Llama-3.2-1B).  The weights are noise with what a codec can feel of trained weights: Gaussian within a
row, a spread of scales from row to row and from tensor to tensor, norms near a constant.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from mmsplit.checkpoint.header_writer import format_header

_SLICE_ROWS_BYTES: Final = 16 << 20
_LAYERS: Final = 16


class _Sizes(NamedTuple):
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


_FULL: Final = _Sizes(2048, 8192, 32, 8, 64, 128_256)
#: The same model a quarter as wide: about 250 MB.
_SMALL: Final = _Sizes(512, 2048, 8, 2, 64, 128_256)


def write_synthetic_checkpoint(directory: Path, *, full: bool = False, seed: int = 0) -> int:
    """Write config.json and model.safetensors (2.47 GB if `full`, else about 250 MB); return the bytes of weights.

    The same seed gives the same bytes.
    """
    sizes = _FULL if full else _SMALL
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(_config(sizes), indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6}) + "\n")
    tensors = sorted(_tensors(sizes))
    header = format_header((name, "BF16", shape, 2 * int(np.prod(shape))) for name, shape in tensors)
    rng = np.random.Generator(np.random.SFC64(seed))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        for name, shape in tensors:
            for piece in _weights(name, shape, rng):
                file.write(piece.data)
    return 2 * sum(int(np.prod(shape)) for _, shape in tensors)


def _tensors(sizes: _Sizes) -> Iterator[tuple[str, list[int]]]:
    hidden, intermediate, heads, kv_heads, head_dim, vocabulary = sizes
    yield "model.embed_tokens.weight", [vocabulary, hidden]
    yield "model.norm.weight", [hidden]
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", [hidden]
        yield f"{prefix}.post_attention_layernorm.weight", [hidden]
        yield f"{prefix}.self_attn.q_proj.weight", [heads * head_dim, hidden]
        yield f"{prefix}.self_attn.k_proj.weight", [kv_heads * head_dim, hidden]
        yield f"{prefix}.self_attn.v_proj.weight", [kv_heads * head_dim, hidden]
        yield f"{prefix}.self_attn.o_proj.weight", [hidden, heads * head_dim]
        yield f"{prefix}.mlp.gate_proj.weight", [intermediate, hidden]
        yield f"{prefix}.mlp.up_proj.weight", [intermediate, hidden]
        yield f"{prefix}.mlp.down_proj.weight", [hidden, intermediate]


def _weights(name: str, shape: list[int], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield a tensor's BF16 words in slices of whole rows, so that memory stays small."""
    if len(shape) == 1:
        yield _to_bf16(rng.normal(0.4 if "layernorm" in name else 2.5, 0.05, shape[0]).astype(np.float32))
        return
    rows, columns = shape
    tensor_scale = 0.02 * float(rng.lognormal(0.0, 0.25))
    step = max(1, _SLICE_ROWS_BYTES // (4 * columns))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        values = rng.standard_normal((count, columns), np.float32)
        values *= (tensor_scale * rng.lognormal(0.0, 0.15, (count, 1))).astype(np.float32)
        yield _to_bf16(values.reshape(-1))


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even, in place of a cast: no dependency, and no second copy of the values."""
    words = values.view(np.uint32)
    words += 0x7FFF + ((words >> 16) & 1)
    return (words >> 16).astype("<u2")


def _config(sizes: _Sizes) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate,
        "max_position_embeddings": 131072,
        "model_type": "llama",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": _LAYERS,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": sizes.vocabulary,
    }
