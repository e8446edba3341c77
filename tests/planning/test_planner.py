"""From a request to a plan: what is possible, what is not, and what is said about it."""

import json
from collections.abc import Callable
from fractions import Fraction

import pytest

from mmsplit.checkpoint import Checkpoint
from mmsplit.errors import PlanError
from mmsplit.planning import Plan, PlanRequest, checkpoint_layers, plan_checkpoint

MakeCheckpoint = Callable[..., Checkpoint]

#: Four blocks of 10 elements, an embedding of 30, a norm of 1; BF16, so twice as many bytes.
BLOCKS = {f"model.layers.{i}.mlp.up_proj.weight": 10 for i in range(4)}
TIED = {"model.embed_tokens.weight": 30, **BLOCKS, "model.norm.weight": 1}
UNTIED = {**TIED, "lm_head.weight": 30}
CONFIG = {"architectures": ["LlamaForCausalLM"]}


def layers(plan: Plan) -> list[list[str]]:
    return [[layer.name.removeprefix("model.") for layer in part.layers] for part in plan.partitions]


def test_plan_is_the_optimum_in_forward_order(make_checkpoint: MakeCheckpoint) -> None:
    """By bytes, by elements, by blocks; the bottleneck and how far it is from a perfect split."""
    checkpoint = make_checkpoint(UNTIED, CONFIG)
    plan = plan_checkpoint(checkpoint, PlanRequest(num_parts=2))
    assert layers(plan) == [
        ["embed_tokens", "layers.0", "layers.1"],
        ["layers.2", "layers.3", "norm", "lm_head"],
    ]
    assert plan.balance.loads == (100, 102)
    assert (plan.balance.bottleneck, plan.balance.by) == (1, "bytes")
    assert plan.balance.excess == pytest.approx(102 / 101 - 1)
    by_params = plan_checkpoint(checkpoint, PlanRequest(num_parts=2, by="params"))
    assert (layers(by_params), by_params.balance.loads) == (layers(plan), (50, 51))
    by_layers = plan_checkpoint(checkpoint, PlanRequest(num_parts=4, by="layers"))
    assert by_layers.balance.loads == (1, 1, 1, 1)
    assert by_layers.balance.excess == 0
    assert [part.total_bytes for part in plan.partitions] == [100, 102]
    assert [part.total_params for part in plan.partitions] == [50, 51]


@pytest.mark.parametrize("num_parts", range(1, 8))
def test_every_possible_number_of_partitions(make_checkpoint: MakeCheckpoint, num_parts: int) -> None:
    """From one to as many as there are layers; each layer once, in order, and all bytes."""
    checkpoint = make_checkpoint(UNTIED, CONFIG)
    plan = plan_checkpoint(checkpoint, PlanRequest(num_parts=num_parts))
    assert plan.num_parts == num_parts
    assert all(part.layers for part in plan.partitions)
    assert [layer for part in plan.partitions for layer in part.layers] == list(checkpoint_layers(checkpoint)[0])
    assert sum(part.total_bytes for part in plan.partitions) == checkpoint.total_bytes


def test_weights_are_shares(make_checkpoint: MakeCheckpoint) -> None:
    """In any spelling of a number, floats by their decimal digits."""
    checkpoint = make_checkpoint(BLOCKS | {f"model.layers.{i}.mlp.up_proj.weight": 10 for i in (4, 5)}, {})
    plans = [
        plan_checkpoint(checkpoint, PlanRequest(weights=weights))
        for weights in ([3, 2, 1], ["3", "2.0", "1e0"], [0.3, 0.2, 0.1], ["3/6", "1/3", Fraction(1, 6)])
    ]
    assert all(
        layers(plan) == [["layers.0", "layers.1", "layers.2"], ["layers.3", "layers.4"], ["layers.5"]] for plan in plans
    )
    assert all(plan.balance.excess == 0 for plan in plans)
    assert plans[2].balance.weights == (0.3, 0.2, 0.1)


def test_boundaries_are_followed(make_checkpoint: MakeCheckpoint) -> None:
    """Even where another cut would be better; with weights the balance is judged by them."""
    checkpoint = make_checkpoint(UNTIED, CONFIG)
    plan = plan_checkpoint(
        checkpoint, PlanRequest(boundaries=["model.layers.0", "lm_head"], weights=[1, 1, 1], num_parts=3)
    )
    assert [part[0] for part in layers(plan)] == ["embed_tokens", "layers.0", "lm_head"]
    assert plan.balance.bottleneck == 1
    assert plan_checkpoint(checkpoint, PlanRequest(boundaries=[])).num_parts == 1


IMPOSSIBLE = {
    "nothing said": ({}, "into how many partitions.*1 to 7"),
    "zero": ({"num_parts": 0}, "0 is no possible number.*1 to 7"),
    "negative": ({"num_parts": -3}, "-3 is no possible number"),
    "more than layers": ({"num_parts": 8}, "8 is no possible number.*there are 7.*1 to 7 partitions"),
    "half a partition": ({"num_parts": 2.5}, "2.5 is no possible number"),
    "text": ({"num_parts": "2"}, "'2' is no possible number"),
    "true": ({"num_parts": True}, "True is no possible number"),
    "very many": ({"num_parts": 10**9}, "no possible number"),
    "no weights": ({"weights": []}, "0 is no possible number"),
    "counts disagree": ({"num_parts": 2, "weights": [1, 1, 1]}, r"--num-parts \(num_parts\) says 2, --weights says 3"),
    "three counts disagree": (
        {"num_parts": 2, "weights": [1, 1], "boundaries": ["model.layers.1", "model.layers.2"]},
        r"--num-parts \(num_parts\) says 2, --weights says 2, --boundaries says 3",
    ),
    "unknown by": ({"num_parts": 2, "by": "flops"}, "cannot balance by 'flops'.*bytes, params, layers"),
    "unknown tied": ({"num_parts": 2, "tied": "copy"}, "'copy'.*duplicate, reference, colocate"),
    "weight zero": ({"weights": [1, 0]}, "weight '0' is not a positive number"),
    "weight negative": ({"weights": ["1", "-2"]}, "weight '-2'"),
    "weight no number": ({"weights": ["1", "much"]}, "weight 'much'.*3,2,1"),
    "weight empty": ({"weights": ["1", ""]}, "weight ''"),
    "weight nan": ({"weights": [1, float("nan")]}, "weight 'nan'"),
    "weight inf": ({"weights": [1, float("inf")]}, "weight 'inf'"),
    "weight over zero": ({"weights": [1, "1/0"]}, "weight '1/0'"),
    "weight beyond reason": ({"weights": [1, 10**10]}, "weight '10000000000'"),
    "weight of a digit too many": ({"weights": [1, "0.0000000001"]}, "weight '0.0000000001'"),
    "weight that would fill the memory": ({"weights": [1, "1e999999999"]}, "weight '1e999999999'"),
    "weight that would fill the memory below": ({"weights": [1, "1e-999999999"]}, "weight '1e-999999999'"),
    "boundary unknown": ({"boundaries": ["model.layers.9"]}, "'model.layers.9'. Close are model.layers"),
    "boundary unlike any": ({"boundaries": ["?"]}, "Layers run from model.embed_tokens to lm_head"),
    "boundary twice": ({"boundaries": ["model.layers.1"] * 2}, "does not come after 'model.layers.1'"),
    "boundaries backwards": (
        {"boundaries": ["model.layers.2", "model.layers.1"]},
        "'model.layers.1' does not come after 'model.layers.2'",
    ),
    "boundary at the first layer": ({"boundaries": ["model.embed_tokens"]}, "does not come after"),
}


@pytest.mark.parametrize(("request_", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_request_says_what_is_possible(
    make_checkpoint: MakeCheckpoint, request_: dict[str, object], words: str
) -> None:
    """A `PlanError`, whose exit code is that of usage."""
    checkpoint = make_checkpoint(UNTIED, CONFIG)
    with pytest.raises(PlanError, match=words) as caught:
        plan_checkpoint(checkpoint, PlanRequest(**request_))  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


def test_checkpoint_without_tensors_has_no_plan(make_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(PlanError, match="no tensors"):
        plan_checkpoint(make_checkpoint({}), PlanRequest(num_parts=1))


def ties_of(plan: Plan) -> list[tuple[int, str, str | None, int | None, bool]]:
    return [
        (part.part_id, layer.name, layer.alias, layer.tied_to, layer.stored)
        for part in plan.partitions
        for layer in part.layers
        if layer.alias is not None
    ]


def test_tied_weight_is_copied_where_it_is_needed(make_checkpoint: MakeCheckpoint) -> None:
    """The default: the copy weighs, is recorded as one, and a note says so."""
    checkpoint = make_checkpoint(TIED, CONFIG)
    plan = plan_checkpoint(checkpoint, PlanRequest(num_parts=2))
    assert layers(plan) == [["embed_tokens", "layers.0", "layers.1"], ["layers.2", "layers.3", "norm", "lm_head"]]
    assert ties_of(plan) == [(1, "lm_head", "lm_head.weight", 0, True)]
    assert plan.balance.loads == (100, 102)
    assert [part.total_bytes for part in plan.partitions] == [100, 102]
    assert plan.notes == (
        "partition 1 gets its own copy of model.embed_tokens.weight (60 bytes), which serves there as lm_head.weight",
    )


def test_tied_weight_in_its_own_partition_is_not_copied(make_checkpoint: MakeCheckpoint) -> None:
    """One partition: nothing to copy, nothing to say."""
    for tied in ("duplicate", "reference", "colocate"):
        plan = plan_checkpoint(make_checkpoint(TIED, CONFIG), PlanRequest(num_parts=1, tied=tied))
        assert ties_of(plan) == [(0, "lm_head", "lm_head.weight", 0, False)]
        assert plan.partitions[0].total_bytes == 142
        assert plan.balance.loads == (142,)
        assert plan.notes == ()


def test_tied_weight_may_be_referred_to(make_checkpoint: MakeCheckpoint) -> None:
    """No bytes, no weight, and a note that says from where it is needed."""
    plan = plan_checkpoint(make_checkpoint(TIED, CONFIG), PlanRequest(num_parts=2, tied="reference"))
    assert ties_of(plan) == [(1, "lm_head", "lm_head.weight", 0, False)]
    assert sum(part.total_bytes for part in plan.partitions) == 142
    assert plan.balance.loads == (80, 62)
    assert plan.notes == ("partition 1 needs model.embed_tokens.weight as lm_head.weight from partition 0",)


def test_users_of_a_tied_weight_may_move_to_it(make_checkpoint: MakeCheckpoint) -> None:
    """The head, and the norm before it, lie in the embedding's partition, and weigh there."""
    plan = plan_checkpoint(make_checkpoint(TIED, CONFIG), PlanRequest(num_parts=2, tied="colocate"))
    assert layers(plan) == [["embed_tokens", "norm", "lm_head"], [f"layers.{i}" for i in range(4)]]
    assert ties_of(plan) == [(0, "lm_head", "lm_head.weight", 0, False)]
    assert plan.balance.loads == (62, 80)
    assert [layer.name for layer in plan.partitions[0].layers if layer.moved] == ["model.norm", "lm_head"]
    assert plan.notes == ("model.norm, lm_head moved to partition 0, which has the tied weight",)


def test_tied_weight_of_a_decoder_is_copied_once_per_partition(make_checkpoint: MakeCheckpoint) -> None:
    """T5: the decoder's embedding and the head share one copy where they share a partition."""
    tensors = {"shared.weight": 30} | {
        f"{stack}.block.{i}.layer.0.SelfAttention.q.weight": 10 for stack in ("encoder", "decoder") for i in range(2)
    }
    checkpoint = make_checkpoint(tensors, {"architectures": ["T5ForConditionalGeneration"]})
    together = plan_checkpoint(checkpoint, PlanRequest(boundaries=["decoder.embed_tokens"]))
    assert [tie[1:] for tie in ties_of(together)] == [
        ("decoder.embed_tokens", "decoder.embed_tokens.weight", 0, True),
        ("lm_head", "lm_head.weight", 0, False),
    ]
    assert together.balance.loads == (100, 100) == tuple(part.total_bytes for part in together.partitions)
    apart = plan_checkpoint(checkpoint, PlanRequest(boundaries=["decoder.embed_tokens", "decoder.block.1"]))
    assert [tie[-1] for tie in ties_of(apart)] == [True, True]
    assert apart.balance.loads == (100, 80, 80) == tuple(part.total_bytes for part in apart.partitions)


@pytest.mark.parametrize("tied", ["duplicate", "reference", "colocate"])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
def test_loads_are_the_bytes_of_the_partitions(make_checkpoint: MakeCheckpoint, tied: str, num_parts: int) -> None:
    """What was weighed is what is stored, in every mode."""
    plan = plan_checkpoint(make_checkpoint(TIED, CONFIG), PlanRequest(num_parts=num_parts, tied=tied))  # type: ignore[arg-type]
    assert plan.balance.loads == tuple(part.total_bytes for part in plan.partitions)
    assert plan_checkpoint(
        make_checkpoint(TIED, CONFIG),
        PlanRequest(num_parts=num_parts, tied=tied, by="params"),  # type: ignore[arg-type]
    ).balance.loads == tuple(part.total_params for part in plan.partitions)


def test_json_is_the_contract(make_checkpoint: MakeCheckpoint) -> None:
    """Names others build on, and nothing that JSON cannot hold."""
    plan = plan_checkpoint(make_checkpoint(TIED, CONFIG), PlanRequest(num_parts=2))
    shown = json.loads(json.dumps(plan.as_json(), allow_nan=False))
    assert shown["num_parts"] == 2
    assert shown["notes"] == list(plan.notes)
    first, second = shown["partitions"]
    assert first["part_id"] == 0
    assert first["layers"][1] == {
        "name": "model.layers.0",
        "layer_type": "block",
        "tensors": ["model.layers.0.mlp.up_proj.weight"],
        "total_params": 10,
        "total_bytes": 20,
    }
    assert (first["total_params"], first["total_bytes"]) == (50, 100)
    assert second["layers"][-1] == {
        "name": "lm_head",
        "layer_type": "head",
        "tensors": ["model.embed_tokens.weight"],
        "total_params": 30,
        "total_bytes": 60,
        "alias": "lm_head.weight",
        "tied_to": 0,
        "stored": True,
    }
