"""Tensors that may hold the same bytes under several names, such as a head beside the embedding it is tied to.  Pure.

Headers do not say whether they do: a plan says only that they may, and a split compares them.  Only tensors outside of
blocks are looked at, of one dtype and shape, and only a `.weight` with nothing but a bias beside it: a quantised weight
has companions, and goes where they go.  Embeddings and heads may be of any size.  Of other layers small tensors are
left alone: that two norms are all ones does not mean that they are one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from mmsplit.checkpoint import TensorInfo
from mmsplit.planning.plan import Plan, PlannedLayer
from mmsplit.planning.ties import STORED_THOUGH_TIED, declares_tie

#: Smaller ones are looked at only in embeddings and heads.
_LEAST_BYTES: Final = 1 << 20
_DECLARED_TIED: Final = ", and config.json says they are tied"
_ENDS: Final = ("embedding", "head")


class Lookalike(NamedTuple):
    """A tensor that others look like, and the type of its layer."""

    tensor: TensorInfo
    layer_type: str


def find_lookalikes(layers: Sequence[PlannedLayer]) -> list[list[Lookalike]]:
    """Return groups of two tensors or more that may be equal, in the order of the layers."""
    stored = [layer for layer in layers if layer.alias is None]
    outside = [layer for layer in stored if layer.stack is None]
    modules = {_module(tensor.name) for layer in outside for tensor in layer.tensors}
    beside: Counter[str] = Counter()  # how many names each of these modules has; of others it does not matter
    for layer in stored:
        names = [tensor.name for tensor in layer.tensors] + [view.name for view in layer.views]
        found = [module for name in names if (module := name.rpartition(".")[0]) in modules and name[-5:] != ".bias"]
        beside.update(found)
    groups: dict[tuple[str, tuple[int, ...]], list[Lookalike]] = {}
    for layer in outside:
        for tensor in layer.tensors:
            least = 1 if layer.layer_type in _ENDS else _LEAST_BYTES
            alone = tensor.name.endswith(".weight") and beside[_module(tensor.name)] == 1
            if tensor.size_bytes >= least and alone and not tensor.hidden:
                groups.setdefault((tensor.dtype, tensor.shape), []).append(Lookalike(tensor, layer.layer_type))
    return [group for group in groups.values() if len(group) > 1]


def possible_ties(plan: Plan, config: Mapping[str, object] | None) -> tuple[str, ...]:
    """Return notes on what a split may find to be equal; for a plan that was made from headers alone."""
    layers = [layer for part in plan.partitions for layer in part.layers]
    return tuple(
        f"{listed([item.tensor.name for item in group])} have the same dtype and shape{_declared(group, config)}: a"
        f" split compares their bytes, and stores equal ones once, with ties as --tied {plan.tied} has them"
        for group in find_lookalikes(sorted(layers, key=lambda layer: layer.moved))
    )


def notes_before_split(plan: Plan, config: Mapping[str, object] | None) -> tuple[str, ...]:
    """Return the notes of a plan with those of `possible_ties`, and a tie that config.json declares in one of them."""
    possible = possible_ties(plan, config)
    is_said = any(_DECLARED_TIED in note for note in possible)
    return (*(note for note in plan.notes if not (is_said and note.startswith(STORED_THOUGH_TIED))), *possible)


def is_head_and_embedding(group: Iterable[Lookalike]) -> bool:
    """Whether both are among these: it is them that tie_word_embeddings speaks of."""
    return {item.layer_type for item in group} >= set(_ENDS)


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence has them."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _declared(group: Sequence[Lookalike], config: Mapping[str, object] | None) -> str:
    declared = declares_tie(config)
    if declared is None or not is_head_and_embedding(group):
        return ""
    return ", and config.json says they are not tied" if not declared else _DECLARED_TIED
