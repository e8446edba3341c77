"""How far back each block of a decoder looks, as config.json has it.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from mmsplit.planning.model_config import positive

#: Which blocks slide where config.json has `sliding_window` but no `layer_types`: all but every n-th (1: all).
#: From the configuration classes of transformers, whose defaults published configs leave out.
_PATTERNS: Final = {
    "mistral": 1,
    "mixtral": 1,
    "starcoder2": 1,
    "phi3": 1,
    "phimoe": 1,
    "gemma2": 2,
    "gpt_oss": 2,
    "cohere2": 4,
    "exaone4": 4,
    "olmo3": 4,
    "llama4_text": 4,
    "gemma3": 6,
    "gemma3_text": 6,
}


class Window(NamedTuple):
    """How one block looks back: over `tokens` (None: all), or, if `linear`, by a state alone."""

    tokens: int | None = None
    linear: bool = False


def block_windows(text: Mapping[str, object], block_count: int) -> tuple[list[Window], list[str]]:
    """Return the window of each block, and a note where config.json has one but does not say for which blocks.

    Where it is not clear the block is taken to look back over everything: too much is the safe side.
    """
    kinds = text.get("layer_types", text.get("layers_block_type"))
    if isinstance(kinds, list) and len(kinds) >= block_count:
        sliding, chunk = positive(text, ("sliding_window",)), positive(text, ("attention_chunk_size",))
        return [_of_kind(str(kind), sliding, chunk) for kind in kinds[:block_count]], []
    attention = text.get("attn_type_list")  # MiniMax: 0 lightning attention, 1 softmax
    if isinstance(attention, list) and len(attention) >= block_count:
        return [Window(linear=value == 0) for value in attention[:block_count]], []
    # Llama 4 looks back to the start of a chunk; its blocks with global positions see all.
    key = "attention_chunk_size" if text.get("model_type") == "llama4_text" else "sliding_window"
    window = positive(text, (key,))
    if window is None or text.get("use_sliding_window") is False:
        return [Window()] * block_count, []
    slides = _sliding_blocks(text, block_count)
    if slides is None:
        note = f"config.json has {key} = {window}, but not for which blocks: all are counted over the whole context"
        return [Window()] * block_count, [note]
    return [Window(window if slides_here else None) for slides_here in slides], []


def _of_kind(kind: str, sliding: int | None, chunk: int | None) -> Window:
    if "sliding" in kind or kind == "window_attention":
        return Window(sliding)
    if "chunked" in kind:
        return Window(chunk)
    return Window(linear=kind.startswith("linear"))


def _sliding_blocks(text: Mapping[str, object], block_count: int) -> list[bool] | None:
    """Return for each block whether it slides, by what families of models state instead of `layer_types`."""
    if text.get("use_sliding_window") is True:  # Qwen
        first = text.get("max_window_layers")
        start = first if type(first) is int else 0
        return [index >= start for index in range(block_count)]
    pattern = text.get("sliding_window_pattern", _PATTERNS.get(str(text.get("model_type"))))
    if isinstance(pattern, str) and pattern:  # EXAONE: "LLLG"
        return [pattern[index % len(pattern)] == "L" for index in range(block_count)]
    if type(pattern) is int and pattern > 0:
        return [pattern == 1 or (index + 1) % pattern != 0 for index in range(block_count)]
    return None
