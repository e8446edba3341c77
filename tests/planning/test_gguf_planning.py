"""Planning on GGUF's names, shapes and metadata alone: the KV cache, and tied weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mmsplit.checkpoint import TensorInfo
from mmsplit.checkpoint.gguf_config import gguf_config
from mmsplit.checkpoint.gguf_file import GgufFile, read_gguf_file
from mmsplit.checkpoint.gguf_values import Value
from mmsplit.layers import build_layer_map
from mmsplit.planning.kv_cache import BlockCache, block_caches
from mmsplit.planning.memory_needs import MemoryRequest, ModelFacts, ModelNeeds
from mmsplit.planning.ties import find_ties

FIXTURES = Path(__file__).parent.parent / "checkpoint" / "gguf_fixtures"
Shapes = Mapping[str, Sequence[int]]


def tensors_of(shapes: Shapes, dtype: str = "Q8_0") -> dict[str, TensorInfo]:
    """Tensors of a quantised type; how many bytes they take is not asked here."""
    return {
        name: TensorInfo(name, dtype, tuple(shape), "m.gguf", 0, 1, math.prod(shape)) for name, shape in shapes.items()
    }


def caches(shapes: Shapes, metadata: Mapping[str, Value]) -> tuple[dict[str, BlockCache], tuple[str, ...]]:
    tensors, config = tensors_of(shapes), gguf_config(metadata)
    return block_caches(build_layer_map(tensors, config).layers, tensors, config)


def model(architecture: str, blocks: int = 2, **more: Value) -> dict[str, Value]:
    """Metadata of a model; "__" in a key stands for a dot."""
    own = {f"{architecture}.{key.replace('__', '.')}": value for key, value in more.items()}
    return {"general.architecture": architecture, f"{architecture}.block_count": blocks, **own}


def read_fixture(name: str) -> GgufFile:
    file = (FIXTURES / name).read_bytes()
    return read_gguf_file(lambda start, stop: file[start:stop], len(file), name, name)


def test_quantised_llama_by_its_file_alone() -> None:
    """2 blocks x (16 keys + 16 values) x 2 bytes a token, in F16 as llama.cpp computes; the weights as they lie."""
    found = read_fixture("llama_tied.gguf")
    tensors, config = {tensor.name: tensor for tensor in found.tensors}, gguf_config(found.metadata)
    layers = build_layer_map(tensors, config).layers
    needs = ModelNeeds(ModelFacts(layers, tensors, config), MemoryRequest(context=100, batch=3))
    totals = [needs.of_layer(layer) for layer in layers]
    assert needs.kv_dtype == "F16"
    assert needs.notes == ()
    assert [total.cache_bytes for total in totals] == [0, 32 * 2 * 300, 32 * 2 * 300, 0]
    assert sum(total.weights_bytes for total in totals) == sum(tensor.size_bytes for tensor in found.tensors)


#: Parts of a block, metadata -> what it keeps; None: it could not be told.
BLOCKS: Mapping[str, tuple[Shapes, dict[str, Value], BlockCache | None]] = {
    "separate projections": (
        {"attn_q.weight": [64, 64], "attn_k.weight": [16, 64], "attn_v.weight": [16, 64], "attn_k_norm.weight": [8]},
        model("qwen3"),
        BlockCache(32),
    ),
    "biases": (
        {"attn_k.weight": [16, 64], "attn_k.bias": [16], "attn_v.weight": [16, 64], "attn_v.bias": [16]},
        model("qwen2"),
        BlockCache(32),
    ),
    "fused": (
        {"attn_qkv.weight": [96, 64]},
        model("phi3", embedding_length=64, attention__head_count=8, attention__head_count_kv=2),
        BlockCache(32),
    ),
    "fused, width of heads stated": (
        {"attn_qkv.weight": [96, 64]},
        model("x", attention__key_length=16, attention__value_length=16, attention__head_count_kv=2),
        BlockCache(64),
    ),
    "fused, keys and values differ": (
        {"attn_qkv.weight": [96, 64]},
        model("x", attention__key_length=16, attention__value_length=8, attention__head_count_kv=2),
        None,
    ),
    "fused, one head for keys": (
        {"attn_qkv.weight": [80, 64]},
        model("falcon", embedding_length=64, attention__head_count=8, attention__head_count_kv=1),
        BlockCache(16),
    ),
    "latent": (
        {"attn_kv_a_mqa.weight": [576, 64], "attn_k_b.weight": [8, 16, 32], "attn_v_b.weight": [8, 32, 16]},
        model("deepseek2", attention__kv_lora_rank=512),
        BlockCache(576),
    ),
    "latent and indexer": (
        {"attn_kv_a_mqa.weight": [576, 64], "indexer.attn_k.weight": [128, 64], "indexer.k_norm.weight": [128]},
        model("glm-dsa"),
        BlockCache(704),
    ),
    "own and cross attention": (
        {f"{part}.weight": [16, 64] for part in ("attn_k", "attn_v", "cross_attn_k", "cross_attn_v")},
        model("t5"),
        BlockCache(64),
    ),
    "Mamba": (
        {
            "ssm_in.weight": [256, 64],
            "ssm_conv1d.weight": [128, 4],
            "ssm_conv1d.bias": [128],
            "ssm_a": [128, 16],
            "ssm_out.weight": [64, 128],
        },
        model("mamba"),
        BlockCache(0, None, 128 * 20),
    ),
    "Mamba 2": (
        {"ssm_in.weight": [1, 64], "ssm_conv1d.weight": [160, 4], "ssm_a": [4, 1], "ssm_out.weight": [64, 128]},
        model("mamba2", ssm__state_size=16),
        BlockCache(0, None, 128 * 16 + 160 * 4),
    ),
    "attention and Mamba side by side": (
        {"attn_k.weight": [16, 64], "attn_v.weight": [16, 64], "ssm_in.weight": [256, 64], "ssm_a": [128, 16]},
        model("falcon-h1"),
        BlockCache(32, None, 128 * 16),
    ),
    "linear attention with projections of its own name": (
        {"attn_qkv.weight": [96, 64], "ssm_a": [4], "ssm_ba.weight": [8, 64], "ssm_out.weight": [64, 128]},
        model("qwen3next", ssm__state_size=32),
        BlockCache(0, None, 128 * 32),
    ),
    "linear attention whose state cannot be told": (
        {"attn_k.weight": [16, 64], "attn_v.weight": [16, 64], "ssm_a": [1, 4, 1, 1], "ssm_f_a.weight": [8, 64]},
        model("kimi-linear"),
        None,
    ),
    "short convolution": (
        {"shortconv.conv.weight": [64, 3], "shortconv.in_proj.weight": [192, 64]},
        model("lfm2"),
        BlockCache(0, None, 192),
    ),
    "RWKV": (
        {"time_mix_key.weight": [64, 64], "time_mix_value.weight": [64, 64], "time_mix_receptance.weight": [64, 64]},
        model("rwkv7"),
        None,
    ),
    "nothing": ({"ffn_up.weight": [64, 64]}, model("nemotron_h"), BlockCache()),
    # Shapes nobody writes: what is no matrix goes by the metadata, or is said to be unknown.
    "vectors": ({"attn_k.weight": [16], "attn_v.weight": []}, model("llama"), None),
    "four dimensions": ({"attn_k.weight": [1, 1, 16, 64], "attn_v.weight": [1, 1, 16, 64]}, model("llama"), None),
    "empty": ({"attn_k.weight": [0, 64], "attn_v.weight": [0, 64]}, model("llama"), None),
    "huge": (
        {"attn_k.weight": [2**62, 1], "attn_v.weight": [2**62, 1]},
        model("llama"),
        BlockCache(2**63),
    ),
    "state of no size": ({"ssm_in.weight": [1, 1], "ssm_a": [0, 0]}, model("mamba"), None),
    "state that is a number": ({"ssm_in.weight": [1, 1], "ssm_a": []}, model("mamba"), None),
}


@pytest.mark.parametrize(("parts", "metadata", "cache"), BLOCKS.values(), ids=BLOCKS)
def test_what_a_block_keeps(parts: Shapes, metadata: dict[str, Value], cache: BlockCache | None) -> None:
    """Rows of quantised matrices count as those of any; what cannot be told is a note and not a zero."""
    shapes = {f"blk.{i}.{name}": shape for i in range(2) for name, shape in parts.items()}
    found, notes = caches(shapes, metadata)
    expected = {} if cache in (None, BlockCache()) else {"blk.0": cache, "blk.1": cache}
    assert found == expected
    assert any("could not be told" in note for note in notes) == (cache is None)


def test_adapters_of_quantised_weights() -> None:
    """LoRA: 16 bytes x rank x (out + in), for each expert; none for what is packed into integers, none for a norm."""
    shapes = {
        "blk.0.attn_q.weight": [64, 32],
        "blk.0.ffn_up_exps.weight": [4, 48, 32],
        "blk.0.attn_norm.weight": [32],
        "blk.1.attn_q.weight": [64, 32],
    }
    tensors = tensors_of(shapes, "Q4_K")
    layers = build_layer_map(tensors).layers
    needs = ModelNeeds(ModelFacts(layers, tensors, None), MemoryRequest(training="lora", lora_rank=8))
    assert [needs.of_layer(layer).training_bytes for layer in layers] == [
        16 * 8 * (64 + 32 + 4 * (48 + 32)),
        16 * 8 * (64 + 32),
    ]


def attention(stack: str, blocks: int) -> dict[str, list[int]]:
    return {f"{stack}.{i}.attn_{part}.weight": [16, 64] for i in range(blocks) for part in "qkv"}


def test_windows_are_those_of_the_architecture() -> None:
    """Gemma 3: five blocks of six look back over 1,024 tokens."""
    found, _ = caches(attention("blk", 12), model("gemma3", 12, attention__sliding_window=1024))
    windows = [found[f"blk.{i}"].window_tokens for i in range(12)]
    assert windows == [None if i in (5, 11) else 1024 for i in range(12)]
    found, _ = caches(
        attention("blk", 3),
        model("gemma4", 3, attention__sliding_window=8, attention__sliding_window_pattern=(True, False, True)),
    )
    assert [found[f"blk.{i}"].window_tokens for i in range(3)] == [8, None, 8]


def test_windows_of_unknown_blocks_are_a_note() -> None:
    """Too much is the safe side."""
    found, notes = caches(attention("blk", 2), model("phi3", attention__sliding_window=2047))
    assert [cache.window_tokens for cache in found.values()] == [None, None]
    assert any("not for which blocks" in note for note in notes)


def test_only_what_generates_keeps_something() -> None:
    """Not T5's encoder, not the towers beside a language model, not the blocks for further tokens, no BERT."""
    found, _ = caches(attention("enc.blk", 3) | attention("dec.blk", 2), model("t5", 3, decoder_block_count=2))
    assert set(found) == {"dec.blk.0", "dec.blk.1"}
    towers = attention("v.blk", 4) | attention("a.blk", 4)
    found, _ = caches(attention("blk", 2) | towers, model("gemma3", 2))
    assert set(found) == {"blk.0", "blk.1"}
    found, notes = caches(attention("blk", 3), model("glm4moe", 3, nextn_predict_layers=1))
    assert set(found) == {"blk.0", "blk.1"}
    assert any("predict further tokens" in note for note in notes)
    for metadata in (model("bert", attention__causal=False), {"general.architecture": "clip"}):
        found, notes = caches(attention("blk", 2), metadata)
        assert found == {}
        assert "generates no text" in notes[0]


LLAMA = ["token_embd.weight", "output_norm.weight", "rope_freqs.weight", *attention("blk", 2)]
T5 = ["token_embd.weight", "enc.output_norm.weight", "dec.output_norm.weight"]
T5 += [*attention("enc.blk", 2), *attention("dec.blk", 2)]
DECODER_TIE = ("dec.token_embd.weight", "dec.token_embd", "dec.blk.0")
HEAD_TIE = ("output.weight", "output", None)

#: Names, metadata -> (alias, layer, the layer it runs before) of each tie.
TIES: Mapping[str, tuple[list[str], dict[str, Value], list[tuple[str, str, str | None]]]] = {
    "no head": (LLAMA, model("llama"), [HEAD_TIE]),
    "no head, no metadata": (LLAMA, {}, [HEAD_TIE]),
    "head": ([*LLAMA, "output.weight"], model("llama"), []),
    "head and its bias": ([*LLAMA, "output.weight", "output.bias"], model("phi2"), []),
    "bias of a head alone": ([*LLAMA, "output.bias"], model("phi2"), [("output.weight", "output.weight", None)]),
    "norm of the output is no head": (["token_embd.weight", *attention("blk", 2)], model("lfm2"), [HEAD_TIE]),
    "T5": (T5, model("t5"), [DECODER_TIE, HEAD_TIE]),
    "T5 with a head": ([*T5, "output.weight"], model("t5"), [DECODER_TIE]),
    "T5's encoder": ([name for name in T5 if not name.startswith("dec.")], model("t5encoder"), []),
    "embeddings for search": (LLAMA, model("qwen3", pooling_type=3), []),
    "BERT": (LLAMA, model("bert", attention__causal=False), []),
    "tower": (["v.token_embd.weight", *attention("v.blk", 2)], {"general.architecture": "clip"}, []),
    "no embedding": (list(attention("blk", 2)), model("llama"), []),
}


@pytest.mark.parametrize(("names", "metadata", "ties"), TIES.values(), ids=TIES)
def test_a_head_that_is_not_stored_is_tied(
    names: list[str], metadata: dict[str, Value], ties: list[tuple[str, str, str | None]]
) -> None:
    """GGUF says it by leaving the head out; the aliases are GGUF's names."""
    config = gguf_config(metadata)
    layer_map = build_layer_map(names, config)
    found, notes = find_ties(layer_map, config)
    layers = [*(layer.name for layer in layer_map.layers), None]
    assert [(tie.alias, tie.layer.name, layers[tie.position]) for tie in found] == ties
    assert {tie.tensor for tie in found} <= {"token_embd.weight"}
    assert notes == ()


def test_fixture_has_a_tied_head() -> None:
    """As the gguf package wrote it."""
    found = read_fixture("llama_tied.gguf")
    config = gguf_config(found.metadata)
    layer_map = build_layer_map([tensor.name for tensor in found.tensors], config)
    (tie,), _ = find_ties(layer_map, config)
    assert (tie.alias, tie.tensor, tie.layer.layer_type) == ("output.weight", "token_embd.weight", "head")
