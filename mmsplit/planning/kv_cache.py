"""What a decoder remembers per token and per sequence, block by block.  Pure.

The headers say most of it: `k_proj` has as many rows as a token has key elements, `kv_a_proj_with_mqa` (multi-head
latent attention) as many as the latent that is cached, `A_log` and depthwise convolutions tell recurrent blocks and
the size of their state.  config.json fills in where projections are fused or packed, and says which blocks look
only at a window.  What cannot be told is a note, never a silent zero.

Counted as engines with a cache per layer keep it (vLLM, SGLang): the latent for MLA, `min(context, window)` tokens
where a block slides.  An encoder-decoder is taken to have a source as long as its context.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from mmsplit.checkpoint import TensorInfo
from mmsplit.layers import Layer
from mmsplit.planning.attention_windows import Window, block_windows
from mmsplit.planning.model_config import depth, head_dim, hidden_size, key_width, latent_width, positive, text_config

_KEY_WORDS: Final = frozenset({"k_proj", "key_proj", "key", "k", "wk", "attn_k", "k_lin", "to_k", "cross_attn_k"})
_VALUE_WORDS: Final = frozenset({"v_proj", "value_proj", "value", "v", "wv", "attn_v", "v_lin", "to_v", "cross_attn_v"})
_LATENT_WORDS: Final = frozenset({"kv_a_proj_with_mqa", "attn_kv_a_mqa"})
_FUSED_WORDS: Final = frozenset(
    {
        "qkv_proj",
        "query_key_value",
        "c_attn",
        "wqkv",
        "qkv",
        "attn_qkv",
        "w_pack",
        "in_proj_weight",
        "kv_proj",
        "fused_qkv",
    }
)
#: What stands behind the projection in the name of its weight.
_PARAMETERS: Final = frozenset({"weight", "linear", "base_layer", "qweight", "packed", "weight_packed"})
_BARE_WORDS: Final = frozenset({"k", "v", "key", "value", "wk", "wv"})
#: What must be around those bare words, which mean other things outside of attention (RWKV's feed-forward).
_ATTENTION: Final = re.compile(r"(?:.*_)?(?:attn|attention|selfattention|encdecattention|mixer|indexer|self)(?:_.*)?")
#: A parameter with such a name makes its module recurrent: it has a state, and its projections fill no cache.
_STATE_WORDS: Final = frozenset({"A_log", "ssm_a", "rg_lru", "receptance", "time_mix_receptance"})
#: GGUF blocks have no modules: so is called what belongs to a state, and the projection into it.  Where there is none,
#: the state is that of linear attention, to which the block's attention projections belong.
_SSM_PREFIX: Final = "ssm_"
_SSM_INPUT: Final = "ssm_in"
#: Depthwise convolutions of GGUF.  They are (channels, width): no other shape than a projection's.
_GGUF_CONVOLUTION: Final = re.compile(r"ssm\.ssm_conv1d(?:_[qkv])?|shortconv\.conv")
_OUTPUT_WORDS: Final = frozenset({"out_proj", "o_proj", "ssm_out"})
#: Integers of these dtypes are packed weights: the shape is not that of the matrix.
_PACKED: Final = frozenset({"U8", "I32", "U32", "I16", "U16", "I64", "U64", "F4"})

#: Stacks that are run once and keep nothing: towers of other modalities, codecs; prediction beyond the next token.
_OTHER_STACK: Final = re.compile(
    r"(?:.*_)?(?:vision|visual|image|img|vit|video|audio|codec|vae|vq\w*|sam|siglip|clip|mtp|nextn|q_?former"
    r"|resampler|perceiver|projector|connector|depth)(?:_.*)?\d*|[av]"
)
_ENCODES: Final = frozenset({"encoder", "enc"})
_GENERATES: Final = re.compile(r"CausalLM|LMHead|ConditionalGeneration|Seq2Seq|SpeechToText|TextToSpeech|Chat")

_STATE_KEYS: Final = ("mamba_d_state", "ssm_state_size", "mamba_state_size", "state_size", "linear_key_head_dim")


class BlockCache(NamedTuple):
    """What one block keeps: `token_elements` keys and values per token, of the last `window_tokens` where it has
    a window; `state_elements` per sequence, however long it is.
    """

    token_elements: int = 0
    window_tokens: int | None = None
    state_elements: int = 0

    def size_bytes(self, context: int, batch: int, bits: int) -> int:
        """Bytes for `batch` sequences of `context` tokens; states are kept in F32, whatever the cache is in."""
        tokens = context if self.window_tokens is None else min(context, self.window_tokens)
        return batch * (-(-self.token_elements * tokens * bits // 8) + 4 * self.state_elements)


def block_caches(
    layers: Sequence[Layer], tensors: Mapping[str, TensorInfo], config: Mapping[str, object] | None
) -> tuple[dict[str, BlockCache], tuple[str, ...]]:
    """Return what each block caches, by layer name (absent: nothing), and notes on what could not be told."""
    architectures = (config or {}).get("architectures")
    if isinstance(architectures, list) and architectures and not _GENERATES.search(" ".join(map(str, architectures))):
        return {}, (f"{str(architectures[0])[:80]} generates no text: no KV cache is counted",)
    stacks = _decoder_stacks(layers)
    main = max(stacks, key=lambda name: len(stacks[name]), default=None)  # config.json speaks of this one
    found: dict[str, BlockCache] = {}
    unknown: list[str] = []
    notes: list[str] = []
    for name, blocks in stacks.items():
        text = text_config(config) if name == main else {}
        kept = _blocks_that_cache(blocks, text, notes)
        windows, window_notes = block_windows(text, len(blocks))
        notes += window_notes
        for block, window in zip(kept, windows, strict=False):
            cache = _cache_of(block, tensors, text, window)
            if cache is None:
                unknown.append(block.name)
            elif cache != BlockCache():
                found[block.name] = cache
    if unknown:
        some = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
        notes.append(f"the KV cache of {len(unknown)} block(s) could not be told and is not counted: {some}")
    elif not found:
        notes.append("no block was recognised as attention: no KV cache is counted")
    return found, tuple(notes)


def _blocks_that_cache(blocks: Sequence[Layer], text: Mapping[str, object], notes: list[str]) -> Sequence[Layer]:
    """Leave out blocks that predict further tokens, and the last ones where those share the cache of earlier ones."""
    stated = depth(text)
    if stated is not None and stated < len(blocks) and positive(text, ("num_nextn_predict_layers",)):
        notes.append(f"no KV cache is counted for blocks from {blocks[stated].name} on, which predict further tokens")
        return blocks[:stated]
    return blocks[: max(0, len(blocks) - (positive(text, ("num_kv_shared_layers",)) or 0))]


def _decoder_stacks(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Blocks of the stacks that generate, by stack; an encoder is one only where there is nothing else."""
    stacks: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.stack is not None and not any(map(_OTHER_STACK.fullmatch, layer.stack.split("."))):
            stacks.setdefault(layer.stack, []).append(layer)
    decoding = {name: blocks for name, blocks in stacks.items() if not _ENCODES & set(re.split(r"[._]", name))}
    return decoding or stacks


def _cache_of(
    block: Layer, tensors: Mapping[str, TensorInfo], text: Mapping[str, object], window: Window
) -> BlockCache | None:
    """Return what a block keeps (nothing for one that has neither attention nor a state), None if unknown."""
    modules = _modules(block, tensors)
    recurrent = [path for path, parts in modules.items() if _STATE_WORDS & parts.keys()]
    state = sum(
        info.params
        for path, parts in modules.items()
        for word, info in parts.items()
        if _is_depthwise(info) or _GGUF_CONVOLUTION.fullmatch(f"{path}.{word}")
    )
    for path in recurrent:
        own = _state_elements(modules[path], text)
        if own is None:
            return None
        state += own
    elements = 0
    for path, parts in modules.items():
        if path in recurrent:
            continue
        own = _token_elements(path, parts, text)
        if own is None:
            return None
        elements += own
    if elements and window.linear:  # attention without softmax and without decay parameters: a matrix per head
        return BlockCache(0, None, state + elements // 2 * (head_dim(text) or 0))
    return BlockCache(elements, window.tokens if elements else None, state)


def _modules(block: Layer, tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Group a block's tensors by the module around their projection: "self_attn" -> {"k_proj": …}."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name in block.tensors:
        path = name.removeprefix(block.name).strip(".").split(".")
        while len(path) > 1 and path[-1] in _PARAMETERS:
            path.pop()
        if "rg_lru" in path:
            path = path[: path.index("rg_lru") + 1]
        if path[-1].startswith(_SSM_PREFIX):
            path.insert(-1, "ssm")
        if path[-1] != "bias":
            modules.setdefault(".".join(path[:-1]), {}).setdefault(path[-1], tensors[name])
    if "ssm" in modules and _SSM_INPUT not in modules["ssm"]:
        modules["ssm"] |= modules.pop("", {})
    return modules


def _token_elements(path: str, parts: Mapping[str, TensorInfo], text: Mapping[str, object]) -> int | None:
    """Elements a module caches per token: 0 if it is no attention, None if it is and its width is unknown."""
    around = path.rstrip(".0123456789").rpartition(".")[2].lower()
    elements: list[int | None] = []
    words = {word.lower(): info for word, info in parts.items()}
    for word, info in words.items():
        if word in _LATENT_WORDS:
            elements.append(_rows(info) or latent_width(text))
        elif word in _FUSED_WORDS:
            elements += [key_width(text)] * 2
        elif word in _KEY_WORDS | _VALUE_WORDS and (word not in _BARE_WORDS or _ATTENTION.fullmatch(around)):
            # Where there is no projection of values, keys serve as such and are kept twice; an indexer has only keys.
            copies = 2 if word in _KEY_WORDS and around != "indexer" and not _VALUE_WORDS & words.keys() else 1
            elements += [_rows(info) or key_width(text)] * copies
    known = [count for count in elements if count is not None]
    return sum(known) if len(known) == len(elements) else None


def _rows(info: TensorInfo) -> int | None:
    return None if info.dtype in _PACKED or len(info.shape) != 2 else info.shape[0]


def _is_depthwise(info: TensorInfo) -> bool:
    return len(info.shape) == 3 and info.shape[1] == 1


def _state_elements(parts: Mapping[str, TensorInfo], text: Mapping[str, object]) -> int | None:
    """State of a recurrent module, without its convolution: channels x states per channel."""
    gate = parts.get("rg_lru")
    if gate is not None:
        return positive(text, ("lru_width",)) or hidden_size(text)
    decay = parts.get("A_log") or parts.get("ssm_a")
    if decay is None:
        return None  # RWKV: versions differ
    if len(decay.shape) > 1 and min(decay.shape[-2:]) > 1:  # Mamba: (channels, states)
        return decay.params
    output = next((info for word, info in parts.items() if word in _OUTPUT_WORDS), None)
    states = positive(text, _STATE_KEYS)
    if output is None or states is None or len(output.shape) != 2 or output.dtype in _PACKED:
        return None
    return output.shape[1] * states
