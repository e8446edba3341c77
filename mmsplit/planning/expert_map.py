"""Which tensors of a checkpoint are of routed experts, how many experts each layer has, and whose rows are which.

By evidence: numbered tensors count themselves; a packed tensor has one row, or an equal number of rows, per expert.
config.json is asked where names and shapes leave it open, and a packed tensor that contradicts it is not cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from mmsplit.checkpoint import TensorInfo
from mmsplit.errors import PlanError
from mmsplit.layers import Layer
from mmsplit.layers.experts import expert_place
from mmsplit.planning.sublayers import common_module

#: Keys of config.json that say how many experts a layer has.
_COUNT_KEY: Final = re.compile(r"(?:moe_)?(?:num|n)_(?:local_|routed_|moe_)?experts", re.ASCII)
_MAX_NESTING: Final = 4
_MAX_EXPERTS: Final = 65_536


class LayerExperts(NamedTuple):
    """The routed experts of one layer: tensors of a single expert by name, and rows per expert of packed ones.

    `module` is the one that holds them all.
    """

    expert_count: int
    module: str
    numbered: dict[str, int]
    packed: dict[str, int]


def find_experts(
    layers: Sequence[Layer], tensors: Mapping[str, TensorInfo], config: Mapping[str, object] | None
) -> tuple[tuple[LayerExperts | None, ...], tuple[str, ...]]:
    """Return the experts of each layer, None where there are none, and notes.

    Raises `PlanError` where the number of experts cannot be told, or tensors disagree about it.
    """
    stated = frozenset(_stated_counts(config or {}, 0))
    found = tuple(_experts_of(layer, tensors, stated) for layer in layers)
    counts = {experts.expert_count for experts in found if experts is not None}
    if counts and stated and not counts & stated:
        headers = ", ".join(map(str, sorted(counts)))
        return found, (f"config.json has {_one_of(stated)} experts, the headers {headers}: the headers count",)
    return found, ()


def _experts_of(layer: Layer, tensors: Mapping[str, TensorInfo], stated: frozenset[int]) -> LayerExperts | None:
    numbered: dict[str, int] = {}
    packed: list[TensorInfo] = []
    modules = []
    for name in layer.tensors:
        tensor = tensors[name]
        place = expert_place(name, len(tensor.shape))
        if place is None or (place.number is None and tensor.hidden):
            continue  # bytes that only views see have no rows
        if place.number is not None:
            numbered[name] = place.number
        else:
            packed.append(tensor)
        modules.append(place.module)
    if not modules:
        return None
    count = _count_of(layer, numbered, packed, stated)
    if count is None:
        return None
    if count > _MAX_EXPERTS:
        raise PlanError(f"{layer.name} has too many experts", expected=f"at most {_MAX_EXPERTS:,}", found=count)
    return LayerExperts(count, common_module(modules), numbered, dict(_iter_packed(layer, packed, count)))


def _count_of(
    layer: Layer, numbered: Mapping[str, int], packed: Sequence[TensorInfo], stated: frozenset[int]
) -> int | None:
    """Return the number of experts, by the best evidence that there is; None if no weight is of an expert."""
    evidence = {max(numbered.values()) + 1: max(numbered, key=numbered.__getitem__)} if numbered else {}
    stacked = [tensor for tensor in packed if len(tensor.shape) > 2]
    for tensor in stacked:
        evidence.setdefault(tensor.shape[0], tensor.name)
    flat = [tensor for tensor in packed if len(tensor.shape) == 2]
    if not evidence and flat:
        rows = {tensor.shape[0]: tensor.name for tensor in flat}
        if len(rows) > 1:
            raise _disagree(layer, {f"first dimension {row:,} of {name}" for row, name in rows.items()})
        return _count_of_flat(layer, flat[0], stated)
    if len(evidence) > 1:
        raise _disagree(layer, {f"{number:,} by {name}" for number, name in evidence.items()})
    count = next(iter(evidence), None)
    if count is not None and stacked and stated and count not in stated:
        raise PlanError(
            f"first dimension is not the number of experts that config.json has ({_one_of(stated)})",
            tensor=stacked[0].name,
            expected=_one_of(stated),
            found=f"shape {list(stacked[0].shape)}",
            hint="Its rows cannot be told apart by expert; cut this model by layer or by type.",
        )
    return count


def _count_of_flat(layer: Layer, tensor: TensorInfo, stated: frozenset[int]) -> int:
    """Return the number of experts of a matrix that has those of each expert below each other (DBRX)."""
    fitting = [count for count in stated if count and tensor.shape[0] % count == 0]
    if len(fitting) != 1:
        raise PlanError(
            f"how many experts {layer.name} has cannot be told: their weights are packed into matrices",
            tensor=tensor.name,
            expected="a number of experts in config.json that divides the first dimension",
            found=f"shape {list(tensor.shape)}, config.json has {_one_of(stated) if stated else 'none'}",
        )
    return fitting[0]


def _iter_packed(layer: Layer, packed: Sequence[TensorInfo], count: int) -> Iterator[tuple[str, int]]:
    """Yield rows per expert of each packed tensor; what has one dimension and not a row for each is common to all."""
    is_flat = not any(len(tensor.shape) > 2 for tensor in packed)
    for tensor in packed:
        rows = tensor.shape[0] if tensor.shape else 0
        if rows == count or (is_flat and len(tensor.shape) == 2 and rows and rows % count == 0):
            if tensor.size_bytes % rows:
                raise PlanError(
                    "rows are no whole number of bytes, so experts cannot be cut apart",
                    tensor=tensor.name,
                    found=f"{tensor.size_bytes:,} bytes in {rows:,} rows",
                )
            yield tensor.name, rows // count
        elif len(tensor.shape) > 1:
            raise _disagree(layer, {f"{count:,}", f"first dimension {rows:,} of {tensor.name}"})


def _disagree(layer: Layer, found: set[str]) -> PlanError:
    return PlanError(
        f"tensors of {layer.name} disagree about the number of its experts",
        found="; ".join(sorted(found)[:4]),
        hint="Cut this model by layer or by type.",
    )


def _one_of(counts: frozenset[int]) -> str:
    return " or ".join(map(str, sorted(counts)[:4]))


def _stated_counts(config: Mapping[str, object], nesting: int) -> Iterator[int]:
    """Yield every number of experts in the config, those of its parts included; a list has one per layer."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            if nesting < _MAX_NESTING:
                yield from _stated_counts(value, nesting + 1)
        elif isinstance(key, str) and len(key) < 40 and _COUNT_KEY.fullmatch(key):
            numbers = value if isinstance(value, list) else [value]
            yield from (number for number in numbers[:1024] if type(number) is int and number > 0)
