"""What a model needs of a node's memory, against figures known from elsewhere and worked out by hand."""

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mmsplit.checkpoint import TensorInfo
from mmsplit.dtypes import DTYPES
from mmsplit.errors import PlanError
from mmsplit.layers import Layer, build_layer_map
from mmsplit.planning.kv_cache import BlockCache, block_caches
from mmsplit.planning.memory_needs import MemoryRequest, ModelFacts, ModelNeeds, Needs

GIB = 1 << 30
Shapes = Mapping[str, Sequence[int]]


def tensors_of(shapes: Shapes, dtype: str = "BF16") -> dict[str, TensorInfo]:
    found = {}
    for name, shape in shapes.items():
        params = math.prod(shape)
        size = params * DTYPES[dtype].bits // 8
        found[name] = TensorInfo(name, dtype, tuple(shape), "model.safetensors", 0, size, params)
    return found


def facts_of(tensors: Mapping[str, TensorInfo], config: Mapping[str, object] | None) -> ModelFacts:
    return ModelFacts(build_layer_map(tensors, config).layers, tensors, config)


def cache_bytes(facts: ModelFacts, **request: object) -> int:
    """Bytes of KV cache of the whole model."""
    needs = ModelNeeds(facts, MemoryRequest(**request))  # type: ignore[arg-type]
    return sum(needs.of_layer(layer).cache_bytes for layer in facts.layers)


def attention(blocks: int, kv_rows: int, hidden: int = 64) -> dict[str, list[int]]:
    """Separate projections, as most models have them."""
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [100, hidden]}
    for i in range(blocks):
        for part, rows in (("q", hidden), ("k", kv_rows), ("v", kv_rows)):
            shapes[f"model.layers.{i}.self_attn.{part}_proj.weight"] = [rows, hidden]
    return shapes


def test_llama_3_1_8b_at_8192_tokens_is_1_gib() -> None:
    """2 x 32 layers x 8 heads x 128 x 8,192 tokens x 2 bytes, and so 8 times as much for 8 sequences."""
    config = {"model_type": "llama", "num_hidden_layers": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    facts = facts_of(tensors_of(attention(32, 8 * 128, 4096)), config)
    assert cache_bytes(facts, context=8192) == 2 * 32 * 8 * 128 * 8192 * 2 == GIB
    assert cache_bytes(facts, context=8192, batch=8) == 8 * GIB
    assert cache_bytes(facts, context=8192, kv_dtype="F8_E4M3") == GIB // 2
    assert cache_bytes(facts) == 0


def test_llama_3_1_70b_at_131072_tokens_is_40_gib() -> None:
    """80 layers of the same heads: 320 KiB per token."""
    facts = facts_of(tensors_of(attention(80, 8 * 128, 8192)), {"num_hidden_layers": 80})
    assert cache_bytes(facts, context=1) == 320 * 1024
    assert cache_bytes(facts, context=131_072) == 40 * GIB


def deepseek_v3() -> dict[str, list[int]]:
    shapes = {"model.embed_tokens.weight": [129280, 7168]}
    for i in range(62):
        prefix = f"model.layers.{i}.self_attn"
        shapes |= {
            f"{prefix}.q_a_proj.weight": [1536, 7168],
            f"{prefix}.kv_a_proj_with_mqa.weight": [576, 7168],
            f"{prefix}.kv_b_proj.weight": [32768, 512],
            f"{prefix}.kv_b_proj.weight_scale_inv": [256, 4],
        }
    return shapes


def test_deepseek_v3_caches_70272_bytes_per_token() -> None:
    """61 x (512 + 64) x 2 bytes: the latent, not the heads; and nothing for the block that predicts a second token."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "torch_dtype": "bfloat16",
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
    }
    facts = facts_of(tensors_of(deepseek_v3(), "F8_E4M3"), config)
    assert cache_bytes(facts, context=1) == 61 * (512 + 64) * 2 == 70_272
    assert "model.layers.61" in ModelNeeds(facts, MemoryRequest(context=1)).notes[0]
    packed = facts_of(tensors_of(deepseek_v3(), "I32"), config)
    assert cache_bytes(packed, context=1) == 70_272


def test_mistral_keeps_its_window_only() -> None:
    """Mistral-7B-v0.1: 128 KiB per token, up to 4,096 of them; v0.3 has no window."""
    shapes = tensors_of(attention(32, 8 * 128, 4096))
    first = facts_of(shapes, {"model_type": "mistral", "sliding_window": 4096})
    assert cache_bytes(first, context=1000) == 1000 * 128 * 1024
    assert cache_bytes(first, context=32_768) == 4096 * 128 * 1024 == GIB // 2
    third = facts_of(shapes, {"model_type": "mistral", "sliding_window": None})
    assert cache_bytes(third, context=32_768) == 4 * GIB


GEMMA_2 = {"model_type": "gemma2", "sliding_window": 4096}
#: As google/gemma-3-4b-it has it: no heads, no pattern.
GEMMA_3 = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "sliding_window": 1024}}
TYPES = {"sliding_window": 1024, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5}


@pytest.mark.parametrize(
    ("config", "blocks", "full"),
    [
        (GEMMA_2, 26, range(1, 26, 2)),
        (GEMMA_3, 34, range(5, 34, 6)),
        ({**GEMMA_3["text_config"], "sliding_window_pattern": 3}, 9, range(2, 9, 3)),  # type: ignore[dict-item]
        (TYPES, 30, range(5, 30, 6)),
        ({"model_type": "cohere2", "sliding_window": 4096}, 8, (3, 7)),
        ({"model_type": "gpt_oss", "sliding_window": 128}, 6, (1, 3, 5)),
        ({"model_type": "exaone4", "sliding_window": 9, "sliding_window_pattern": "LLLG"}, 8, (3, 7)),
        ({"model_type": "llama4_text", "attention_chunk_size": 8192}, 8, (3, 7)),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": False}, 4, range(4)),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}, 4, (0, 1)),
    ],
)
def test_windows_that_alternate(config: dict[str, object], blocks: int, full: Sequence[int]) -> None:
    """By `layer_types`, or by what each family leaves to its configuration class; all others slide."""
    tensors = tensors_of(attention(blocks, 16))
    caches, notes = block_caches(build_layer_map(tensors, config).layers, tensors, config)
    assert notes == ()
    assert [i for i in range(blocks) if caches[f"model.layers.{i}"].window_tokens is None] == list(full)
    assert all(cache.token_elements == 32 for cache in caches.values())


def test_gemma_3_4b_at_32768_tokens() -> None:
    """34 blocks, 4 key heads of 256: 5 look at everything, 29 at 1,024 tokens."""
    facts = facts_of(tensors_of(attention(34, 4 * 256, 2560)), GEMMA_3)
    assert cache_bytes(facts, context=32_768) == 2 * 1024 * 2 * (5 * 32_768 + 29 * 1024)


def test_a_window_for_unknown_blocks_is_a_note() -> None:
    """All blocks are counted over the whole context then, which is the safe side."""
    tensors = tensors_of(attention(2, 16))
    config = {"model_type": "novel", "sliding_window": 8}
    caches, notes = block_caches(build_layer_map(tensors, config).layers, tensors, config)
    assert {cache.window_tokens for cache in caches.values()} == {None}
    assert "not for which blocks" in notes[0]


def one_block(shapes: Shapes, config: Mapping[str, object] | None, dtype: str = "BF16") -> BlockCache | None:
    """What `model.layers.0` caches in a model of two such blocks; None where it could not be told."""
    full = {f"model.layers.{i}.{name}": shape for name, shape in shapes.items() for i in range(2)}
    tensors = tensors_of(full, dtype)
    caches, notes = block_caches(build_layer_map(tensors, config).layers, tensors, config)
    if any("could not be told" in note for note in notes):
        return None
    return caches.get("model.layers.0", BlockCache())


FUSED = {"self_attn.query_key_value.weight": [192, 64], "self_attn.dense.weight": [64, 64]}
FALCON = {"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 8}


@pytest.mark.parametrize(
    ("config", "elements"),
    [
        ({"hidden_size": 64, "num_attention_heads": 8}, 128),
        ({"n_embd": 64, "n_head": 8, "num_key_value_heads": 2}, 32),
        ({"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 10}, 40),
        ({"d_model": 64, "n_heads": 8, "attn_config": {"kv_n_heads": 4}}, 64),
        (FALCON | {"multi_query": True, "num_kv_heads": 8}, 16),
        (FALCON | {"multi_query": True, "num_kv_heads": 4, "new_decoder_architecture": True}, 64),
        (FALCON | {"multi_query": False, "num_kv_heads": 1}, 128),
        ({"hidden_size": 64, "kv_channels": 8, "multi_query_attention": True, "multi_query_group_num": 2}, 32),
        ({"text_config": {"hidden_size": 64, "num_attention_heads": 8}}, 128),
        ({"hidden_size": "64", "num_attention_heads": True}, None),
        ({}, None),
        (None, None),
    ],
)
def test_fused_projections_go_by_the_config(config: Mapping[str, object] | None, elements: int | None) -> None:
    """Under the several spellings; where it does not say enough, that is a note and not a zero."""
    assert one_block(FUSED, config) == (None if elements is None else BlockCache(elements))


def test_packed_projections_go_by_the_config() -> None:
    """GPTQ: the shape of `qweight` is not that of the matrix."""
    shapes = {f"self_attn.{p}_proj.{n}": [8, 16] for p in "qkv" for n in ("qweight", "qzeros", "scales")}
    assert one_block(shapes, {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}, "I32") == (
        BlockCache(32)
    )
    assert one_block(shapes, None, "I32") is None


@pytest.mark.parametrize(
    ("shapes", "config", "cache"),
    [
        # Mamba: A_log has a state per channel, the convolution its last inputs.
        ({"mixer.A_log": [128, 16], "mixer.conv1d.weight": [128, 1, 4]}, {}, BlockCache(0, None, 128 * 20)),
        # Mamba-2: channels by the output projection, states by the config.
        (
            {"mamba.A_log": [4], "mamba.out_proj.weight": [64, 128], "mamba.conv1d.weight": [160, 1, 4]},
            {"mamba_d_state": 16},
            BlockCache(0, None, 128 * 16 + 160 * 4),
        ),
        # Gated delta net (Qwen3-Next): a matrix of keys x values per head.
        (
            {"linear_attn.A_log": [4], "linear_attn.out_proj.weight": [64, 128], "linear_attn.k_proj.weight": [32, 64]},
            {"linear_key_head_dim": 32},
            BlockCache(0, None, 128 * 32),
        ),
        # Attention and Mamba side by side in each block (Falcon-H1).
        (
            {"self_attn.k_proj.weight": [16, 64], "self_attn.v_proj.weight": [16, 64], "mamba.A_log": [128, 16]},
            {},
            BlockCache(32, None, 128 * 16),
        ),
        # RecurrentGemma.
        ({"temporal_block.rg_lru.recurrent_param": [96]}, {"lru_width": 96}, BlockCache(0, None, 96)),
        # Lightning attention, by the config only.
        (
            {"self_attn.qkv_proj.weight": [192, 64]},
            {"attn_type_list": [0, 1], "hidden_size": 64, "num_attention_heads": 8},
            BlockCache(0, None, 8 * 8 * 8),
        ),
        # Latent attention with an indexer (DeepSeek-V3.2).
        (
            {"self_attn.kv_a_proj_with_mqa.weight": [576, 64], "self_attn.indexer.wk.weight": [128, 64]},
            {},
            BlockCache(704),
        ),
        # Keys that serve as values are kept twice.
        ({"self_attn.k_proj.weight": [16, 64]}, {}, BlockCache(32)),
        # No attention, whatever the name.
        ({"mlp.key.weight": [16, 64], "mlp.value.weight": [16, 64]}, {}, BlockCache()),
        # RWKV keeps something, but what depends on its version.
        ({"attention.key.weight": [16, 64], "attention.receptance.weight": [16, 64]}, {}, None),
    ],
)
def test_blocks_of_other_kinds(shapes: Shapes, config: dict[str, object], cache: BlockCache | None) -> None:
    """States are counted once per sequence, and what cannot be told is said."""
    assert one_block(shapes, config) == cache


def test_states_are_in_f32_and_do_not_grow_with_the_context() -> None:
    """4 bytes an element for each sequence of the batch."""
    assert BlockCache(0, None, 100).size_bytes(10, 3, 16) == BlockCache(0, None, 100).size_bytes(10**6, 3, 16) == 1200
    assert BlockCache(3, 4, 0).size_bytes(2, 1, 4) == 3


def test_only_what_generates_has_a_cache() -> None:
    """No vision tower, no encoder beside a decoder, no embedding model; a decoder under an encoder's name does."""
    tower = {f"vision_tower.encoder.layers.{i}.self_attn.{p}_proj.weight": [8, 8] for i in range(2) for p in "kv"}
    shapes = tensors_of(attention(2, 16) | tower)
    caches, _ = block_caches(build_layer_map(shapes).layers, shapes, None)
    assert sorted(caches) == ["model.layers.0", "model.layers.1"]
    t5 = {}
    for i in range(2):
        for part in ("encoder.block.{}.layer.0.SelfAttention", "decoder.block.{}.layer.0.SelfAttention"):
            t5 |= {f"{part.format(i)}.{p}.weight": [24, 16] for p in "qkvo"}
        t5 |= {f"decoder.block.{i}.layer.1.EncDecAttention.{p}.weight": [24, 16] for p in "qkvo"}
    shapes = tensors_of(t5)
    caches, _ = block_caches(build_layer_map(shapes).layers, shapes, {"architectures": ["T5ForConditionalGeneration"]})
    assert caches == {f"decoder.block.{i}": BlockCache(4 * 24) for i in range(2)}
    bert = {f"encoder.layer.{i}.attention.self.{p}.weight": [8, 8] for i in range(2) for p in ("key", "value")}
    shapes = tensors_of(bert)
    layers = build_layer_map(shapes).layers
    assert block_caches(layers, shapes, {"architectures": ["BertLMHeadModel"]})[0] == {
        f"encoder.layer.{i}": BlockCache(16) for i in range(2)
    }
    caches, notes = block_caches(layers, shapes, {"architectures": ["BertModel"]})
    assert (caches, notes) == ({}, ("BertModel generates no text: no KV cache is counted",))


def test_a_checkpoint_without_attention_says_so() -> None:
    """A zero that was not asked for would look like an answer."""
    shapes = tensors_of({f"blocks.{i}.conv.weight": [4, 4, 3, 3] for i in range(2)})
    assert block_caches(build_layer_map(shapes).layers, shapes, None) == (
        {},
        ("no block was recognised as attention: no KV cache is counted",),
    )


def test_shared_caches_are_counted_once() -> None:
    """Gemma-3n: the last blocks use the cache of earlier ones."""
    shapes = tensors_of(attention(4, 16))
    config = {"num_kv_shared_layers": 2}
    assert sorted(block_caches(build_layer_map(shapes).layers, shapes, config)[0]) == [
        "model.layers.0",
        "model.layers.1",
    ]


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": [None, 3], "layer_types": [{}, 7], "sliding_window": "8"},
        {"text_config": {"text_config": {"text_config": {"text_config": {"text_config": {}}}}}, "torch_dtype": 5},
        {"sliding_window": -4, "num_hidden_layers": -1, "num_kv_shared_layers": 99, "num_nextn_predict_layers": 1},
        {"sliding_window": 8, "sliding_window_pattern": 0, "use_sliding_window": "no", "max_window_layers": "2"},
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": None, "num_attention_heads": 0},
        {"attn_config": [], "attn_type_list": "01", "head_dim": 1.5, "hidden_size": 10**30},
    ],
)
def test_a_strangers_config_does_no_harm(config: dict[str, object]) -> None:
    """Values of wrong types count as absent."""
    facts = facts_of(tensors_of(attention(2, 16)), config)
    assert cache_bytes(facts, context=10) >= 0


# ------------------------------------------------------------------------------------------------- training


MODEL: dict[str, list[int]] = {
    "model.embed_tokens.weight": [100, 8],
    "model.layers.0.self_attn.q_proj.weight": [8, 8],
    "model.layers.0.mlp.experts.gate_up_proj": [4, 8, 6],
    "model.layers.0.input_layernorm.weight": [8],
    "model.layers.1.self_attn.q_proj.weight": [8, 8],
}


@pytest.mark.parametrize(
    ("dtype", "method", "per_param"),
    [("BF16", "adamw", 14), ("F16", "adamw", 14), ("F32", "adamw", 12), ("BF16", "sgd", 10), ("F32", "sgd", 8)],
)
def test_training_state_per_parameter(dtype: str, method: str, per_param: int) -> None:
    """AdamW comes to 16 bytes with the weight, as ZeRO counts them; no KV cache."""
    facts = facts_of(tensors_of(MODEL, dtype), {})
    needs = ModelNeeds(facts, MemoryRequest(training=method, context=10))  # type: ignore[arg-type]
    width = DTYPES[dtype].bits // 8
    assert needs.of_layer(facts.layers[0]) == Needs(800 * width, 0, 800 * per_param, 0)
    assert needs.of_copy(facts.tensors["model.embed_tokens.weight"]) == Needs(800 * width, 0, 800 * per_param, 0)


def test_lora_trains_adapters_of_linear_modules_in_blocks() -> None:
    """16 bytes for each of rank x (out + in), packed experts one by one; no embedding, no norm."""
    facts = facts_of(tensors_of(MODEL), {})
    needs = ModelNeeds(facts, MemoryRequest(training="lora", lora_rank=4))
    found = {layer.name: needs.of_layer(layer).training_bytes for layer in facts.layers}
    assert found["model.embed_tokens"] == 0
    assert found["model.layers.0"] == 16 * 4 * ((8 + 8) + 4 * (8 + 6))
    assert found["model.layers.1"] == 16 * 4 * (8 + 8)


def test_training_keeps_the_input_of_each_block() -> None:
    """batch x context x hidden size in the model's dtype; not where config.json has no hidden size."""
    facts = facts_of(tensors_of(MODEL), {"hidden_size": 8})
    needs = ModelNeeds(facts, MemoryRequest(training="lora", context=100, batch=3))
    assert [needs.of_layer(layer).activation_bytes for layer in facts.layers] == [0, 4800, 4800]
    assert any("activations" in note for note in needs.notes)


def test_quantised_weights_are_not_trained_in_full() -> None:
    """An error where they are most of it, naming one; a note where they are masks and counters."""
    facts = facts_of(tensors_of(MODEL, "F8_E4M3"), {})
    with pytest.raises(PlanError, match=r"adamw trains floats of 16 bits.*found F8_E4M3.*lora") as caught:
        ModelNeeds(facts, MemoryRequest(training="adamw"))
    assert caught.value.tensor == "model.embed_tokens.weight"
    assert ModelNeeds(facts, MemoryRequest(training="lora")).of_layer(facts.layers[1]).training_bytes > 0
    mixed = tensors_of(MODEL) | tensors_of({"model.layers.0.attn.bias": [1, 1, 4, 4]}, "U8")
    notes = ModelNeeds(facts_of(mixed, {}), MemoryRequest(training="sgd")).notes
    assert any("1 tensor(s) of other dtypes" in note for note in notes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("context", 0),
        ("context", True),
        ("context", 10**10),
        ("batch", 0),
        ("batch", 1.5),
        ("lora_rank", -1),
        ("kv_dtype", "bf16"),
        ("training", "adam"),
    ],
)
def test_impossible_requests(field: str, value: object) -> None:
    """The error names the field, what is expected and what was found."""
    with pytest.raises(PlanError) as caught:
        MemoryRequest(**{field: value})  # type: ignore[arg-type]
    assert field.partition("_")[0] in str(caught.value)
    assert str(value) in str(caught.value.found)


def test_kv_dtype_by_default_is_the_one_the_model_computes_in() -> None:
    """That of the weights; of config.json where they are quantised; BF16 where nothing says."""
    for dtype, config, expected in (
        ("F16", {"torch_dtype": "bfloat16"}, "F16"),
        ("F8_E4M3", {"torch_dtype": "float16"}, "F16"),
        ("I32", {"text_config": {"dtype": "torch.float32"}}, "F32"),
        ("I32", {"torch_dtype": "int8"}, "BF16"),
        ("I32", None, "BF16"),
    ):
        assert ModelNeeds(facts_of(tensors_of(MODEL, dtype), config), MemoryRequest()).kv_dtype == expected


# ------------------------------------------------------------------------------------------- real architectures


def corpus_layers() -> dict[str, tuple[tuple[Layer, ...], dict[str, object]]]:
    """Layers and config of the fixture's generating architectures; it has names without shapes."""
    fixture = Path(__file__).parent.parent / "layers" / "data" / "corpus.json.gz"
    found = {}
    for entry in json.loads(gzip.decompress(fixture.read_bytes())):
        names, before = [], ""
        for item in entry["names"]:
            shared, _, rest = item.partition(" ")
            before = before[: int(shared)] + rest
            names.append(before)
        if "CausalLM" in entry["name"] or "LMHead" in entry["name"]:
            found[entry["name"]] = (build_layer_map(names).layers, entry["config"])
    return found


def test_attention_is_recognised_in_every_causal_model_of_the_corpus() -> None:
    """By names alone, each has blocks that cache or blocks that say they could not be told."""
    silent = []
    corpus = corpus_layers()
    for name, (layers, config) in corpus.items():
        tensors = tensors_of({tensor: [2, 2] for layer in layers for tensor in layer.tensors})
        caches, notes = block_caches(layers, tensors, config)
        if not caches and not any("could not be told" in note for note in notes):
            silent.append(name)
    assert len(corpus) > 50
    assert silent == []
