"""Laws of the layer map, for arbitrary names."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsplit.layers import LAYER_TYPES, LayerMap, build_layer_map

#: Components that the rules know, in any order: names that are nearly right find more than names at random.
_WORDS = """
    model transformer encoder decoder layers layer h blocks block blk stages down up up_blocks down_blocks
    resnets attentions transformer_blocks ffns layer_norm1 layer_norm2 experts mlp self_attn embed_tokens norm
    lm_head vision_tower merger patch_embeddings layer_norm mtp fc downsample conv convolution weight bias
    layers_0 block_1 expert_3 qweight scales lora_A 0 1 2 10 007 ² ٣ 99999999999999999999
"""

_arbitrary = st.lists(st.text(max_size=30), max_size=30)
_plausible = st.lists(
    st.lists(st.sampled_from(_WORDS.split()), min_size=1, max_size=9).map(".".join), max_size=60, unique=True
)
_names = st.one_of(_arbitrary, _plausible)
_config = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.dictionaries(
        st.sampled_from(["num_hidden_layers", "n_layer", "text_config", "vision_config", "encoder", "x"]),
        inner,
    ),
    max_leaves=8,
)


def _all_tensors(layer_map: LayerMap) -> list[str]:
    return [name for layer in layer_map.layers for name in layer.tensors]


@given(_names)
@settings(max_examples=300, deadline=None, database=None)
def test_every_name_is_in_exactly_one_layer(names: list[str]) -> None:
    """Nothing is dropped and nothing is doubled, whatever the names."""
    assert sorted(_all_tensors(build_layer_map(names))) == sorted(set(names))


@given(_names, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None, database=None)
def test_input_order_does_not_matter(names: list[str], order: random.Random) -> None:
    """Headers sorted any way give the same map."""
    shuffled = list(names)
    order.shuffle(shuffled)
    assert build_layer_map(shuffled) == build_layer_map(names)


@given(_names)
@settings(max_examples=200, deadline=None, database=None)
def test_layers_are_well_formed(names: list[str]) -> None:
    """Names are unique, types known, no layer is empty, and blocks alone have a stack and an index."""
    layers = build_layer_map(names).layers
    assert len({layer.name for layer in layers}) == len(layers)
    for layer in layers:
        assert layer.tensors
        assert layer.layer_type in LAYER_TYPES
        assert (layer.layer_type == "block") == (layer.stack is not None) == (layer.block_index is not None)


@given(st.sets(st.integers(0, 10**9 - 1), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None, database=None)
def test_stacks_are_in_numeric_order(indices: set[int]) -> None:
    """`layers.2` stands before `layers.10`, with gaps or without."""
    layers = build_layer_map(f"model.layers.{i}.mlp.weight" for i in indices).layers
    assert [layer.block_index for layer in layers] == sorted(indices)


@given(_names, st.dictionaries(st.sampled_from(["num_hidden_layers", "text_config", "encoder"]), _config))
@settings(max_examples=200, deadline=None, database=None)
def test_a_config_changes_nothing_but_notes(names: list[str], config: dict[str, object]) -> None:
    """config.json only cross-checks: the layers are those of the headers, whatever it holds."""
    assert build_layer_map(names, config).layers == build_layer_map(names).layers


@pytest.mark.parametrize(
    "names",
    [
        [f"model.layers.{i}.mlp.weight" for i in range(20_000)],
        [f"module{i}.weight" for i in range(20_000)],
        [f"list{i}.layers.0.mlp.weight" for i in range(20_000)],
        [".".join(["a"] * 1000) + f".{i}" for i in range(100)],
        [".".join(["1"] * 1000) + f".{i}" for i in range(100)],
        [".".join(["stages", "1"] * 500) + f".{i}.a.weight" for i in range(100)],
        ["." * count for count in range(300)],
        ["layers." + "9" * 10_000 + ".weight", "layers." + "0" * 10_000 + ".weight"],
        ["", ".", "..", "a.", ".a", "a..b", "layers..0", "layers.0.", "layers.0", "0", "0.weight", "_0.w"],
        ["_1" * 10_000 + ".weight", ".a_1" * 10_000],
    ],
    ids=[
        "many indices",
        "many modules",
        "many lists",
        "deep",
        "deep indices",
        "deep stages",
        "only dots",
        "huge integers",
        "empty components",
        "underscores",
    ],
)
def test_hostile_names_are_sorted_like_others(names: list[str]) -> None:
    """Names that no model has are kept, too, and take no more than memory in proportion."""
    assert sorted(_all_tensors(build_layer_map(names))) == sorted(set(names))


def test_digits_of_other_scripts_are_no_index() -> None:
    """Only ASCII digits count: Python's int() would read others, or raise."""
    layers = build_layer_map(["layers.².mlp.weight", "layers.٣.mlp.weight"]).layers
    assert {layer.layer_type for layer in layers}.isdisjoint({"block"})


def test_positions_in_the_map_follow_the_index_across_widths() -> None:
    """Every neighbour in a stack of a hundred is one further."""
    layers = build_layer_map(f"h.{i}.attn.weight" for i in range(100)).layers
    assert all(
        first.block_index is not None and second.block_index == first.block_index + 1
        for first, second in pairwise(layers)
    )
