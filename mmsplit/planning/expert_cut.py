"""`--split-by expert`: a trunk, and partitions of experts for expert parallelism.  Pure.

Partition 0 is the trunk: everything that every token passes, routers and shared experts included.  The others hold runs
of expert numbers, the same ones of every layer, evenly by what they weigh or by weights.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Final

from mmsplit.checkpoint import TensorInfo, slice_rows
from mmsplit.errors import PlanError
from mmsplit.layers import Layer
from mmsplit.layers.experts import expert_place
from mmsplit.planning.assignment import Load, assign_contiguous
from mmsplit.planning.expert_map import LayerExperts
from mmsplit.planning.plan import PlannedLayer
from mmsplit.planning.planner import By
from mmsplit.planning.sublayers import Cut, Placed, sublayer
from mmsplit.planning.ties import Tie

TRUNK_LABEL: Final = "trunk"


def cut_by_expert(
    layers: Sequence[Layer],
    experts: Sequence[LayerExperts | None],
    tensors: Mapping[str, TensorInfo],
    weights: Sequence[Fraction],
    by: By,
) -> Cut:
    """Give partition 0 the trunk, and one more for each weight its run of expert numbers.

    Raises `PlanError` where there are fewer experts than partitions for them.
    """
    costs = _costs(experts, tensors)
    if not costs:
        raise PlanError(
            "no tensor is of a routed expert, so there is nothing to cut by expert",
            hint="Cut this model by layer or by type.",
        )
    numbers = sorted(costs)
    if len(weights) > len(numbers):
        raise PlanError(
            f"{len(weights) + 1} is no possible number of partitions: there are {len(numbers):,} experts, and each"
            " partition behind the trunk needs at least one",
            hint=f"Possible are 2 to {len(numbers) + 1:,} partitions.",
        )
    stored = Load([costs[number][0] for number in numbers])
    params = Load([costs[number][1] for number in numbers])
    each = Load([1] * len(numbers))
    first = assign_contiguous({"bytes": stored, "params": params, "layers": each}[by], weights, stored)
    starts = [numbers[unit] for unit in first]
    stops = [*starts[1:], numbers[-1] + 1]
    placed = tuple(
        tuple(_place(layer, found, tensors, starts, stops)) for layer, found in zip(layers, experts, strict=True)
    )
    runs = pairwise([*first, len(numbers)])
    labels = [_label(numbers[start], numbers[stop - 1]) for start, stop in runs]

    def of_tie(tie: Tie) -> int | None:
        place = expert_place(tie.alias, len(tensors[tie.tensor].shape))
        if place is None:
            return 0
        return None if place.number is None else max(1, bisect_right(starts, place.number))

    return Cut(placed, (TRUNK_LABEL, *labels), of_tie)


def _costs(experts: Sequence[LayerExperts | None], tensors: Mapping[str, TensorInfo]) -> dict[int, tuple[int, int]]:
    """Return bytes and parameters of each expert number, all layers together."""
    costs: dict[int, tuple[int, int]] = {}

    def add(number: int, size_bytes: int, params: int) -> None:
        before = costs.get(number, (0, 0))
        costs[number] = (before[0] + size_bytes, before[1] + params)

    for found in experts:
        if found is not None:
            for name, number in found.numbered.items():
                add(number, tensors[name].size_bytes, tensors[name].params)
            size_bytes = sum(tensors[name].size_bytes for name in found.packed) // found.expert_count
            params = sum(tensors[name].params for name in found.packed) // found.expert_count
            for number in range(found.expert_count) if found.packed else ():
                add(number, size_bytes, params)
    return costs


def _place(
    layer: Layer,
    found: LayerExperts | None,
    tensors: Mapping[str, TensorInfo],
    starts: Sequence[int],
    stops: Sequence[int],
) -> Iterator[Placed]:
    """Yield what each partition gets of a layer: the trunk first, then its experts by their numbers."""
    if found is None:
        yield Placed(0, _planned(layer, tensors, layer.tensors))
        return
    trunk = [name for name in layer.tensors if name not in found.numbered and name not in found.packed]
    if trunk:
        yield Placed(0, _planned(layer, tensors, trunk))
    runs: list[list[TensorInfo]] = [[] for _ in starts]
    for name in layer.tensors:
        tensor = tensors[name]
        if name in found.numbered:
            runs[bisect_right(starts, found.numbered[name]) - 1].append(tensor)
        elif name in found.packed:
            each = found.packed[name]
            for run, start, stop in zip(runs, starts, stops, strict=True):
                stop = min(stop, found.expert_count)
                if stop - start == found.expert_count:
                    run.append(tensor)
                elif start < stop:
                    run.append(slice_rows(tensor, start * each, stop * each))
    for part_id, run in enumerate(runs, 1):
        if run:
            yield Placed(part_id, sublayer(layer, "experts", found.module, run))


def _planned(layer: Layer, tensors: Mapping[str, TensorInfo], names: Sequence[str]) -> PlannedLayer:
    infos = tuple(tensors[name] for name in names)
    return PlannedLayer(layer.name, layer.layer_type, layer.stack, layer.block_index, infos)


def _label(first: int, last: int) -> str:
    return f"expert {first}" if first == last else f"experts {first}-{last}"
