"""What a cut cannot divide, in forward order: layers, each with the tied weights it uses.  Pure.

A layer uses a tied weight where it has a name for it, or needs one, while the bytes are those of another layer.
Evidence comes from the headers: a name that sees a stored tensor (a PyTorch file says so; equal bytes were found), or
no head where one is needed (`ties`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from mmsplit.checkpoint import Checkpoint, TensorInfo, TensorView
from mmsplit.errors import PlanError
from mmsplit.layers import Layer, LayerMap, build_layer_map
from mmsplit.planning.assignment import Load, TiedUnits
from mmsplit.planning.ties import Tie, find_ties

#: What becomes of a tied weight that a later partition needs: it gets a copy of its own, a reference to the
#: partition that has it, or the layers that use it move to that partition.
TiedMode = Literal["duplicate", "reference", "colocate"]


class Unit(NamedTuple):
    """A layer with the tensors it stores, the uses of tied weights that belong to it, and its further names.

    A unit that is nothing but such uses has a layer without tensors.  `views` see tensors of this very layer.
    """

    layer: Layer
    uses: tuple[Tie, ...] = ()
    views: tuple[TensorView, ...] = ()


class MovedUnit(NamedTuple):
    """A unit that lies wherever unit `home` lies, which stores the weight it is tied to."""

    unit: Unit
    home: int


class Arrangement(NamedTuple):
    """What there is to assign: `units` in forward order, to be cut into runs, and those that `moved` out of it.

    `stored_in` is the unit that stores each weight which others use, or that its unit moved to.  With `copies`, each
    other run that uses such a weight holds it, too.
    """

    units: tuple[Unit, ...]
    moved: tuple[MovedUnit, ...]
    stored_in: Mapping[str, int]
    copies: bool
    tensors: Mapping[str, TensorInfo]
    views: Mapping[str, TensorView]
    notes: tuple[str, ...]

    def load(self, layer_cost: Callable[[Layer], int], copy_cost: Callable[[TensorInfo], int]) -> Load:
        """Return the cost of any run of units, given that of a layer and that of a copy of a tied weight."""

        def cost(unit: Unit) -> int:
            return layer_cost(unit.layer) if unit.layer.tensors else 0

        users: dict[str, list[int]] = {}
        for number, unit in enumerate(self.units):
            for tensor in {tie.tensor for tie in unit.uses}:
                users.setdefault(tensor, []).append(number)
        tied = [
            TiedUnits(self.stored_in[tensor], tuple(uses), copy_cost(self.tensors[tensor]))
            for tensor, uses in users.items()
            if self.copies
        ]
        follow = [(moved.home, cost(moved.unit)) for moved in self.moved]
        return Load([cost(unit) for unit in self.units], tied, follow)


def arrange_checkpoint(checkpoint: Checkpoint, tied: TiedMode) -> Arrangement:
    """Return what there is to assign.  Raises `PlanError` for an unknown way to treat tied weights."""
    if tied not in get_args(TiedMode):
        raise PlanError(
            f"no such way to treat tied weights: {tied!r}", hint=f"Possible are {', '.join(get_args(TiedMode))}."
        )
    units, notes = checkpoint_units(checkpoint)
    aside = _aside(units) if tied == "colocate" else set()
    left = tuple(unit for i, unit in enumerate(units) if i not in aside)
    stored_in = {name: i for i, unit in enumerate(left) for name in unit.layer.tensors}
    moved = _moved([units[i] for i in sorted(aside)], stored_in)
    stored_in |= {name: move.home for move in moved for name in move.unit.layer.tensors}
    used = dict.fromkeys(tie.tensor for unit in units for tie in unit.uses)
    return Arrangement(
        left,
        moved,
        {name: stored_in[name] for name in used},
        tied != "reference",
        checkpoint.tensors,
        checkpoint.views,
        notes,
    )


def checkpoint_units(checkpoint: Checkpoint) -> tuple[tuple[Unit, ...], tuple[str, ...]]:
    """Return all units of a checkpoint in forward order, and all notes on them."""
    views = checkpoint.views
    layer_map = build_layer_map([*checkpoint.tensors, *views], checkpoint.config)
    ties, tie_notes = find_ties(layer_map, checkpoint.config, views)
    return tuple(_units(layer_map, ties, views)), (*checkpoint.notes, *layer_map.notes, *tie_notes)


def _units(layer_map: LayerMap, ties: Sequence[Tie], views: Mapping[str, TensorView]) -> list[Unit]:
    """Put the uses that no name speaks of where they run, and those that have a name into the layer of that name."""
    units: list[Unit] = []
    for position, layer in enumerate([*layer_map.layers, None]):
        for tie in ties:
            if tie.position == position:
                stored = views[tie.tensor].base if tie.tensor in views else tie.tensor
                use = tie._replace(tensor=stored, layer=tie.layer._replace(tensors=(stored,)))
                units.append(Unit(tie.layer._replace(tensors=()), (use,)))
        if layer is not None:
            units.append(_unit(layer, views, position))
    return units


def _unit(layer: Layer, views: Mapping[str, TensorView], position: int) -> Unit:
    if views.keys().isdisjoint(layer.tensors):
        return Unit(layer)
    own = tuple(name for name in layer.tensors if name not in views)
    seen = [views[name] for name in layer.tensors if name in views]
    inside = tuple(view for view in seen if view.base in own)
    outside = [view for view in seen if view.base not in own]
    uses = []
    for view in outside:
        # names of layers are unique: if the layer has more than this one name, that name is the use's
        name = layer.name if not own and len(outside) == 1 else view.name
        uses.append(Tie(Layer(name, layer.layer_type, None, None, (view.base,)), view.name, view.base, position))
    return Unit(layer._replace(tensors=own), tuple(uses), inside)


def _aside(units: Sequence[Unit]) -> set[int]:
    """Return the units that go to the weight they are tied to: those that are nothing but a use, outside of stacks.

    The head moves to the embedding, and with it what runs after the last block: the hidden state goes there once.
    """
    uses = {i for i, unit in enumerate(units) if unit.uses and not unit.layer.tensors and unit.layer.stack is None}
    last_block = max((i for i, unit in enumerate(units) if unit.layer.stack is not None), default=-1)
    if last_block < 0 or not any(unit.uses for unit in units):
        return uses
    return uses | {i for i, unit in enumerate(units) if i > last_block and unit.layer.layer_type in ("norm", "head")}


def _moved(aside: Sequence[Unit], stored_in: Mapping[str, int]) -> tuple[MovedUnit, ...]:
    """Say where each goes: to the weight it uses; what uses none goes with the last that does."""
    homes = [next((stored_in[tie.tensor] for tie in unit.uses if tie.tensor in stored_in), None) for unit in aside]
    last = next((home for home in reversed(homes) if home is not None), 0)
    return tuple(MovedUnit(unit, last if home is None else home) for unit, home in zip(aside, homes, strict=True))
