"""What config.json would say, from the metadata of a GGUF file.  Pure.

A GGUF file carries its configuration in itself, under names of its own: `llama.block_count`.  The rest of mmsplit
knows those of config.json, so that planning for nodes works on a GGUF file alone.  Names and meaning of the metadata:
gguf-py's constants.py and llama.cpp's src/models.  Whatever has not the type it should have counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mmsplit.checkpoint.gguf_values import Omitted, Value

#: Key behind the architecture's name -> key in config.json, of numbers that are the same in both.
_NUMBERS: Final = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "nextn_predict_layers": "num_nextn_predict_layers",
    "decoder_block_count": "decoder_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.shared_kv_layers": "num_kv_shared_layers",
    "attention.sliding_window": "sliding_window",
    "rope.dimension_count": "qk_rope_head_dim",
    "ssm.state_size": "ssm_state_size",
}
#: Those of them that may differ from block to block, as an array.
_PER_BLOCK: Final = ("attention.head_count", "attention.head_count_kv")

#: Architectures whose every n-th block looks back over everything, by llama.cpp's word, where the file has only the
#: window.  Of others it is not known which blocks slide, and all are taken to see everything.
_WINDOW_PATTERNS: Final = {
    "gemma2": 2,
    "gpt-oss": 2,
    "afmoe": 4,
    "cohere2": 4,
    "exaone4": 4,
    "exaone-moe": 4,
    "olmo2": 4,
    "gemma3n": 5,
    "gemma3": 6,
}
#: llama.cpp knows this one by heart: three blocks of four look back to the start of a chunk.
_LLAMA4_WINDOW: Final = {"model_type": "llama4_text", "attention_chunk_size": 8192}

#: What turns no hidden states into tokens, although its metadata do not say so.
_ENCODERS: Final = frozenset({"clip", "t5encoder", "wavtokenizer-dec"})
_NO_POOLING: Final = 0


def gguf_config(metadata: Mapping[str, Value]) -> dict[str, object] | None:
    """Return what the metadata say of the model, as config.json would; None where they describe none.

    In a model of several files only the first has such metadata.  `architectures` is a name that ends in
    "ForCausalLM" or "ForConditionalGeneration" where the model makes text; there is no `tie_word_embeddings`, since
    GGUF has none: a head that is not stored is tied.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or metadata.get("general.type", "model") not in {"model", "mmproj"}:
        return None
    own = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    blocks = _count(own.get("block_count"))
    if blocks is None and name not in _ENCODERS:
        return None
    config: dict[str, object] = {"architectures": [_architecture(name, own)], "dtype": "float16"}
    for key, ours in _NUMBERS.items():
        value = _count(_same(own.get(key)) if key in _PER_BLOCK else own.get(key))
        if value is not None:
            config[ours] = value
    if own.get("attention.value_length", config.get("head_dim")) != config.get("head_dim"):
        config.pop("head_dim", None)  # keys and values of different width: one number cannot say it
        config.pop("num_key_value_heads", None)
        config.pop("num_attention_heads", None)
    if "kv_lora_rank" not in config:
        config.pop("qk_rope_head_dim", None)
    vocabulary = own.get("vocab_size", metadata.get("tokenizer.ggml.tokens"))
    size = vocabulary.length if isinstance(vocabulary, Omitted) else _count(vocabulary)
    if size:
        config["vocab_size"] = size
    if blocks is not None:
        config["num_hidden_layers"] = max(1, blocks - (_count(own.get("nextn_predict_layers")) or 0))
    return config | _windows(name, own)


def _architecture(name: str, own: Mapping[str, Value]) -> str:
    pooling = own.get("pooling_type", _NO_POOLING)
    if name in _ENCODERS or own.get("attention.causal") is False or pooling != _NO_POOLING:
        return name
    return f"{name}ForConditionalGeneration" if name == "t5" else f"{name}ForCausalLM"


def _windows(name: str, own: Mapping[str, Value]) -> dict[str, object]:
    """Return which blocks look back over a window only."""
    pattern = own.get("attention.sliding_window_pattern")
    if name == "llama4":
        return {} if own.get("attention.sliding_window") == 0 else dict(_LLAMA4_WINDOW)
    if isinstance(pattern, tuple):
        return {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern]}
    if name in _WINDOW_PATTERNS:
        return {"sliding_window_pattern": _count(pattern) or _WINDOW_PATTERNS[name]}
    return {}


def _count(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _same(value: Value | None) -> Value | None:
    """Return the one number an array holds, but for the zeros of blocks without attention."""
    if not isinstance(value, tuple):
        return value
    different = {number for number in value if number != 0}
    return different.pop() if len(different) == 1 else None
