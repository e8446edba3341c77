"""The metadata of a GGUF file, as config.json would have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from gguf_builder import parse
from hypothesis import given
from hypothesis import strategies as st

from mmsplit.checkpoint.gguf_config import gguf_config
from mmsplit.checkpoint.gguf_values import Omitted, Value

FIXTURES = Path(__file__).parent / "gguf_fixtures"


def model(architecture: str, **more: Value) -> dict[str, Value]:
    """Metadata of a model of 12 blocks; "__" in a key stands for a dot."""
    own = {f"{architecture}.{key.replace('__', '.')}": value for key, value in more.items()}
    return {"general.architecture": architecture, f"{architecture}.block_count": 12, **own}


def test_file_by_the_gguf_package() -> None:
    """All that a plan uses of a Llama."""
    assert gguf_config(parse((FIXTURES / "llama_tied.gguf").read_bytes()).metadata) == {
        "architectures": ["llamaForCausalLM"],
        "dtype": "float16",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "vocab_size": 48,
    }


def test_later_files_of_several_have_none() -> None:
    """Only the first speaks of the model."""
    found = [parse((FIXTURES / f"split-0000{i}-of-00004.gguf").read_bytes()).metadata for i in (1, 2, 3, 4)]
    configs = [gguf_config(metadata) for metadata in found]
    assert configs[0] is not None
    assert configs[1:] == [None, None, None]


#: metadata -> some of the config; None: not in it.
CASES: Mapping[str, tuple[dict[str, Value], dict[str, object]]] = {
    "multi-head latent attention": (
        model(
            "deepseek2",
            attention__head_count=128,
            attention__head_count_kv=1,
            attention__key_length=576,
            attention__value_length=512,
            attention__kv_lora_rank=512,
            rope__dimension_count=64,
        ),
        {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": None, "num_key_value_heads": None},
    ),
    "rotated part without a latent": (model("llama", rope__dimension_count=64), {"qk_rope_head_dim": None}),
    "keys as wide as values": (
        model("gemma3", attention__key_length=256, attention__value_length=256),
        {"head_dim": 256},
    ),
    "width of keys alone": (model("qwen3", attention__key_length=128), {"head_dim": 128}),
    "blocks for further tokens": (
        model("glm4moe", nextn_predict_layers=1),
        {"num_hidden_layers": 11, "num_nextn_predict_layers": 1},
    ),
    "heads of each block, all alike": (
        model("jamba", attention__head_count_kv=(0, 8, 0, 8)),
        {"num_key_value_heads": 8},
    ),
    "heads of each block, different": (
        model("deci", attention__head_count_kv=(0, 8, 4, 8)),
        {"num_key_value_heads": None},
    ),
    "experts": (
        model("qwen3moe", expert_count=128, expert_used_count=8),
        {"num_experts": 128, "num_experts_per_tok": 8},
    ),
    "state": (model("mamba", ssm__state_size=16), {"ssm_state_size": 16}),
    "decoder of another depth": (
        model("t5", decoder_block_count=6),
        {"decoder_layers": 6, "architectures": ["t5ForConditionalGeneration"]},
    ),
    "vocabulary that is stated": (
        {**model("llama", vocab_size=100), "tokenizer.ggml.tokens": Omitted(90)},
        {"vocab_size": 100},
    ),
    "vocabulary that is counted": ({**model("llama"), "tokenizer.ggml.tokens": Omitted(90)}, {"vocab_size": 90}),
    "encoder": (model("bert", attention__causal=False), {"architectures": ["bert"]}),
    "embeddings of a decoder": (model("qwen3", pooling_type=3), {"architectures": ["qwen3"]}),
    "no pooling": (model("qwen3", pooling_type=0), {"architectures": ["qwen3ForCausalLM"]}),
    "T5's encoder alone": (model("t5encoder"), {"architectures": ["t5encoder"]}),
    "projector and tower": (
        {"general.architecture": "clip", "general.type": "mmproj", "clip.vision.block_count": 27},
        {"architectures": ["clip"], "num_hidden_layers": None},
    ),
    "windows by the architecture": (
        model("gemma3", attention__sliding_window=1024),
        {"sliding_window": 1024, "sliding_window_pattern": 6},
    ),
    "windows by a number": (
        model("gemma3", attention__sliding_window=1024, attention__sliding_window_pattern=3),
        {"sliding_window_pattern": 3},
    ),
    "windows block by block": (
        model("gemma4", attention__sliding_window=512, attention__sliding_window_pattern=(True, False)),
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512},
    ),
    "windows of which nothing is known": (
        model("phi3", attention__sliding_window=2047, attention__sliding_window_pattern=2),
        {"sliding_window": 2047, "sliding_window_pattern": None, "layer_types": None},
    ),
    "chunks": (model("llama4"), {"model_type": "llama4_text", "attention_chunk_size": 8192}),
    "no chunks": (model("llama4", attention__sliding_window=0), {"attention_chunk_size": None}),
    "values of other types": (
        {
            "general.architecture": "llama",
            "llama.block_count": 12,
            "llama.embedding_length": "wide",
            "llama.attention.head_count": True,
            "llama.attention.head_count_kv": Omitted(1 << 40),
            "llama.context_length": -1,
            "llama.attention.key_length": 1.5,
        },
        {
            "num_hidden_layers": 12,
            "hidden_size": None,
            "num_attention_heads": None,
            "num_key_value_heads": None,
            "max_position_embeddings": None,
            "head_dim": None,
        },
    ),
}


@pytest.mark.parametrize(("metadata", "some"), CASES.values(), ids=CASES)
def test_what_the_metadata_say(metadata: dict[str, Value], some: dict[str, object]) -> None:
    config = gguf_config(metadata)
    assert config is not None
    assert {key: config.get(key) for key in some} == some


NONE: Mapping[str, dict[str, Value]] = {
    "nothing": {},
    "no architecture": {"llama.block_count": 12},
    "architecture that is no text": {"general.architecture": 7},
    "no blocks": {"general.architecture": "flux"},
    "blocks that are no number": {"general.architecture": "llama", "llama.block_count": "many"},
    "adapter": {**model("llama"), "general.type": "adapter"},
    "type that is no text": {**model("llama"), "general.type": (1, 2)},
}


@pytest.mark.parametrize("metadata", NONE.values(), ids=NONE)
def test_metadata_that_describe_no_model(metadata: dict[str, Value]) -> None:
    assert gguf_config(metadata) is None


KEYS = sorted({key for metadata, _ in CASES.values() for key in metadata})
VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text("ab", max_size=3),
    st.lists(st.integers(-1, 3), max_size=4).map(tuple),
    st.integers(0, 2**64 - 1).map(Omitted),
)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES), st.sampled_from(["llama", "gemma3", "llama4", "clip", "t5"]))
def test_a_strangers_metadata_do_no_harm(metadata: dict[str, Value], architecture: str) -> None:
    """Any value anywhere: a config of the types it should have, or none."""
    config = gguf_config({**metadata, "general.architecture": architecture})
    if config is None:
        return
    for key, value in config.items():
        assert key in {"architectures", "dtype", "layer_types", "model_type"} or (type(value) is int and value > 0)
