"""What a partition has to show: views as tensors of their own, tied heads, hidden tensors never."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from mmsplit.checkpoint import TensorInfo, TensorView
from mmsplit.exporting.tensor import ExportPartition, notes_on_ties, partition_of, state_dict_of

BASE = TensorInfo("wte", "F32", (4, 6), "a.bin", 100, 196, 24)
HIDDEN = TensorInfo("x[storage]", "U8", (32,), "a.bin", 196, 228, 32, hidden=True)
HEAD = TensorView("head.weight", "wte", "F32", (4, 6), (6, 1), 0)


class PlacedLayer(NamedTuple):
    """A layer as plans and manifests have it."""

    layer_type: str
    tensors: tuple[TensorInfo, ...] = (BASE,)
    alias: str | None = None
    tied_to: int | None = None
    stored: bool = True
    views: tuple[TensorView, ...] = ()


EMBEDDING = PlacedLayer("embedding")


def tied(view: TensorView = HEAD, *, tied_to: int = 0, stored: bool, layer_type: str = "head") -> PlacedLayer:
    """A layer that is nothing but a view of the embedding."""
    return PlacedLayer(layer_type, (BASE,), view.name, tied_to, stored, (view,))


def names(partition: ExportPartition) -> list[str]:
    return [tensor.name for tensor in partition.tensors]


def test_views_are_tensors_and_hidden_ones_are_none() -> None:
    """Each with a size of its own; the bytes lie in the tensor that is not shown."""
    seen = (
        TensorView("t", "x[storage]", "F16", (3, 2), (1, 3), 4),
        TensorView("wide", "x[storage]", "F16", (5, 2), (0, 1), 0),
    )
    partition = partition_of(3, [PlacedLayer("mlp", (BASE, HIDDEN), views=seen)])
    assert names(partition) == ["wte", "t", "wide"]
    assert [tensor.size_bytes for tensor in partition.tensors] == [96, 12, 20]
    assert [tensor.stored_name for tensor in partition.tensors] == ["wte", "x[storage]", "x[storage]"]


@pytest.mark.parametrize(("restored", "shown"), [(True, ["wte"]), (False, ["wte", "head.weight"])])
def test_a_tied_head_goes_where_its_loader_looks(restored: bool, shown: list[str]) -> None:
    """Under the embedding's name where config.json says that it is tied, also where it is alone; else under its own."""
    whole = partition_of(0, [EMBEDDING, tied(stored=False)])
    tensors, aliases = state_dict_of([whole], ties_restored=restored)
    assert [tensor.name for tensor in tensors] == shown
    assert aliases == ({"head.weight": "wte"} if restored else {})
    alone = partition_of(1, [tied(stored=True)])
    (tensor,), _ = state_dict_of([alone], ties_restored=restored)
    assert tensor.name == shown[-1]
    both, _ = state_dict_of([partition_of(0, [EMBEDDING]), alone], ties_restored=restored)
    assert [tensor.name for tensor in both] == shown


@pytest.mark.parametrize(
    "layer",
    [
        tied(HEAD._replace(shape=(6, 4), stride=(1, 6)), stored=True),
        tied(HEAD._replace(shape=(2, 6)), stored=True),
        tied(HEAD._replace(offset_bytes=24, shape=(3, 6)), stored=True),
        tied(HEAD._replace(stride=(0, 1)), stored=True),
        tied(HEAD._replace(dtype="I32"), stored=True),
        tied(HEAD._replace(shape=(24,), stride=(1,)), stored=True),
        tied(HEAD._replace(name="head.bias"), stored=True),
        tied(stored=True, layer_type="attention"),
        PlacedLayer("head", (BASE,), views=(HEAD,)),
        PlacedLayer("head", (BASE._replace(hidden=True),), "head.weight", 0, True, (HEAD,)),
    ],
)
def test_any_other_view_is_written(layer: PlacedLayer) -> None:
    """Transposed, sliced, expanded, of another dtype or shape, no head, nothing to be tied to: no loader makes it."""
    tensors, aliases = state_dict_of([partition_of(1, [layer])], ties_restored=True)
    assert layer.views[0].name in [tensor.name for tensor in tensors]
    assert aliases == {}


def test_bytes_of_another_partition() -> None:
    """Where that one is exported, too, the tensor is; else a note says what is missing."""
    first, second = partition_of(0, [EMBEDDING]), partition_of(1, [tied(stored=False)])
    assert (names(second), [tensor.name for tensor in second.elsewhere]) == ([], ["head.weight"])
    tensors, _ = state_dict_of([first, second], ties_restored=False)
    assert [(tensor.name, tensor.part_id) for tensor in tensors] == [("wte", 0), ("head.weight", 0)]
    assert notes_on_ties([first, second]) == ()
    assert state_dict_of([second], ties_restored=False) == ((), {})
    (note,) = notes_on_ties([second])
    assert "head.weight is wte" in note
