"""Cuts of checkpoints in which names see the bytes of other tensors, as in PyTorch files."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import CAUSAL, MakeShaped, held, moe, open_shapes

from mmsplit.checkpoint import Checkpoint, TensorInfo, TensorView
from mmsplit.errors import PlanError
from mmsplit.planning import Plan, PlanRequest, plan_checkpoint

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def seen(checkpoint: Checkpoint, views: Mapping[str, str]) -> Checkpoint:
    """Give a checkpoint further names, each for all bytes of a tensor, as a PyTorch file has them."""
    for name, base in views.items():
        tensor = checkpoint.tensors[base]
        checkpoint.views[name] = TensorView(name, base, tensor.dtype, (tensor.params,), (1,), 0)
    return checkpoint


def views_of(plan: Plan) -> list[list[tuple[str, str, bool]]]:
    """Return the views of each partition: name, tensor, and whether it is a tied layer's."""
    return [
        [(view.name, view.base, layer.alias is not None) for layer in part.layers for view in layer.views]
        for part in plan.partitions
    ]


@pytest.mark.parametrize(
    ("options", "home"),
    [({"split_by": "type"}, 3), ({"split_by": "expert", "num_parts": 3}, 0)],
    ids=["type", "expert"],
)
def test_a_view_in_its_layer_goes_where_its_tensor_goes(
    shaped: MakeShaped, options: dict[str, object], home: int
) -> None:
    """The layer of a partition lists the names that see its own tensors, and no others."""
    at = "model.layers.0.mlp"
    views = {f"{at}.again": f"{at}.shared_expert.up_proj.weight", "model.layers.1.mlp.experts.3.copy": EXPERT}
    plan = plan_checkpoint(seen(shaped(moe(head=True)), views), PlanRequest(**options))  # type: ignore[arg-type]
    found = views_of(plan)
    assert (f"{at}.again", f"{at}.shared_expert.up_proj.weight", False) in found[home]
    expert = next(part_id for part_id, names in enumerate(held(plan)) if EXPERT in names)
    assert found[expert].count(("model.layers.1.mlp.experts.3.copy", EXPERT, False)) == 1
    assert sum(map(len, found)) == 2
    for part in plan.partitions:
        for layer in part.layers:
            assert {view.base for view in layer.views} <= {tensor.name for tensor in layer.tensors}


@pytest.mark.parametrize(
    ("tied", "parts", "stored"),
    [("duplicate", [0, 1], True), ("reference", [0, 1], False), ("colocate", [0, 0], False)],
)
def test_ties_by_name_follow_the_rule(shaped: MakeShaped, tied: str, parts: list[int], stored: bool) -> None:
    """A layer whose weight is another's is asked about under its own name; one tensor may serve several."""
    base = "model.layers.0.mlp.shared_expert.up_proj.weight"
    names = ["model.layers.1.mlp.tied.weight", "lm_head.weight"]
    checkpoint = seen(shaped(moe(), CAUSAL), dict.fromkeys(names, base))

    def rule(tensor: TensorInfo) -> int:
        return int(tensor.name in (*names, "model.norm.weight"))

    plan = plan_checkpoint(checkpoint, PlanRequest(rule=rule, tied=tied))  # type: ignore[arg-type]
    uses = [(part.part_id, layer) for part in plan.partitions for layer in part.layers if layer.alias in names]
    assert {part_id for part_id, _ in uses} == {parts[1]}
    assert [layer.alias for _, layer in uses] == names
    assert [layer.stored for _, layer in uses] == [stored, False]  # one copy serves both
    assert all(layer.tied_to == 0 and layer.views[0].name == layer.alias for _, layer in uses)


def test_a_shared_weight_is_of_the_kind_that_its_name_says(shaped: MakeShaped) -> None:
    """Layers that share one weight (ALBERT, T5's position bias): cut by type the use goes with its kind."""
    base = "model.layers.0.self_attn.q_proj.weight"
    views = {"model.layers.1.self_attn.k_proj.weight": base, "model.layers.1.mlp.down_proj.weight": base}
    plan = plan_checkpoint(seen(shaped(moe()), views), PlanRequest(split_by="type"))
    labels = {
        view.name: part.label
        for part in plan.partitions
        for layer in part.layers
        for view in layer.views
        if layer.alias
    }
    assert labels == dict(zip(views, ["attention", "mlp"], strict=True))


@pytest.mark.parametrize(
    ("name", "part_id"),
    [
        ("model.layers.1.mlp.experts.0.gate.weight", 1),
        ("model.layers.1.mlp.experts.3.gate.weight", 2),
        ("model.layers.1.mlp.shared_expert.gate.weight", 0),
    ],
)
def test_a_shared_expert_weight_goes_to_the_expert_that_uses_it(shaped: MakeShaped, name: str, part_id: int) -> None:
    base = "model.layers.0.mlp.experts.1.up_proj.weight"
    plan = plan_checkpoint(seen(shaped(moe()), {name: base}), PlanRequest(split_by="expert", num_parts=3))
    (use,) = [(part.part_id, layer.stored) for part in plan.partitions for layer in part.layers if layer.alias == name]
    assert use == (part_id, part_id != 1)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.0.up_proj", "model.layers.1.mlp.up_proj"])
def test_a_tensor_that_other_names_see_is_not_sliced(shaped: MakeShaped, name: str) -> None:
    """In its own layer or another; cut so that it stays whole, it makes a plan."""
    base = "model.layers.0.mlp.experts.up_proj"
    shapes = {"model.embed_tokens.weight": (16, 8), base: (4, 2, 8), "model.layers.1.mlp.gate.weight": (4, 8)}
    checkpoint = seen(shaped(shapes), {name: base})
    with pytest.raises(PlanError, match="another name for bytes of it") as caught:
        plan_checkpoint(checkpoint, PlanRequest(split_by="expert", num_parts=3))
    assert caught.value.tensor == base
    assert name in str(caught.value)
    for options in ({"split_by": "expert", "num_parts": 2}, {"split_by": "type"}, {"num_parts": 2}):
        plan = plan_checkpoint(checkpoint, PlanRequest(**options))  # type: ignore[arg-type]
        assert name in [view[0] for part in views_of(plan) for view in part]


def test_bytes_that_only_views_see_are_no_packed_experts(shaped: MakeShaped) -> None:
    """A flat run of bytes has no rows, whatever its length."""
    run = "model.layers.0.mlp.experts.up_proj[storage]"
    checkpoint = shaped(moe() | {run: (4,)})
    checkpoint.tensors[run] = checkpoint.tensors[run]._replace(hidden=True)
    plan = plan_checkpoint(checkpoint, PlanRequest(split_by="expert", num_parts=3))
    assert run in held(plan)[0]


def test_a_companion_that_is_a_view_stays_with_its_weight(shaped: MakeShaped) -> None:
    """What the rule parts are the bytes that one name sees, and the other's own."""
    shapes = {f"model.layers.{k}.q_proj.{what}": (2, 4) for k in (0, 1) for what in ("qweight[storage]", "scales")}
    checkpoint = shaped(shapes)
    for k in (0, 1):
        seen(checkpoint, {f"model.layers.{k}.q_proj.qweight": f"model.layers.{k}.q_proj.qweight[storage]"})
    with pytest.raises(PlanError, match="cuts the two apart") as caught:
        plan_checkpoint(checkpoint, PlanRequest(rule=lambda tensor: int("scales" in tensor.name)))
    assert "qweight" in str(caught.value)
    plan = plan_checkpoint(checkpoint, PlanRequest(rule=lambda tensor: int("layers.1" in tensor.name)))
    assert plan.notes == plan_checkpoint(checkpoint, PlanRequest(num_parts=2)).notes
    assert not [note for note in plan.notes if "quantised" in note]


@given(
    bases=st.lists(st.integers(0, 99), max_size=8),
    names=st.lists(st.sampled_from(["mlp.gate", "self_attn.k", "mlp.experts.1.down", "norm"]), min_size=8, max_size=8),
    how=st.sampled_from(["type", "expert", "rule", "layer"]),
    tied=st.sampled_from(["duplicate", "reference", "colocate"]),
    answers=st.lists(st.integers(0, 2), min_size=7, max_size=7),
)
@settings(max_examples=100, deadline=None, database=None)
def test_every_name_is_somewhere_once(
    tmp_path_factory: pytest.TempPathFactory,
    bases: list[int],
    names: list[str],
    how: str,
    tied: str,
    answers: list[int],
) -> None:
    """Whatever the cut: a view lies with its tensor, or in one tied layer that says where that is."""
    checkpoint = open_shapes(tmp_path_factory.mktemp("c"), moe(), CAUSAL)
    stored = list(checkpoint.tensors)
    views = {f"model.layers.{k % 2}.{names[k]}.view{k}": stored[n % len(stored)] for k, n in enumerate(bases)}
    seen(checkpoint, views)
    order = {name: k if k < 3 else answers[k % 7] for k, name in enumerate(stored)}
    request = {
        "layer": PlanRequest(num_parts=2, tied=tied),  # type: ignore[arg-type]
        "type": PlanRequest(split_by="type", tied=tied),  # type: ignore[arg-type]
        "expert": PlanRequest(split_by="expert", num_parts=3, tied=tied),  # type: ignore[arg-type]
        "rule": PlanRequest(rule=lambda tensor: order.get(tensor.name), tied=tied),  # type: ignore[arg-type]
    }[how]
    plan = plan_checkpoint(checkpoint, request)
    homes = {tensor: part_id for part_id, tensors in enumerate(own(plan)) for tensor in tensors}
    found = [name for part in views_of(plan) for name, _, _ in part]
    assert sorted(found) == sorted(views)
    for part in plan.partitions:
        has = {tensor.name for layer in part.layers if layer.stored for tensor in layer.tensors}
        assert len({layer.name for layer in part.layers}) == len(part.layers)
        for layer in part.layers:
            assert {view.base for view in layer.views} <= {tensor.name for tensor in layer.tensors}
            if layer.alias is not None:
                (tensor,) = layer.tensors
                assert layer.tied_to == homes[tensor.name]
                assert tensor.name in has or tied == "reference"


def own(plan: Plan) -> list[set[str]]:
    """Names of the tensors that each partition has under their own names."""
    return [
        {tensor.name for layer in part.layers if layer.alias is None for tensor in layer.tensors}
        for part in plan.partitions
    ]
