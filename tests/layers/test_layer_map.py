"""Which layers come of which names: one table per question."""

import pytest

from mmsplit.layers import Layer, build_layer_map


def names_of(names: list[str]) -> list[str]:
    """The layers of these tensors in forward order; every tensor gets a sibling, as real modules have."""
    return [layer.name for layer in build_layer_map(names).layers]


def stack(path: str, indices: list[int], *parts: str) -> list[str]:
    """The tensor names of a stack, by default of blocks with attention and an MLP."""
    return [f"{path}.{i}.{part}" for i in indices for part in parts or ("self_attn.q_proj.weight", "mlp.up.weight")]


FORWARD_ORDER = {
    "decoder only": (
        [
            "lm_head.weight",
            "model.norm.weight",
            "model.embed_tokens.weight",
            *stack("model.layers", [10, 2, 0]),
        ],
        [
            "model.embed_tokens",
            "model.layers.0",
            "model.layers.2",
            "model.layers.10",
            "model.norm",
            "lm_head",
        ],
    ),
    "gpt2": (
        ["wte.weight", "wpe.weight", "ln_f.weight", *stack("h", [1, 0])],
        ["wpe", "wte", "h.0", "h.1", "ln_f"],
    ),
    "encoder and decoder": (
        [
            "shared.weight",
            "decoder.final_layer_norm.weight",
            "encoder.final_layer_norm.weight",
            *stack("decoder.block", [0], "layer.0.SelfAttention.q.weight", "layer.1.EncDecAttention.q.weight"),
            *stack("encoder.block", [0], "layer.0.SelfAttention.q.weight", "layer.1.DenseReluDense.wi.weight"),
        ],
        [
            "shared",
            "encoder.block.0",
            "encoder.final_layer_norm",
            "decoder.block.0",
            "decoder.final_layer_norm",
        ],
    ),
    "bert": (
        [
            "cls.predictions.bias",
            "bert.pooler.dense.weight",
            "bert.embeddings.word_embeddings.weight",
            *stack("bert.encoder.layer", [0], "attention.self.query.weight", "output.dense.weight"),
        ],
        ["bert.embeddings", "bert.encoder.layer.0", "bert.pooler", "cls"],
    ),
    "vision beside language": (
        [
            "lm_head.weight",
            "model.language_model.embed_tokens.weight",
            "model.language_model.norm.weight",
            *stack("model.language_model.layers", [0]),
            "model.visual.merger.mlp.0.weight",
            "model.visual.merger.mlp.2.weight",
            "model.visual.patch_embed.proj.weight",
            *stack("model.visual.blocks", [0]),
        ],
        [
            "model.visual.patch_embed",
            "model.visual.blocks.0",
            "model.visual.merger",
            "model.language_model.embed_tokens",
            "model.language_model.layers.0",
            "model.language_model.norm",
            "lm_head",
        ],
    ),
    "projector between tower and language model": (
        [
            "language_model.lm_head.weight",
            *stack("language_model.model.layers", [0]),
            "multi_modal_projector.linear_1.weight",
            "multi_modal_projector.linear_2.weight",
            *stack("vision_tower.vision_model.encoder.layers", [0]),
        ],
        [
            "vision_tower.vision_model.encoder.layers.0",
            "multi_modal_projector",
            "language_model.model.layers.0",
            "language_model.lm_head",
        ],
    ),
    "tower inside the language model's module": (
        [
            "model.mm_projector.0.weight",
            *stack("model.layers", [0]),
            *stack("model.vision_tower.encoder.layers", [0]),
        ],
        ["model.vision_tower.encoder.layers.0", "model.mm_projector", "model.layers.0"],
    ),
    "original llama": (
        [
            "output.weight",
            "norm.weight",
            "tok_embeddings.weight",
            *stack("layers", [0], "attention.wq.weight"),
        ],
        ["tok_embeddings", "layers.0", "norm", "output"],
    ),
    "gguf": (
        ["output.weight", "output_norm.weight", "token_embd.weight", *stack("blk", [10, 9], "attn_q.weight")],
        ["token_embd", "blk.9", "blk.10", "output_norm", "output"],
    ),
    "lora": (
        [
            "base_model.model.lm_head.lora_B.weight",
            "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight",
        ],
        ["base_model.model.model.layers.3", "base_model.model.lm_head"],
    ),
    "multi-token prediction numbered on": (
        [
            *stack("model.layers", [0, 1]),
            "model.layers.2.eh_proj.weight",
            "model.layers.2.embed_tokens.weight",
            "model.norm.weight",
            "lm_head.weight",
        ],
        ["model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head"],
    ),
    "multi-token prediction as a module": (
        [
            *stack("model.layers", [0]),
            *stack("mtp.layers", [0]),
            "mtp.fc.weight",
            "mtp.norm.weight",
            "model.norm.weight",
            "lm_head.weight",
        ],
        ["model.layers.0", "model.norm", "mtp.fc", "mtp.layers.0", "mtp.norm", "lm_head"],
    ),
    "diffusion transformer": (
        [
            "proj_out.weight",
            "norm_out.linear.weight",
            "x_embedder.weight",
            *stack("single_transformer_blocks", [0]),
            *stack("transformer_blocks", [0]),
        ],
        ["x_embedder", "transformer_blocks.0", "single_transformer_blocks.0", "norm_out", "proj_out"],
    ),
    "u-net": (
        [
            "conv_in.weight",
            "conv_out.weight",
            *stack("down_blocks.0.resnets", [0, 1], "conv1.weight", "norm1.weight"),
            *stack("down_blocks.0.attentions", [0, 1], "norm.weight", "transformer_blocks.0.attn1.to_q.weight"),
            "down_blocks.0.downsamplers.0.conv.weight",
            *stack("mid_block.resnets", [0], "conv1.weight", "norm1.weight"),
            *stack("up_blocks.0.resnets", [0], "conv1.weight", "norm1.weight"),
            *stack("up_blocks.1.resnets", [0], "conv1.weight", "norm1.weight"),
            *stack("up_blocks.1.attentions", [0], "norm.weight", "transformer_blocks.0.attn1.to_q.weight"),
        ],
        [
            "conv_in",
            "down_blocks.0.resnets.0",
            "down_blocks.0.attentions.0.norm",
            "down_blocks.0.attentions.0.transformer_blocks.0",
            "down_blocks.0.resnets.1",
            "down_blocks.0.attentions.1.norm",
            "down_blocks.0.attentions.1.transformer_blocks.0",
            "down_blocks.0.downsamplers",
            "mid_block.resnets.0",
            "up_blocks.0.resnets.0",
            "up_blocks.1",
            "conv_out",
        ],
    ),
    "decoder that runs from the last index": (
        stack("decoder.up", [0, 1], "block.0.conv1.weight", "block.0.norm1.weight"),
        ["decoder.up.1.block.0", "decoder.up.0.block.0"],
    ),
    "stages that take turns with embeddings": (
        [
            *stack("encoder.patch_embeddings", [0, 1], "proj.weight", "layer_norm.weight"),
            *stack("encoder.block", [0, 1], "0.attention.q.weight", "0.mlp.fc1.weight"),
            *stack("encoder.layer_norm", [0, 1], "weight"),
        ],
        [
            "encoder.patch_embeddings.0",
            "encoder.block.0.0",
            "encoder.layer_norm.0",
            "encoder.patch_embeddings.1",
            "encoder.block.1.0",
            "encoder.layer_norm.1",
        ],
    ),
}


@pytest.mark.parametrize(("names", "expected"), FORWARD_ORDER.values(), ids=FORWARD_ORDER)
def test_layers_stand_in_forward_order(names: list[str], expected: list[str]) -> None:
    """What runs first comes first, however the header is sorted."""
    assert names_of(names) == expected
    assert names_of(sorted(names)) == expected


ONE_LAYER = {
    "experts inside a layer": [
        "model.layers.3.mlp.experts.0.up.weight",
        "model.layers.3.mlp.experts.17.up.weight",
        "model.layers.3.mlp.shared_experts.up.weight",
    ],
    "experts with underscores": [
        "encoder.layers.1.ffn.experts.expert_0.w.weight",
        "encoder.layers.1.ffn.x.weight",
    ],
    "parts of a block in a list": ["blocks.3.layer.0.attn.q.weight", "blocks.3.layer.1.mlp.fc.weight"],
    "underscore numbers": ["decoder.layers_0.attn.q.kernel", "decoder.layers_0.mlp.wi.kernel"],
    "parallel lists": [
        "transformer.attentions.5.q_lin.weight",
        "transformer.layer_norm1.5.weight",
        "transformer.ffns.5.lin1.weight",
        "transformer.layer_norm2.5.bias",
    ],
    "indices that are not layers: merger": ["visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight"],
    "indices that are not layers: projections": ["altup_projections.0.weight", "altup_projections.1.weight"],
    "indices that are not layers: classifier": ["classifier.0.weight", "classifier.3.bias"],
    "indices that are not layers: a head of plain layers": [
        "bbox_embed.layers.0.weight",
        "bbox_embed.layers.1.weight",
    ],
    "gptq": ["lm_head.qweight", "lm_head.qzeros", "lm_head.scales", "lm_head.g_idx"],
    "fp8": ["model.proj_x.weight", "model.proj_x.weight_scale_inv", "model.proj_x.input_scale"],
    "bitsandbytes": [
        "custom.thing.weight",
        "custom.thing.weight.absmax",
        "custom.thing.weight.quant_map",
        "custom.thing.weight.quant_state.bitsandbytes__nf4",
    ],
    "mxfp4": ["h.0.mlp.experts.gate_up_proj.blocks", "h.0.mlp.experts.gate_up_proj.scales"],
    "lora outside blocks": ["x.custom.lora_A.weight", "x.custom.lora_B.weight", "x.custom.base_layer.weight"],
    "unknown module": ["a.b.weight", "a.b.bias"],
    "stage that ends in a downsampling": [
        "encoder.layers.0.blocks.0.attention.q.weight",
        "encoder.layers.0.blocks.1.attention.q.weight",
        "encoder.layers.0.downsample.reduction.weight",
    ],
}


@pytest.mark.parametrize("names", ONE_LAYER.values(), ids=ONE_LAYER)
def test_what_belongs_together_is_one_layer(names: list[str]) -> None:
    """Parts of a block, a weight and its companions, the linear layers of a head: never two layers."""
    assert len(names_of(names)) == 1


SEVERAL_LAYERS = {
    "stages of layers": (
        stack("encoder.stages", [0, 1], "layers.0.attn.q.weight", "layers.1.attn.q.weight"),
        [f"encoder.stages.{i}.layers.{k}" for i in (0, 1) for k in (0, 1)],
    ),
    "blocks of layers": (
        stack("encoder.blocks", [0, 1], "layers.0.conv.weight", "layers.1.conv.weight"),
        [f"encoder.blocks.{i}.layers.{k}" for i in (0, 1) for k in (0, 1)],
    ),
    "lists in lists": (
        stack("encoder.block", [0, 1], "0.attn.q.weight", "1.attn.q.weight", "0.mlp.w.weight"),
        [f"encoder.block.{i}.{k}" for i in (0, 1) for k in (0, 1)],
    ),
    "numbered lists": (
        ["layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.conv1.weight"],
        ["layer1.0", "layer1.1", "layer2.0"],
    ),
    "a stack inside a module that is called a projector": (
        ["resampler.proj.weight", *stack("resampler.layers", [0, 1])],
        ["resampler.layers.0", "resampler.layers.1", "resampler.proj"],
    ),
    "stacks below a numbered container": (
        [*stack("backbone.0.encoder.layer", [0, 1]), "backbone.0.projector.conv.weight"],
        ["backbone.0.projector", "backbone.0.encoder.layer.0", "backbone.0.encoder.layer.1"],
    ),
}


@pytest.mark.parametrize(("names", "expected"), SEVERAL_LAYERS.values(), ids=SEVERAL_LAYERS)
def test_nested_lists_are_cut_at_the_block(names: list[str], expected: list[str]) -> None:
    """The index that numbers blocks is found, be it the first, the second, or behind another module."""
    assert sorted(names_of(names)) == sorted(expected)


TYPES = {
    "model.embed_tokens.weight": "embedding",
    "bert.embeddings.LayerNorm.weight": "embedding",
    "model.norm.weight": "norm",
    "transformer.ln_f.bias": "norm",
    "layernorm_embedding.weight": "norm",
    "lm_head.weight": "head",
    "embed_out.weight": "head",
    "score.weight": "head",
    "qa_outputs.bias": "head",
    "multi_modal_projector.linear_1.weight": "projector",
    "connector.modality_projection.proj.weight": "projector",
    "model.layers.0.mlp.up.weight": "block",
    "bert.pooler.dense.weight": "other",
    "never.heard.of": "other",
}


@pytest.mark.parametrize(("name", "layer_type"), TYPES.items())
def test_layer_types(name: str, layer_type: str) -> None:
    """A layer's type follows from the word that names it."""
    assert [layer.layer_type for layer in build_layer_map([name]).layers] == [layer_type]


def test_a_block_knows_its_stack_and_index() -> None:
    """Stack and index of a block are fields, so that nobody parses its name again."""
    name = "decoder.layers_12.mlp.kernel"
    assert build_layer_map([name]).layers == (Layer("decoder.layers_12", "block", "decoder.layers", 12, (name,)),)


def test_tensors_of_a_block_follow_the_data() -> None:
    """Inside a block attention stands before the MLP, each behind its norm, and experts in numeric order."""
    parts = [
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "post_attention_layernorm.weight",
        "mlp.experts.2.up.weight",
        "mlp.experts.10.up.weight",
    ]
    (layer,) = build_layer_map(f"model.layers.0.{part}" for part in sorted(parts)).layers
    assert layer.tensors == tuple(f"model.layers.0.{part}" for part in parts)


def test_unknown_modules_are_named_in_one_note() -> None:
    """What no rule knows is kept, and said once for all of it."""
    layer_map = build_layer_map(["foo.bar.weight", "foo.baz.weight", *stack("model.layers", [0])])
    assert [layer.layer_type for layer in layer_map.layers if layer.name.startswith("foo")] == [
        "other",
        "other",
    ]
    (note,) = layer_map.notes
    assert "foo.bar" in note
    assert "foo.baz" in note


AGREEING = {
    "one stack": ({"num_hidden_layers": 2}, {"model.layers": 2}),
    "old spelling": ({"n_layer": 2}, {"h": 2}),
    "multi-token prediction": ({"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, {"model.layers": 3}),
    "encoder and decoder": (
        {"encoder_layers": 1, "decoder_layers": 2},
        {"encoder.layers": 1, "decoder.layers": 2},
    ),
    "nested": (
        {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 2}},
        {"language_model.layers": 3, "vision_tower.layers": 2},
    ),
    "text part of a multimodal model": ({"vision_config": {"num_hidden_layers": 9}}, {"model.layers": 3}),
    "all stages together": ({"num_layers": 4}, {"encoder.stages.0.layers": 1, "encoder.stages.1.layers": 3}),
    "no blocks": ({"num_hidden_layers": 9}, {}),
    "nonsense": ({"num_hidden_layers": True, "n_layer": "12", "text_config": None}, {"model.layers": 3}),
}


@pytest.mark.parametrize(("config", "stacks"), AGREEING.values(), ids=AGREEING)
def test_an_agreeing_config_gives_no_note(config: dict[str, object], stacks: dict[str, int]) -> None:
    """All is well, nothing is said."""
    names = [name for path, count in stacks.items() for name in stack(path, list(range(count)))]
    assert not build_layer_map(names, config).notes


DISAGREEING = {
    "too few blocks": ({"num_hidden_layers": 4}, {"model.layers": 3}, "num_hidden_layers = 4"),
    "nested": (
        {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 7}},
        {"language_model.layers": 3, "vision_tower.layers": 2},
        "vision_config.num_hidden_layers = 7",
    ),
}


@pytest.mark.parametrize(("config", "stacks", "said"), DISAGREEING.values(), ids=DISAGREEING)
def test_a_disagreeing_config_is_a_note(config: dict[str, object], stacks: dict[str, int], said: str) -> None:
    """The headers are followed, and a person is told."""
    names = [name for path, count in stacks.items() for name in stack(path, list(range(count)))]
    layer_map = build_layer_map(names, config)
    assert layer_map.layers == build_layer_map(names).layers
    assert [said in note for note in layer_map.notes] == [True]
