"""`--split-by type`: one partition for each kind of thing that tensors do.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmsplit.checkpoint import TensorInfo
from mmsplit.layers import Layer
from mmsplit.layers.kinds import KINDS, sort_by_kind
from mmsplit.planning.sublayers import Cut, Placed, common_module, sublayer
from mmsplit.planning.ties import Tie


def cut_by_type(layers: Sequence[Layer], tensors: Mapping[str, TensorInfo]) -> Cut:
    """Give each kind that there is a partition of its own, in the order of `KINDS`.

    A head that is tied to the embedding, and is the only one, stays with the embedding: there is nothing else in it.
    """
    sorted_layers = [
        sort_by_kind(layer, {name: len(tensors[name].shape) for name in layer.tensors}) for layer in layers
    ]
    kinds = [kind for kind in KINDS if any(kind in found for found in sorted_layers)]
    part_of = {kind: part_id for part_id, kind in enumerate(kinds)}

    def place(layer: Layer, kind: str, names: Sequence[str]) -> Placed:
        module = common_module(name.rpartition(".")[0] for name in names)
        return Placed(part_of[kind], sublayer(layer, kind, module, (tensors[name] for name in names)))

    def of_tie(tie: Tie) -> int | None:
        if tie.layer.layer_type in part_of:
            return part_of[tie.layer.layer_type]
        # A weight that several blocks share: the name that the block has for it says what it does there.
        named = Layer("", "other", None, None, (tie.alias,))
        (kind,) = sort_by_kind(named, {tie.alias: len(tensors[tie.tensor].shape)})
        return part_of.get(kind)

    placed = tuple(
        tuple(place(layer, kind, names) for kind, names in found.items())
        for layer, found in zip(layers, sorted_layers, strict=True)
    )
    return Cut(placed, tuple(kinds), of_tie)
