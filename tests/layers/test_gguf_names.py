"""Names as GGUF has them: those the gguf package knows (`tests/checkpoint/make_gguf_fixtures.py` wrote them)."""

import json
from pathlib import Path

import pytest

from mmsplit.layers import LayerMap, build_layer_map

NAMES: dict[str, list[str]] = json.loads((Path(__file__).parent / "data" / "gguf_names.json").read_text())
BLOCKS = (0, 1, 2, 10)  # as text, 10 comes before 2

#: Architecture -> its layers in forward order; "*" stands for the blocks of a stack.
FORWARD_ORDER = {
    "llama": "rope_freqs token_embd blk.* output_norm output",
    "llama4": "rope_freqs token_embd blk.* output_norm output",
    "qwen2": "rope_freqs token_embd blk.* output_norm output",
    "qwen3moe": "token_embd blk.* output_norm output",
    "qwen3next": "token_embd blk.* output_norm output",
    "deepseek2": "rope_freqs token_embd blk.* output_norm output",
    "glm-dsa": "rope_freqs token_embd blk.* output_norm output",
    "gemma2": "token_embd blk.* output_norm",
    "gemma3": "token_embd blk.* output_norm output",
    "gemma3n": (
        "per_layer_token_embd token_embd altup_proj per_layer_model_proj per_layer_proj_norm"
        " blk.* altup_unembd_proj output_norm output"
    ),
    "phi2": "token_embd blk.* output_norm output",
    "phi3": "rope_factors_long rope_factors_short token_embd blk.* output_norm output",
    "gpt2": "position_embd token_embd blk.* output_norm output",
    "gpt-oss": "token_embd blk.* output_norm output",
    "falcon": "token_embd blk.* output_norm output",
    "falcon-h1": "token_embd blk.* output_norm output",
    "mamba": "token_embd blk.* output_norm output",
    "mamba2": "token_embd blk.* output_norm output",
    "jamba": "token_embd blk.* output_norm output",
    "kimi-linear": "token_embd blk.* output_norm output",
    "rwkv7": "token_embd token_embd_norm blk.* output_norm output",
    "t5": "token_embd enc.blk.* enc.output_norm dec.blk.* dec.output_norm output",
    "bert": "position_embd token_embd token_types token_embd_norm blk.* output_norm cls",
    "wavtokenizer-dec": "conv1d token_embd token_embd_norm posnet.* convnext.* output_norm output",
}
#: What stands where in a file of towers and projectors (clip, Whisper's encoder, DeepSeek-OCR): first before second.
TOWERS = (
    ("a.conv1d", "a.blk.0"),
    ("a.conv2d", "a.blk.0"),
    ("a.pre_encode", "a.blk.0"),
    ("a.position_embd", "a.blk.0"),
    ("a.position_embd_norm", "a.blk.0"),
    ("a.blk.2", "a.blk.10"),
    ("a.blk.10", "a.post_ln"),
    ("v.patch_embd", "v.blk.0"),
    ("v.class_embd", "v.blk.0"),
    ("v.norm_embd", "v.blk.0"),
    ("v.pre_ln", "v.blk.0"),
    ("v.blk.10", "v.post_ln"),
    ("v.sam.patch_embd", "v.sam.blk.0"),
    ("v.sam.blk.10", "v.sam.neck"),
    ("a.post_ln", "mm"),
    ("v.post_ln", "mm"),
)


def map_of(architecture: str) -> LayerMap:
    found = dict.fromkeys(
        f"{name.format(bid=i, xid=0)}.{parameter}"
        for name in NAMES[architecture]
        for i in BLOCKS
        for parameter in ("weight", "bias")
    )
    return build_layer_map(found)


def shown(layer_map: LayerMap) -> str:
    """The layers as the table has them."""
    lines = [layer.name if layer.stack is None else f"{layer.stack}.*" for layer in layer_map.layers]
    return " ".join(dict.fromkeys(lines))


@pytest.mark.parametrize("architecture", FORWARD_ORDER)
def test_layers_stand_in_forward_order(architecture: str) -> None:
    """Input, blocks by their numbers, norm, head; and no rule is missing."""
    layer_map = map_of(architecture)
    assert shown(layer_map) == FORWARD_ORDER[architecture]
    assert layer_map.notes == ()
    stacks = {layer.stack for layer in layer_map.layers if layer.stack}
    for stack in stacks:
        assert [layer.block_index for layer in layer_map.layers if layer.stack == stack] == list(BLOCKS)


@pytest.mark.parametrize("architecture", sorted(NAMES))
def test_a_block_is_one_layer_and_holds_all_that_is_its_own(architecture: str) -> None:
    """Experts, norms, state spaces, what predicts further tokens: everything below its number."""
    for layer in map_of(architecture).layers:
        if layer.stack is not None:
            assert all(name.startswith(f"{layer.name}.") for name in layer.tensors)
    owners = {name: layer for layer in map_of(architecture).layers for name in layer.tensors}
    for name, layer in owners.items():
        if ".blk." in f".{name}":
            assert layer.name == name[: name.index("blk.") + 4] + name[name.index("blk.") + 4 :].split(".")[0]


@pytest.mark.parametrize(("first", "second"), TOWERS)
def test_towers_and_projectors_stand_in_forward_order(first: str, second: str) -> None:
    order = [layer.name for layer in map_of("clip").layers]
    assert order.index(first) < order.index(second)


def test_all_projectors_of_a_multimodal_file_are_one_layer() -> None:
    """`mm.0`, `mm.model.mlp.1`, `mm.input_projection` …: they are small, and run together."""
    (layer,) = [layer for layer in map_of("clip").layers if layer.name.startswith("mm")]
    assert layer.layer_type == "projector"


def test_experts_apart_or_packed_stay_with_their_block() -> None:
    """As in files of before the experts were packed."""
    names = [f"blk.{i}.ffn_gate.{e}.weight" for i in range(2) for e in range(3)]
    names += [f"blk.{i}.{part}.weight" for i in range(2) for part in ("attn_q", "ffn_gate_inp", "ffn_up_exps")]
    assert shown(build_layer_map(names)) == "blk.*"


def test_stages_of_a_convolutional_tower_are_opened() -> None:
    """Gemma 3n's MobileNet: `v.blk.STAGE.BLOCK`."""
    names = [f"v.blk.{s}.{b}.{part}.weight" for s in range(2) for b in range(2) for part in ("dw_start.conv", "bn1")]
    blocks = [layer.name for layer in build_layer_map(names).layers]
    assert blocks == ["v.blk.0.0", "v.blk.0.1", "v.blk.1.0", "v.blk.1.1"]
