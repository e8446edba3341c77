"""Quantised weights and what belongs to them: found by name, kept together, missed where they are promised."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmsplit.checkpoint import Checkpoint, TensorInfo, slice_rows
from mmsplit.errors import PlanError
from mmsplit.layers import build_layer_map
from mmsplit.planning import PlannedLayer, PlannedPartition, PlanRequest, plan_checkpoint, planner
from mmsplit.planning.companions import companion_notes, find_companions, require_kept_together

CORPUS = Path(__file__).parent.parent / "layers"

#: What a format calls the tensors of one linear layer `m`, and the weight they are of.
FORMATS = {
    "GPTQ": ["m.qweight", "m.qzeros", "m.scales", "m.g_idx"],
    "AWQ": ["m.qweight", "m.qzeros", "m.scales"],
    "EXL2": ["m.q_weight", "m.q_scale", "m.q_scale_max", "m.q_groups", "m.q_invperm"],
    "bitsandbytes 4": [
        "m.weight",
        "m.weight.absmax",
        "m.weight.quant_map",
        "m.weight.nested_absmax",
        "m.weight.nested_quant_map",
        "m.weight.quant_state.bitsandbytes__nf4",
    ],
    "bitsandbytes 8": ["m.weight", "m.SCB", "m.weight_format"],
    "FP8 blocks": ["m.weight", "m.weight_scale_inv"],
    "FP8 static": ["m.weight", "m.weight_scale", "m.input_scale"],
    "ModelOpt": ["m.weight", "m.weight_scale", "m.weight_scale_2", "m.input_scale"],
    "compressed-tensors": [
        "m.weight_packed",
        "m.weight_scale",
        "m.weight_shape",
        "m.weight_zero_point",
        "m.weight_g_idx",
        "m.weight_global_scale",
        "m.input_global_scale",
    ],
    "HQQ": ["m.W_q", "m.scale", "m.zero", "m.nbits", "m.group_size", "m.shape", "m.axis"],
    "AQLM": ["m.codes", "m.codebooks", "m.scales"],
    "VPTQ": ["m.indices", "m.centroids.weight", "m.res_centroids.weight", "m.weight_scale", "m.perm"],
    "SpQR": ["m.dense_weights", "m.row_offsets", "m.col_vals", "m.in_perm"],
    "EETQ": ["m.weight", "m.weight_scales"],
    "quanto": ["m.weight._data", "m.weight._scale", "m.input_scale", "m.output_scale"],
    "torchao": ["m._weight_qdata", "m._weight_scale", "m._weight_zero_point"],
    "MLX": ["m.weight", "m.scales", "m.biases"],
    "MXFP4": ["m.blocks", "m.scales"],
}


def tensor(name: str, dtype: str = "U8", shape: tuple[int, ...] = (8, 8)) -> TensorInfo:
    return TensorInfo(name, dtype, shape, "s", 0, 64, 64)


def partition(part_id: int, *tensors: TensorInfo) -> PlannedPartition:
    return PlannedPartition(part_id, (PlannedLayer(f"l{part_id}", "block", None, None, tensors),))


@pytest.mark.parametrize("names", FORMATS.values(), ids=FORMATS)
def test_one_group_per_weight(names: list[str]) -> None:
    """All of a format's tensors are one group, the layer beside it another, a bias is in none."""
    others = [f"n{name[1:]}" for name in names]
    groups = find_companions([*names, *others, "m.bias", "norm.weight"])
    assert {frozenset(members) for members in groups.values() if len(members) > 1} == {
        frozenset(names),
        frozenset(others),
    }
    with pytest.raises(PlanError, match="cuts the two apart"):
        require_kept_together(
            [partition(0, *map(tensor, names[1:])), partition(1, tensor(names[0]))], find_companions(names)
        )
    require_kept_together([partition(0, *map(tensor, names)), partition(1)], find_companions(names))


def test_packed_experts() -> None:
    """Weights that are called by their own name have companions called after them."""
    names = [
        "e.gate_up_proj_blocks",
        "e.gate_up_proj_scales",
        "e.down_proj",
        "e.down_proj_scale_inv",
        "e.down_proj_bias",
    ]
    groups = find_companions(names)
    assert groups == {
        "e.gate_up_proj": ("e.gate_up_proj_blocks", "e.gate_up_proj_scales"),
        "e.down_proj": ("e.down_proj", "e.down_proj_scale_inv"),
    }


def test_slices_must_be_the_same_share() -> None:
    """64 rows of a weight and 8 of its scales go together if both are the same experts'."""
    weight, scale = tensor("m.w", shape=(64, 1)), tensor("m.w_scale_inv", shape=(8, 8))
    groups = find_companions(["m.w", "m.w_scale_inv"])

    def plan(cut_weight: int, cut_scale: int) -> list[PlannedPartition]:
        return [
            partition(0, slice_rows(weight, 0, cut_weight), slice_rows(scale, 0, cut_scale)),
            partition(1, slice_rows(weight, cut_weight, 64), slice_rows(scale, cut_scale, 8)),
        ]

    require_kept_together(plan(24, 3), groups)
    with pytest.raises(PlanError, match=r"m.w_scale_inv.*belongs to 'm.w'.*from 0 to 3/8.*from 0 to 1/2") as error:
        require_kept_together(plan(24, 4), groups)
    assert error.value.tensor == "m.w_scale_inv"
    with pytest.raises(PlanError, match="cuts the two apart"):
        require_kept_together(
            [partition(0, slice_rows(weight, 0, 32), scale), partition(1, slice_rows(weight, 32, 64))], groups
        )


@pytest.mark.parametrize(
    ("names", "config", "notes"),
    [
        (["m.qweight"], None, ["'scales'"]),
        (["m.qweight", "m.scales", "n.qweight"], None, ["'scales' beside it (1): n.weight"]),
        (
            [f"{k}.{x}" for k in range(20) for x in ("qweight", "scales", "qzeros")][:-1],
            None,
            ["'qzeros'", "19.weight"],
        ),
        (["m.weight_scale_inv"], None, ["'weight' beside it (1): m.weight"]),
        (["m.weight_packed", "m.weight_shape"], None, ["'weight_scale'"]),
        (["m.W_q", "m.scale"], None, ["'zero'"]),
        (["m.weight", "m.weight.absmax"], None, ["'weight.quant_map'"]),
        (["m.weight"], {"quantization_config": {"quant_method": "fp8"}}, ["no scale beside it (1): m.weight"]),
        (["m.weight", "n.weight", "n.weight_scale_inv"], None, ["no scale beside it (1): m.weight"]),
    ],
)
def test_what_is_missing_is_a_note(names: list[str], config: dict | None, notes: list[str]) -> None:
    """It names the first few; the plan is made all the same."""
    tensors = {name: tensor(name, "F8_E4M3" if name.endswith(".weight") else "U8") for name in names}
    found = companion_notes(find_companions(tensors), tensors, config)
    assert len(found) == 1
    assert all(note in found[0] for note in notes), found


@pytest.mark.parametrize(
    "names",
    [
        ["self_attn.k_proj.weight", "self_attn.k_scale", "self_attn.v_scale"],  # scales of the KV cache
        ["blocks.0.layer_scale", "logit_scale", "lab.scale", "lab.bias"],
        ["m.weight", "m.weight_scale", "n.weight", "n.weight_scale", "n.input_scale"],  # two schemes
        ["a.weight", "b.weight"],  # all in 8-bit floats, and nobody said quantised
    ],
)
def test_what_is_not_promised_is_not_missed(names: list[str]) -> None:
    tensors = {name: tensor(name, "F8_E4M3") for name in names}
    assert companion_notes(find_companions(tensors), tensors, {"quantization_config": "nonsense"}) == ()


def test_a_plan_by_layer_is_held_to_it_too(
    make_checkpoint: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No name makes it happen (below), so the groups are made to: the plan fails."""
    group = ("layers.0.mlp.a", "layers.1.mlp.a")
    monkeypatch.setattr(planner, "checkpoint_companions", lambda _: {"w": group})
    checkpoint = make_checkpoint({"layers.0.mlp.a": 4, "layers.1.mlp.a": 4})
    with pytest.raises(PlanError, match="cuts the two apart"):
        plan_checkpoint(checkpoint, PlanRequest(num_parts=2))
    assert plan_checkpoint(checkpoint, PlanRequest(num_parts=1)).num_parts == 1


def test_layers_keep_companions_together() -> None:
    """In every real architecture, as it is and as if every weight were quantised: no layer boundary parts a group."""
    sys.path.insert(0, str(CORPUS))
    sys.path.insert(0, str(CORPUS / "data"))
    from test_layer_scores import FIXTURE, decode_names

    for raw in json.loads(gzip.decompress(FIXTURE.read_bytes()))[::4]:
        names = decode_names(raw["names"])
        names += [
            f"{name}{ending}" for name in names for ending in ("_scale_inv", ".absmax") if name.endswith("weight")
        ]
        groups = find_companions(names)
        layer_of = {name: layer.name for layer in build_layer_map(names).layers for name in layer.tensors}
        for members in groups.values():
            assert len({layer_of[name] for name in members}) == 1, members
