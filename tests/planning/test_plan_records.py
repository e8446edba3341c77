"""The plan's digest, and the law that every byte of the source has a place."""

from collections.abc import Callable

import pytest

from mmsplit.checkpoint import Checkpoint
from mmsplit.errors import PlanError
from mmsplit.layers import Layer, LayerMap
from mmsplit.planning import Plan, PlanRequest, iter_stored, plan_checkpoint, units
from mmsplit.planning.plan import require_every_byte_accounted_for

MakeCheckpoint = Callable[..., Checkpoint]

TENSORS = {"model.embed_tokens.weight": 8, "empty": 0, "model.layers.0.a.weight": 4, "model.layers.1.a.weight": 4}
CONFIG = {"architectures": ["LlamaForCausalLM"]}


def plan(checkpoint: Checkpoint, **request: object) -> Plan:
    return plan_checkpoint(checkpoint, PlanRequest(**request))  # type: ignore[arg-type]


def test_digest_is_the_same_for_the_same_partitions(make_checkpoint: MakeCheckpoint) -> None:
    """However they were asked for, and from one release to the next: a resumed run goes by it."""
    checkpoint = make_checkpoint(TENSORS, CONFIG)
    cut = "model.layers.0"
    digest = plan(checkpoint, boundaries=[cut]).digest
    assert plan(checkpoint, boundaries=[cut], by="params", num_parts=2, weights=[5, 1]).digest == digest
    assert digest == "sha256:aa68ebfab4bab4eeb3a6e4b4758e080b30ce5fe30af7a83d8d4ace6b66bd6dd8"


def test_digest_differs_where_partitions_do(make_checkpoint: MakeCheckpoint) -> None:
    """Another cut, another number, another way with tied weights, another model."""
    checkpoint = make_checkpoint(TENSORS, CONFIG)
    cut = ["model.layers.0"]
    digests = [
        plan(checkpoint, boundaries=cut).digest,
        plan(checkpoint, boundaries=["model.layers.1"]).digest,
        plan(checkpoint, boundaries=[*cut, "model.layers.1"]).digest,
        plan(checkpoint, boundaries=cut, tied="reference").digest,
        plan(checkpoint, boundaries=cut, tied="colocate").digest,
        plan(checkpoint, num_parts=1).digest,
        plan(make_checkpoint({**TENSORS, "model.layers.1.b.weight": 0}, CONFIG), boundaries=cut).digest,
    ]
    assert len(set(digests)) == len(digests)


def test_stored_tensors_come_in_payload_order_without_references(make_checkpoint: MakeCheckpoint) -> None:
    """A copy is stored, a reference is not."""
    checkpoint = make_checkpoint(TENSORS, CONFIG)
    for tied, last in (("duplicate", "model.embed_tokens.weight"), ("reference", "empty")):
        *_, (layer, tensor) = iter_stored(plan(checkpoint, num_parts=2, tied=tied).partitions[1])
        assert tensor.name == last
        assert layer.stored


FORGED = {
    "tensor left out": (["model.embed_tokens.weight", "empty", "model.layers.0.a.weight"], "in no partition"),
    "empty tensor left out": ([name for name in TENSORS if name != "empty"], "in no partition"),
    "tensor twice": ([*TENSORS, "model.layers.0.a.weight"], "in two layers"),
}


@pytest.mark.parametrize(("names", "words"), FORGED.values(), ids=FORGED)
@pytest.mark.parametrize("num_parts", [1, 2])
def test_forged_layer_map_makes_no_plan(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, names: list[str], words: str, num_parts: int
) -> None:
    """A fault in the rules must not lose or double a tensor in silence, not even one without bytes."""
    forged = LayerMap(tuple(Layer(f"{i}", "other", None, None, (name,)) for i, name in enumerate(names)), ())
    monkeypatch.setattr(units, "build_layer_map", lambda *_: forged)
    with pytest.raises(PlanError, match=words) as caught:
        plan(make_checkpoint(TENSORS), num_parts=num_parts)
    assert caught.value.tensor is not None


def test_byte_that_no_tensor_covers_makes_no_plan(make_checkpoint: MakeCheckpoint) -> None:
    """A checkpoint whose records have a hole, a longer shard, or bytes that two tensors share."""
    checkpoint = make_checkpoint(TENSORS)
    sound = plan(checkpoint, num_parts=1).partitions
    name = "model.layers.0.a.weight"
    info = checkpoint.tensors[name]
    for change in ({"start_offset": info.start_offset + 1}, {"start_offset": info.start_offset - 1}):
        tensors = {**checkpoint.tensors, name: info._replace(**change)}
        with pytest.raises(PlanError, match=r"in no partition|without being tied"):
            require_every_byte_accounted_for(sound, checkpoint.shards, tensors)
        planned = tuple(
            layer._replace(tensors=tuple(tensors[tensor.name] for tensor in layer.tensors)) for layer in sound[0].layers
        )
        with pytest.raises(PlanError, match="has no place in the plan") as caught:
            require_every_byte_accounted_for([sound[0]._replace(layers=planned)], checkpoint.shards, tensors)
        assert caught.value.offset in (info.start_offset, info.start_offset - 1)
    shard = checkpoint.shards[0]
    longer = shard._replace(size_bytes=shard.size_bytes + 1)
    with pytest.raises(PlanError, match="has no place in the plan") as caught:
        require_every_byte_accounted_for(sound, [longer], checkpoint.tensors)
    assert caught.value.offset == shard.size_bytes


def test_layer_that_stores_nothing_and_refers_to_nothing_makes_no_plan(make_checkpoint: MakeCheckpoint) -> None:
    """Only a tied layer may do without bytes of its own."""
    checkpoint = make_checkpoint(TENSORS)
    (part,) = plan(checkpoint, num_parts=1).partitions
    layers = tuple(layer._replace(stored=False) for layer in part.layers)
    with pytest.raises(PlanError, match="stored nowhere"):
        require_every_byte_accounted_for([part._replace(layers=layers)], checkpoint.shards, checkpoint.tensors)
