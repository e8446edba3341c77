"""Reading config.json: the language model's part of it, and widths under their several spellings.  Pure.

A config is a stranger's file: whatever has not the type it should have counts as absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

_TEXT_CONFIGS: Final = ("text_config", "llm_config", "language_config", "thinker_config", "decoder_config", "decoder")
#: thinker_config.text_config is as deep as it gets.
_MAX_NESTING: Final = 4
_HEAD_KEYS: Final = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
_KV_HEAD_KEYS: Final = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads", "n_head_kv")
_HIDDEN_KEYS: Final = ("hidden_size", "n_embd", "d_model", "n_embed", "model_dim")
_HEAD_DIM_KEYS: Final = ("head_dim", "kv_channels", "d_kv", "attention_head_dim")
_DEPTH_KEYS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_DTYPE_NAMES: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "half": "F16", "float": "F32"}


def text_config(config: Mapping[str, object] | None) -> Mapping[str, object]:
    """Return the part of config.json that describes the language model; empty where there is no config."""
    part: Mapping[str, object] = config or {}
    for _ in range(_MAX_NESTING):
        inner = next((value for key in _TEXT_CONFIGS if isinstance(value := part.get(key), Mapping) and value), None)
        if inner is None:
            break
        part = inner
    return part


def positive(config: Mapping[str, object], keys: Iterable[str]) -> int | None:
    """Return the first of these keys that holds a positive integer (True is none)."""
    return next((value for key in keys if type(value := config.get(key)) is int and value > 0), None)


def depth(text: Mapping[str, object]) -> int | None:
    """Return the number of blocks."""
    return positive(text, _DEPTH_KEYS)


def hidden_size(text: Mapping[str, object]) -> int | None:
    """Return the width of the hidden states."""
    return positive(text, _HIDDEN_KEYS)


def head_dim(text: Mapping[str, object]) -> int | None:
    """Return the width of one attention head, worked out where it is not stated."""
    stated, hidden, heads = positive(text, _HEAD_DIM_KEYS), hidden_size(text), positive(text, _HEAD_KEYS)
    return stated or (None if hidden is None or heads is None else hidden // heads)


def latent_width(text: Mapping[str, object]) -> int | None:
    """Return what multi-head latent attention caches per token: the latent, and the keys that are rotated."""
    rank, rope = positive(text, ("kv_lora_rank",)), positive(text, ("qk_rope_head_dim",))
    return None if rank is None else rank + (rope or 0)


def key_width(text: Mapping[str, object]) -> int | None:
    """Return key elements per token and block; as many are values."""
    inner = text.get("attn_config")  # MPT and DBRX keep it there
    kv_heads = positive(text, _KV_HEAD_KEYS) or (positive(inner, _KV_HEAD_KEYS) if isinstance(inner, Mapping) else None)
    if text.get("multi_query_attention") is True:  # ChatGLM
        kv_heads = positive(text, ("multi_query_group_num",)) or kv_heads
    elif text.get("model_type") in {"falcon", "gpt_bigcode"} and text.get("new_decoder_architecture") is not True:
        kv_heads = 1 if text.get("multi_query") is True else None  # Falcon-7B states num_kv_heads and means one
    heads, width = kv_heads or positive(text, _HEAD_KEYS), head_dim(text)
    return None if heads is None or width is None else heads * width


def stated_dtype(config: Mapping[str, object] | None) -> str | None:
    """Return the dtype in which the model computes, by its name in a header."""
    for part in (text_config(config), config or {}):
        value = part.get("torch_dtype", part.get("dtype"))
        if isinstance(value, str) and value.removeprefix("torch.") in _DTYPE_NAMES:
            return _DTYPE_NAMES[value.removeprefix("torch.")]
    return None
