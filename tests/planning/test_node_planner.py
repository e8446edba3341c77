"""A model on given machines: who gets what, what is said about it, and what is said when it does not fit."""

import json
from collections.abc import Callable
from fractions import Fraction

import pytest

from mmsplit.checkpoint import Checkpoint
from mmsplit.errors import PlanError
from mmsplit.planning import MemoryRequest, NodeList, NodeRequest, Plan, PlanRequest, boundaries_of, plan_for_nodes
from mmsplit.planning import plan_checkpoint as plan_by_parts
from mmsplit.planning.nodes import Node

MakeCheckpoint = Callable[..., Checkpoint]

#: Eight blocks of 200 bytes, an embedding of 100 and a norm of 2; without a head of its own in "tied".
BLOCKS = {f"model.layers.{i}.mlp.up_proj.weight": 100 for i in range(8)}
PLAIN = {"model.embed_tokens.weight": 50, **BLOCKS, "model.norm.weight": 1, "lm_head.weight": 50}
TIED = {name: size for name, size in PLAIN.items() if name != "lm_head.weight"}
CONFIG = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 8}


def node(name: str, usable_bytes: int, **fields: object) -> Node:
    """A node with 10 bytes in reserve."""
    return Node(name, usable_bytes + 10, 10)._replace(**fields)  # type: ignore[arg-type]


def request(*nodes: Node, order: str = "file", **fields: object) -> NodeRequest:
    return NodeRequest(nodes=NodeList(nodes, order), **fields)  # type: ignore[arg-type]


def blocks(plan: Plan) -> list[tuple[str | None, int]]:
    """Nodes of the partitions, and how many layers each has."""
    return [(part.node, len(part.layers)) for part in plan.partitions]


def test_the_most_goes_to_whom_it_fits(make_checkpoint: MakeCheckpoint) -> None:
    """Fills come out even, and the bottleneck and its distance from a perfect split are said."""
    plan = plan_for_nodes(make_checkpoint(PLAIN, CONFIG), request(node("big", 1200), node("small", 800)))
    assert blocks(plan) == [("big", 6), ("small", 5)]
    placement = plan.placement
    assert placement is not None
    assert [n.needs.total_bytes for n in placement.nodes] == [1100, 702]
    assert [n.fill for n in placement.nodes] == [1100 / 1200, 702 / 800]
    assert (placement.objective, placement.bottleneck) == ("memory", "big")
    assert placement.excess == pytest.approx(1100 / 1200 / (1802 / 2000) - 1)
    assert (plan.balance.by, plan.balance.loads, plan.balance.bottleneck) == ("memory", (1100, 702), 0)


def test_a_copy_of_a_tied_weight_counts(make_checkpoint: MakeCheckpoint) -> None:
    """In the last partition that needs it, weight and training state; nowhere if it is only referred to."""
    checkpoint = make_checkpoint(TIED, CONFIG)
    nodes = (node("a", 1000), node("b", 1000))
    for tied, last in (("duplicate", 902), ("reference", 802)):
        plan = plan_for_nodes(checkpoint, request(*nodes), tied=tied)  # type: ignore[arg-type]
        assert plan.placement is not None
        assert [n.needs.weights_bytes for n in plan.placement.nodes] == [900, last]
        assert [part.total_bytes for part in plan.partitions] == [900, last]
    larger = (node("a", 10_000), node("b", 10_000))
    plan = plan_for_nodes(checkpoint, request(*larger, memory=MemoryRequest(training="adamw")))
    assert plan.placement is not None
    assert [n.needs.training_bytes for n in plan.placement.nodes] == [900 * 7, 902 * 7]
    moved = plan_for_nodes(checkpoint, request(*nodes), tied="colocate")
    assert moved.placement is not None
    assert [n.needs.weights_bytes for n in moved.placement.nodes] == [part.total_bytes for part in moved.partitions]
    assert sum(part.total_bytes for part in moved.partitions) == checkpoint.total_bytes


def test_speed_is_bounded_by_memory(make_checkpoint: MakeCheckpoint) -> None:
    """The slowest stage is as fast as it can be; the fast node takes what fits, and its disk counts."""
    checkpoint = make_checkpoint(PLAIN, CONFIG)

    def planned(**fields: object) -> Plan:
        fast = node("fast", 2000, speed=Fraction(3))._replace(**fields)  # type: ignore[arg-type]
        return plan_for_nodes(checkpoint, request(fast, node("slow", 2000, speed=Fraction(1)), objective="speed"))

    assert blocks(planned()) == [("fast", 8), ("slow", 3)]
    assert blocks(planned(memory_bytes=710)) == [("fast", 4), ("slow", 7)]
    assert blocks(planned(disk_bytes=300)) == [("fast", 2), ("slow", 9)]
    placement = planned().placement
    assert placement is not None
    assert placement.excess == pytest.approx(1500 / 3 / (1802 / 4) - 1)


def test_shares_are_wishes_within_the_memory(make_checkpoint: MakeCheckpoint) -> None:
    """They are the objective where the nodes have them, in what `by` counts; 0 is nothing."""
    checkpoint = make_checkpoint(PLAIN, CONFIG)
    nodes = [node(name, 3000, share=Fraction(share)) for name, share in (("a", 1), ("b", 0), ("c", 3))]
    plan = plan_for_nodes(checkpoint, request(*nodes), by="layers")
    assert blocks(plan) == [("a", 3), ("c", 8)]
    assert plan.placement is not None
    assert (plan.placement.objective, plan.placement.excess) == ("share", 0)
    assert [n.part_id for n in plan.placement.nodes] == [0, None, 1]
    by_memory = plan_for_nodes(checkpoint, request(*nodes, objective="memory"))
    assert by_memory.num_parts == 3


def test_unused_nodes_are_said(make_checkpoint: MakeCheckpoint) -> None:
    """Partitions are numbered over the nodes that get something."""
    plan = plan_for_nodes(make_checkpoint(PLAIN, CONFIG), request(node("a", 1500), node("tiny", 50), node("b", 1500)))
    assert [(part.part_id, part.node) for part in plan.partitions] == [(0, "a"), (1, "b")]
    assert any(note.startswith("nothing for tiny: there are 2 partitions") for note in plan.notes)


def test_any_order_finds_the_best(make_checkpoint: MakeCheckpoint) -> None:
    """A head that fits on one node only decides who stands last."""
    checkpoint = make_checkpoint({**PLAIN, "lm_head.weight": 600}, CONFIG)
    big, small = node("big", 1950), node("small", 1150)
    with pytest.raises(PlanError, match=r"It fits with the nodes in another order"):
        plan_for_nodes(checkpoint, request(big, small))
    plan = plan_for_nodes(checkpoint, request(big, small, order="any"))
    assert [part.node for part in plan.partitions] == ["small", "big"]
    assert any("best order of the nodes is small, big" in note for note in plan.notes)
    kept = plan_for_nodes(checkpoint, request(small, big, order="any"))
    assert kept.partitions == plan.partitions
    assert not any("best order" in note for note in kept.notes)


def test_boundaries_give_the_plan_again(make_checkpoint: MakeCheckpoint) -> None:
    """So that a split by them has the same partitions, tied weights and moved layers included."""
    nodes = (node("a", 700), node("b", 10), node("c", 1500), node("d", 400))
    for tensors in (PLAIN, TIED):
        checkpoint = make_checkpoint(tensors, CONFIG)
        for tied in ("duplicate", "reference", "colocate"):
            plan = plan_for_nodes(checkpoint, request(*nodes), tied=tied)  # type: ignore[arg-type]
            again = plan_by_parts(checkpoint, PlanRequest(boundaries=boundaries_of(plan), tied=tied))  # type: ignore[arg-type]
            assert again.digest == plan.digest
            assert plan.num_parts > 1
    alone = plan_for_nodes(checkpoint, request(node("a", 9000)))
    assert (boundaries_of(alone), alone.num_parts) == ((), 1)


def test_json_says_it_all(make_checkpoint: MakeCheckpoint) -> None:
    """Nodes in pipeline order with needs and fill, the request, and the node of each partition."""
    memory = MemoryRequest(context=100)
    plan = plan_for_nodes(make_checkpoint(PLAIN, CONFIG), request(node("a", 3000), node("b", 1), memory=memory))
    found = json.loads(json.dumps(plan.as_json()))
    assert [part["node"] for part in found["partitions"]] == ["a"]
    placement = found["placement"]
    assert (placement["context"], placement["batch"], placement["kv_dtype"]) == (100, 1, "BF16")
    assert (placement["objective"], placement["order"], placement["bottleneck"]) == ("memory", "file", "a")
    first, second = placement["nodes"]
    assert first["needs"] == {
        "weights_bytes": 1802,
        "cache_bytes": 0,
        "training_bytes": 0,
        "activation_bytes": 0,
        "total_bytes": 1802,
    }
    assert (first["usable_bytes"], first["reserve_bytes"], first["fill"]) == (3000, 10, 1802 / 3000)
    assert (second["name"], second["part_id"], second["fill"]) == ("b", None, 0)


# ------------------------------------------------------------------------------------------------ what cannot be


ATTENTION = {
    f"model.layers.{i}.self_attn.{part}.weight": [10, 10] for i in range(4) for part in ("q_proj", "k_proj", "v_proj")
}


@pytest.fixture
def attentive(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    """Four blocks of 600 bytes that cache 40 bytes per token each."""
    checkpoint = make_checkpoint(dict.fromkeys(ATTENTION, 100), CONFIG)
    for name, shape in ATTENTION.items():
        checkpoint.tensors[name] = checkpoint.tensors[name]._replace(shape=tuple(shape))
    return checkpoint


def refusal(checkpoint: Checkpoint, *nodes: Node, **fields: object) -> str:
    with pytest.raises(PlanError) as caught:
        plan_for_nodes(checkpoint, request(*nodes, **fields))  # type: ignore[arg-type]
    return str(caught.value)


def test_what_is_wanting_and_what_would_fit(attentive: Checkpoint) -> None:
    """In bytes, in all and on one node; each change named would do, and the largest of its kind."""
    nodes = (node("a", 3000), node("b", 3000))
    memory = MemoryRequest(context=30, batch=2)  # 4 x (600 + 2 x 30 x 40)
    said = refusal(attentive, *nodes, memory=memory)
    assert "model does not fit on these 2 nodes" in said
    assert f"expected room for {12_000 / 1024:.1f} KiB: weights 2.34 KiB, KV cache 9.38 KiB" in said
    assert "found 5.86 KiB usable (20 B are kept in reserve)" in said
    assert "It needs 5.86 KiB more, on node 'a'. " in said
    assert "It fits with a context of 11 tokens. " in said  # 2 x (600 + 2 x 11 x 40) = 2,960
    assert "As it is, the first 2 of 4 layers fit, to model.layers.1." in said
    for context, fits in ((11, True), (12, False)):
        try:
            plan_for_nodes(attentive, request(*nodes, memory=MemoryRequest(context=context, batch=2)))
        except PlanError:
            assert not fits
        else:
            assert fits


def test_wanting_on_two_nodes_is_less_than_on_one(attentive: Checkpoint) -> None:
    """Blocks are not cut: two nodes of 1,700 bytes want 300 each for four blocks of 1,000, one alone 1,300."""
    said = refusal(attentive, node("a", 1700), node("b", 1700), memory=MemoryRequest(context=10))
    assert "It needs 600 B more in all, or 1.27 KiB more on node 'a' alone." in said


def test_batch_dtype_and_reserve_are_offered(attentive: Checkpoint) -> None:
    """Only those that do, each alone."""
    memory = MemoryRequest(context=10, batch=3)  # 4 x (600 + 3 x 400) = 7,200
    assert "with a batch of 2;" in refusal(attentive, node("a", 5600), memory=memory)
    assert "with a KV cache in F8_E4M3" in refusal(attentive, node("a", 4800), memory=memory)
    assert "with a KV cache" not in refusal(attentive, node("a", 4799), memory=memory)
    assert "with nothing in reserve" in refusal(attentive, node("a", 7190), memory=memory)
    assert "with nothing in reserve" not in refusal(attentive, node("a", 7189), memory=memory)


def test_lighter_training_is_offered(attentive: Checkpoint) -> None:
    """2,400 bytes of weights: AdamW adds 14 a parameter, SGD 10, LoRA of rank 1 320 a matrix."""
    memory = MemoryRequest(training="adamw", lora_rank=1)
    assert "It fits with training by sgd; or with training by lora." in refusal(
        attentive, node("a", 14_400), memory=memory
    )
    assert "It fits with training by lora." in refusal(attentive, node("a", 6240), memory=memory)
    assert "with training by" not in refusal(attentive, node("a", 6239), memory=memory)


def test_nothing_fits(attentive: Checkpoint) -> None:
    """Then only the size of the hole is said, and how far one gets."""
    said = refusal(attentive, node("a", 700), node("b", 599), node("c", 650))
    assert "No smaller context, batch or reserve fits" in said
    assert "the first 2 of 4 layers fit, to model.layers.1" in said
    assert "Not even the first of its 4 layers fits" in refusal(attentive, node("a", 5))


def test_disks_are_blamed_where_they_are_to_blame(attentive: Checkpoint) -> None:
    """A node's partition must lie on its disk, too."""
    said = refusal(attentive, node("a", 9000, disk_bytes=600), node("b", 9000, disk_bytes=1799))
    assert "the disks do not hold the partitions" in said
    assert "'a' 600 B, 'b' 1.76 KiB" in said
    fine = plan_for_nodes(attentive, request(node("a", 9000, disk_bytes=600), node("b", 9000, disk_bytes=1800)))
    assert blocks(fine) == [("a", 1), ("b", 3)]


def test_impossible_requests(make_checkpoint: MakeCheckpoint) -> None:
    """They name the node and the field, or what is possible."""
    checkpoint = make_checkpoint(PLAIN, CONFIG)
    assert "node 'b', field 'speed' is missing" in refusal(
        checkpoint, node("a", 9000, speed=Fraction(1)), node("b", 9000), objective="speed"
    )
    assert "node 'b', field 'share' is missing" in refusal(checkpoint, node("a", 9, share=Fraction(1)), node("b", 9))
    assert "expected a share above 0" in refusal(checkpoint, node("a", 9000, share=Fraction(0)))
    assert "no such objective" in refusal(checkpoint, node("a", 9000), objective="best")
    many = [node(str(i), 1000 + i) for i in range(14)]
    assert "at most 10,000 different sets" in refusal(checkpoint, *many, order="any")
    twins = [node(str(i), 1000) for i in range(200)]
    assert plan_for_nodes(checkpoint, request(*twins, order="any")).num_parts > 1
    assert "no tensors" in refusal(make_checkpoint({}, CONFIG), node("a", 9))
    with pytest.raises(PlanError, match="cannot balance by"):
        plan_for_nodes(checkpoint, request(node("a", 9000)), by="weight")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="no such way to treat tied"):
        plan_for_nodes(checkpoint, request(node("a", 9000)), tied="never")  # type: ignore[arg-type]
