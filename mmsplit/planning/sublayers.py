"""Partitions made of parts of layers: what all cuts other than the one by layer have in common.  Pure.

A cut says of each layer which partition gets which of its tensors, or rows of them.  Here these become partitions with
their layers in forward order, and tied weights find the partition that uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from mmsplit.checkpoint import Checkpoint, TensorInfo
from mmsplit.errors import PlanError
from mmsplit.layers import Layer
from mmsplit.planning.plan import PlannedLayer, PlannedPartition
from mmsplit.planning.ties import Tie
from mmsplit.planning.units import Unit

_NAMES_SHOWN: Final = 3


class Placed(NamedTuple):
    """A layer, or what one partition holds of it, and that partition."""

    part_id: int
    layer: PlannedLayer


class Cut(NamedTuple):
    """What each layer is divided into, in forward order; one list per layer that has tensors.

    `labels` has a name for each partition, or None.  `of_tie` says which partition uses a tied weight; None: the one
    that has it.
    """

    placed: tuple[tuple[Placed, ...], ...]
    labels: tuple[str | None, ...]
    of_tie: Callable[[Tie], int | None]


def sublayer(layer: Layer, layer_type: str, module: str, tensors: Iterable[TensorInfo]) -> PlannedLayer:
    """Return some tensors of a layer as a layer; those of a block are named after the `module` they are in."""
    is_inside = layer.stack is not None and module.startswith(f"{layer.name}.")
    name = module if is_inside else layer.name
    return PlannedLayer(name, layer_type, layer.stack, layer.block_index, tuple(tensors))


def common_module(modules: Iterable[str]) -> str:
    """Return the innermost module that all of these are, or are in."""
    common: list[str] | None = None
    for module in modules:
        parts = module.split(".")
        if common is None:
            common = parts
        elif common != parts:
            same = next((i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), None)
            common = common[: min(len(common), len(parts)) if same is None else same]
    return ".".join(common or ())


def lay_out(cut: Cut, units: Sequence[Unit], checkpoint: Checkpoint, tied: str) -> list[PlannedPartition]:
    """Return the partitions of a cut, each with its layers in forward order, those that are tied included.

    A name that sees another tensor's bytes goes with that tensor; a layer of its own that uses it is tied.  Raises
    `PlanError` for a partition that would be empty, and for a tensor that is sliced while other names see it.
    """
    home = {tensor.name: part_id for placed in cut.placed for part_id, layer in placed for tensor in layer.tensors}
    _require_unseen_slices(cut, units)
    layers: list[list[PlannedLayer]] = [[] for _ in cut.labels]
    copied: set[tuple[int, str]] = set()
    divided = iter(cut.placed)
    for unit in units:
        for part_id, layer in next(divided) if unit.layer.tensors else ():
            stored = {tensor.name for tensor in layer.tensors} if unit.views else ()
            layers[part_id].append(layer._replace(views=tuple(view for view in unit.views if view.base in stored)))
        for tie in unit.uses:
            part_id, layer = _tied(tie, home[tie.tensor], cut, checkpoint, tied, copied)
            layers[part_id].append(layer)
    for part_id, found in enumerate(layers):
        if not found:
            raise PlanError(
                f"partition {part_id} would be empty", expected=f"something for each of 0 to {len(layers) - 1}"
            )
    return [
        PlannedPartition(part_id, tuple(found), label=label)
        for part_id, (found, label) in enumerate(zip(layers, cut.labels, strict=True))
    ]


def _require_unseen_slices(cut: Cut, units: Sequence[Unit]) -> None:
    """Raise `PlanError` for a tensor that lies in slices while another name is for bytes of it."""
    sliced = {tensor.name for placed in cut.placed for _, layer in placed for tensor in layer.tensors if tensor.rows}
    if not sliced:
        return
    for unit in units:
        seen = [(view.name, view.base) for view in unit.views] + [(tie.alias, tie.tensor) for tie in unit.uses]
        for name, base in seen:
            if base in sliced:
                raise PlanError(
                    f"its rows would go to several partitions, but {name!r} is another name for bytes of it",
                    tensor=base,
                    hint="Cut this model by layer, by type or by a rule: those keep a tensor whole.",
                )


def _tied(tie: Tie, home: int, cut: Cut, checkpoint: Checkpoint, tied: str, copied: set[tuple[int, str]]) -> Placed:
    """Put a tied layer where it is used; there it has a copy of the weight, or refers to it."""
    wanted = None if tied == "colocate" else cut.of_tie(tie)
    user = home if wanted is None else wanted
    copies = tied == "duplicate" and user != home and (user, tie.tensor) not in copied
    copied.add((user, tie.tensor))
    view = checkpoint.views.get(tie.alias)
    layer = PlannedLayer(
        tie.layer.name,
        tie.layer.layer_type,
        None,
        None,
        (checkpoint.tensors[tie.tensor],),
        alias=tie.alias,
        tied_to=home,
        stored=copies,
        views=() if view is None else (view,),
    )
    return Placed(user, layer)


def shown(names: Sequence[str]) -> str:
    """Return the first few of some names."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
