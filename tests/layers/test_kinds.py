"""What tensors do, by their names: experts, kinds, and the corpus of real architectures."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest
from test_layer_scores import FIXTURE, decode_names

from mmsplit.layers import Layer, build_layer_map
from mmsplit.layers.experts import ExpertPlace, expert_place
from mmsplit.layers.kinds import KINDS, sort_by_kind


@pytest.mark.parametrize(
    ("name", "dimensions", "place"),
    [
        ("model.layers.3.mlp.experts.17.gate_proj.weight", 2, ("model.layers.3.mlp.experts", 17)),
        ("l.0.block_sparse_moe.experts.3.w1.weight", 2, ("l.0.block_sparse_moe.experts", 3)),
        ("l.0.mlp.experts.3.up_proj.weight_scale_inv", 2, ("l.0.mlp.experts", 3)),
        ("l.0.ffn.experts.expert_5.fc1.bias", 1, ("l.0.ffn.experts", 5)),
        ("l.0.mlp.experts.local_experts.7.linear_fc1.weight", 2, ("l.0.mlp.experts", 7)),
        ("l.0.mlp.experts.gate_up_proj", 3, ("l.0.mlp.experts", None)),
        ("l.0.mlp.experts.gate_up_proj_blocks", 4, ("l.0.mlp.experts", None)),
        ("l.0.mlp.experts.gate_up_proj_bias", 2, ("l.0.mlp.experts", None)),
        ("l.0.ffn.experts.mlp.w1", 2, ("l.0.ffn.experts", None)),
        ("blk.3.ffn_gate_exps.weight", 3, ("blk.3.ffn_gate_exps", None)),
        ("l.0.block_sparse_moe.input_linear.weight", 3, ("l.0.block_sparse_moe", None)),
        ("l.0.mlp.input_linear.weight", 3, ("l.0.mlp.input_linear", None)),
        ("l.0.moe.gate_proj.weight", 3, ("l.0.moe", None)),
        ("l.0.mlp.shared_experts.gate_proj.weight", 2, None),
        ("l.0.moe.share_expert.up_proj.weight", 3, None),
        ("blk.3.ffn_gate_shexp.weight", 2, None),
        ("blk.3.ffn_gate_inp.weight", 2, None),
        ("l.0.mlp.gate.weight", 2, None),
        ("l.0.block_sparse_moe.router.layer.weight", 2, None),
        ("l.0.mlp.experts.e_score_correction_bias", 1, None),
        ("l.0.mlp.experts.post_expert_norm.weight", 1, None),
        ("paligemma_with_expert.gemma_expert.lm_head.weight", 2, None),
        ("encoder.input_linear.weight", 2, None),
        ("x." * 200 + "experts." + "9" * 40 + ".weight", 2, None),
    ],
)
def test_where_experts_are(name: str, dimensions: int, place: tuple[str, int | None] | None) -> None:
    """Numbered or packed; not what is shared, common to all, or merely called so."""
    assert expert_place(name, dimensions) == (None if place is None else ExpertPlace(*place))


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("self_attn.q_proj.weight", "attention"),
        ("self_attn.q_norm.weight", "attention"),  # runs where the attention runs
        ("input_layernorm.weight", "norm"),
        ("attn_norm.weight", "norm"),
        ("attn_q.weight", "attention"),
        ("ffn_up.weight", "mlp"),
        ("ffn_norm.weight", "norm"),
        ("mlp.up_proj.weight", "mlp"),
        ("layer.0.SelfAttention.q.weight", "attention"),
        ("layer.1.DenseReluDense.wi.weight", "mlp"),
        ("attention.output.LayerNorm.weight", "attention"),
        ("output.dense.weight", "mlp"),
        ("mamba.in_proj.weight", "attention"),
        ("mixer.in_proj.weight", "attention"),
        ("mixer.up_proj.weight", "mlp"),
        ("norm1.linear.weight", "norm"),
        ("conv1.weight", "convolution"),
        ("shared_head.head.weight", "head"),
        ("eh_proj.weight", "projector"),
        ("frobnicate.weight", "other"),
        ("weight", "other"),
        ("x" * 200, "other"),
    ],
)
def test_parts_of_a_block(suffix: str, kind: str) -> None:
    """The outermost word that says something decides."""
    name = f"model.layers.3.{suffix}"
    layer = Layer("model.layers.3", "block", "model.layers", 3, (name,))
    assert sort_by_kind(layer, {name: 2}) == {kind: (name,)}


def test_a_router_goes_with_its_experts() -> None:
    """Wherever it stands beside them; shared experts and their gate are an MLP."""
    prefix = "model.layers.3.mlp"
    names = {
        f"{prefix}.experts.0.up_proj.weight": "experts",
        f"{prefix}.gate.weight": "experts",
        f"{prefix}.gate.e_score_correction_bias": "experts",
        f"{prefix}.shared_experts.up_proj.weight": "mlp",
        f"{prefix}.shared_expert_gate.weight": "mlp",
        "model.layers.3.self_attn.gate.weight": "attention",
    }
    layer = Layer("model.layers.3", "block", "model.layers", 3, tuple(names))
    found = sort_by_kind(layer, dict.fromkeys(names, 2))
    assert {name: kind for kind, members in found.items() for name in members} == names
    alone = layer._replace(tensors=(f"{prefix}.gate.weight",))  # no experts: an MLP that is gated
    assert sort_by_kind(alone, {f"{prefix}.gate.weight": 2}) == {"mlp": alone.tensors}


@pytest.mark.parametrize("layer_type", ["embedding", "norm", "projector", "head"])
def test_a_layer_outside_blocks_is_what_its_type_says(layer_type: str) -> None:
    """Whatever words are in its names; what has no type is looked at like a block."""
    names = ("thing.attn.weight", "thing.x.weight")
    layer = Layer("thing", layer_type, None, None, names)
    assert sort_by_kind(layer, dict.fromkeys(names, 2)) == {layer_type: names}
    assert sort_by_kind(layer._replace(layer_type="other"), dict.fromkeys(names, 2)) == {
        "attention": names[:1],
        "other": names[1:],
    }


@pytest.mark.parametrize("name", ["0", "0.1", "", ".", "[storage]"])
def test_a_name_without_words_says_nothing(name: str) -> None:
    """A bare list of tensors in a PyTorch file has numbers for names."""
    for layer in (Layer(name, "other", None, None, (name,)), Layer("0", "block", "", 0, (name,))):
        assert sort_by_kind(layer, {name: 1}) == {"other": (name,)}


def test_every_tensor_of_real_architectures_has_one_kind() -> None:
    """And few have none that says anything."""
    counts: Counter[str] = Counter()
    for raw in json.loads(gzip.decompress(FIXTURE.read_bytes())):
        for layer in build_layer_map(decode_names(raw["names"])).layers:
            found = sort_by_kind(layer, dict.fromkeys(layer.tensors, 2))
            assert sorted(name for names in found.values() for name in names) == sorted(layer.tensors)
            counts.update({kind: len(names) for kind, names in found.items()})
    assert set(counts) == set(KINDS)
    assert counts["other"] < 0.004 * counts.total()
