"""Which weights are used under a second name."""

import pytest

from mmsplit.layers import build_layer_map
from mmsplit.planning.ties import find_ties

LLAMA = ["model.embed_tokens.weight", "model.norm.weight"] + [
    f"model.layers.{i}.{part}.weight" for i in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")
]
GPT2 = ["wte.weight", "wpe.weight", "ln_f.weight"] + [
    f"h.{i}.{part}.weight" for i in range(2) for part in ("attn.c_attn", "mlp.c_fc")
]
T5 = ["shared.weight", "encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"] + [
    f"{stack}.block.{i}.layer.{j}.{part}.weight"
    for stack in ("encoder", "decoder")
    for i in range(2)
    for j, part in ((0, "SelfAttention.q"), (1, "DenseReluDense.wi"))
]
BART = ["model.shared.weight"] + [
    f"model.{stack}.layers.{i}.fc{k}.weight" for stack in ("encoder", "decoder") for i in range(2) for k in (1, 2)
]
VISION = ["vision_tower.layers.0.attn.weight", "vision_tower.layers.1.attn.weight"]


def architecture(name: str, **more: object) -> dict[str, object]:
    return {"architectures": [name], **more}


#: names, config -> (alias, stored tensor) of each tie, words of each note
CASES = {
    "Llama without a head": (
        LLAMA,
        architecture("LlamaForCausalLM", tie_word_embeddings=True),
        [("lm_head.weight", "model.embed_tokens.weight")],
        [],
    ),
    "Llama without a head, config silent": (
        LLAMA,
        architecture("LlamaForCausalLM"),
        [("lm_head.weight", "model.embed_tokens.weight")],
        [],
    ),
    "Llama without a head, no config": (LLAMA, None, [("lm_head.weight", "model.embed_tokens.weight")], []),
    "no head, config says not tied": (
        LLAMA,
        architecture("LlamaForCausalLM", tie_word_embeddings=False),
        [("lm_head.weight", "model.embed_tokens.weight")],
        ["says tie_word_embeddings is false"],
    ),
    "head stored": ([*LLAMA, "lm_head.weight"], architecture("LlamaForCausalLM", tie_word_embeddings=False), [], []),
    "head stored, config says tied": (
        [*LLAMA, "lm_head.weight"],
        architecture("LlamaForCausalLM", tie_word_embeddings=True),
        [],
        ["lm_head.weight is stored, too"],
    ),
    "base model": (LLAMA, architecture("LlamaModel"), [], []),
    "classifier": ([*LLAMA, "score.weight"], architecture("LlamaForSequenceClassification"), [], []),
    "no architectures, config says tied": (
        LLAMA,
        {"tie_word_embeddings": True},
        [("lm_head.weight", "model.embed_tokens.weight")],
        [],
    ),
    "no architectures, config silent": (LLAMA, {}, [], []),
    "tied in the text part": (
        LLAMA,
        {"architectures": [], "text_config": {"tie_word_embeddings": True}},
        [("lm_head.weight", "model.embed_tokens.weight")],
        [],
    ),
    "config of nonsense": (
        LLAMA,
        {"architectures": [7, "XForCausalLM"], "tie_word_embeddings": "yes", "text_config": 3},
        [("lm_head.weight", "model.embed_tokens.weight")],
        [],
    ),
    "gpt2": (GPT2, architecture("GPT2LMHeadModel"), [("lm_head.weight", "wte.weight")], []),
    "T5, tied": (
        T5,
        architecture("T5ForConditionalGeneration"),
        [("decoder.embed_tokens.weight", "shared.weight"), ("lm_head.weight", "shared.weight")],
        [],
    ),
    "T5 v1.1, head stored": (
        [*T5, "lm_head.weight"],
        architecture("T5ForConditionalGeneration", tie_word_embeddings=False),
        [("decoder.embed_tokens.weight", "shared.weight")],
        [],
    ),
    "T5 with the decoder's own embedding": (
        [*T5, "decoder.embed_tokens.weight"],
        architecture("T5ForConditionalGeneration"),
        [("lm_head.weight", "decoder.embed_tokens.weight")],
        [],
    ),
    "BART, whose head has only a bias": (
        [*BART, "final_logits_bias"],
        architecture("BartForConditionalGeneration"),
        [("decoder.embed_tokens.weight", "model.shared.weight"), ("lm_head.weight", "model.shared.weight")],
        [],
    ),
    "head of which only the bias is stored": (
        [*LLAMA, "lm_head.bias"],
        architecture("LlamaForCausalLM"),
        [("lm_head.weight", "model.embed_tokens.weight")],
        [],
    ),
    "vision model": (VISION, None, [], []),
    "nothing": ([], None, [], []),
}


@pytest.mark.parametrize(("names", "config", "ties", "notes"), CASES.values(), ids=CASES)
def test_ties(
    names: list[str], config: dict[str, object] | None, ties: list[tuple[str, str]], notes: list[str]
) -> None:
    """Evidence of the headers first; where the config disagrees there is a note."""
    layer_map = build_layer_map(names, config)
    found, said = find_ties(layer_map, config)
    assert [(tie.alias, tie.tensor) for tie in found] == ties
    assert all(tie.layer.tensors == (tie.tensor,) for tie in found)
    assert len(said) == len(notes)
    for sentence, words in zip(said, notes, strict=True):
        assert words in sentence
    layer_names = [layer.name for layer in layer_map.layers] + [tie.layer.name for tie in found]
    assert len(set(layer_names)) == len(layer_names)


def test_ties_stand_where_they_run() -> None:
    """The decoder's embedding before its first block, the head after everything."""
    layer_map = build_layer_map(T5)
    embedding, head = find_ties(layer_map, architecture("T5ForConditionalGeneration"))[0]
    assert layer_map.layers[embedding.position].name == "decoder.block.0"
    assert head.position == len(layer_map.layers)
    assert (embedding.layer.name, embedding.layer.layer_type) == ("decoder.embed_tokens", "embedding")
    assert (head.layer.name, head.layer.layer_type) == ("lm_head", "head")
