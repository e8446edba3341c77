"""Why a model does not fit on machines, by how much, and what would fit.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from mmsplit.dtypes import DTYPES
from mmsplit.errors import PlanError
from mmsplit.planning.memory_needs import MemoryRequest, Needs
from mmsplit.planning.node_problem import NodeProblem, NodeRequest
from mmsplit.planning.nodes import NodeList, binary_size
from mmsplit.planning.placement import MAX_SETS
from mmsplit.planning.training_state import TrainingMethod

#: Contexts above this are looked at in steps of as many tokens.
_CONTEXT_STEP: Final = 256
_NARROW_KV: Final = "F8_E4M3"
_LIGHTER_TRAINING: Final[dict[TrainingMethod, tuple[TrainingMethod, ...]]] = {
    "adamw": ("sgd", "lora"),
    "sgd": ("lora",),
    "lora": (),
}


def misfit_error(problem: NodeProblem) -> PlanError:
    """Return the error for a problem that has no solution."""
    request = problem.request
    nodes = request.nodes.nodes
    usable = sum(node.usable_bytes for node in nodes)
    reserve = sum(node.reserve_bytes for node in nodes)
    changes = list(_changes_that_fit(problem))
    disks = _disk_sentence(problem)
    sentences = [disks or _memory_sentence(problem)]
    sentences.append(f"It fits {'; or '.join(changes)}" if changes else "No smaller context, batch or reserve fits")
    sentences.append(_part_sentence(problem))
    kept = f" ({binary_size(reserve)} are kept in reserve)" if reserve else ""
    return PlanError(
        f"model does not fit on {'this node' if len(nodes) == 1 else f'these {len(nodes)} nodes'}",
        expected=f"room for {_sum_of(problem.total_needs())}",
        found=f"{binary_size(usable)} usable{kept}",
        hint=". ".join(sentences) + ".",
    )


def _sum_of(needs: Needs) -> str:
    names = ("weights", "KV cache", "training state", "activations")
    parts = [f"{name} {binary_size(count)}" for name, count in zip(names, needs, strict=True) if count]
    whole = binary_size(needs.total_bytes)
    return f"{whole}: {', '.join(parts)}" if len(parts) > 1 else f"{whole} of {names[0]}"


def _memory_sentence(problem: NodeProblem) -> str:
    placement = problem.placement
    index, alone = placement.overflow_of_one()
    name = problem.request.nodes.nodes[index].name
    together = placement.least_overflow()
    if together is None or together >= alone:
        return f"It needs {binary_size(alone)} more, on node {name!r}"
    return f"It needs {binary_size(together)} more in all, or {binary_size(alone)} more on node {name!r} alone"


def _disk_sentence(problem: NodeProblem) -> str | None:
    """Speak of disks where the memories would do."""
    nodes = problem.request.nodes
    without = NodeList(tuple(node._replace(disk_bytes=None) for node in nodes.nodes), nodes.order)
    if not _fits(problem, replace(problem.request, nodes=without)):
        return None
    small = ", ".join(f"{n.name!r} {binary_size(n.disk_bytes)}" for n in nodes.nodes if n.disk_bytes is not None)
    return f"The memories would do, the disks do not hold the partitions, counted before compression ({small})"


def _changes_that_fit(problem: NodeProblem) -> Iterator[str]:
    """Yield what could be changed, each thing alone, so that the model fits."""
    yield from _changes_of_purpose(problem)
    nodes = problem.request.nodes
    if any(node.reserve_bytes for node in nodes.nodes):
        bare = NodeList(tuple(node._replace(reserve_bytes=0) for node in nodes.nodes), nodes.order)
        if _fits(problem, replace(problem.request, nodes=bare)):
            yield "with nothing in reserve"
    may_turn = nodes.order == "file" and 1 < problem.placement.count_sets() <= MAX_SETS
    if may_turn and _fits(problem, replace(problem.request, nodes=nodes._replace(order="any"))):
        yield 'with the nodes in another order (order = "any")'


def _changes_of_purpose(problem: NodeProblem) -> Iterator[str]:
    """Yield smaller contexts, batches, dtypes and lighter training with which the model fits."""
    memory = problem.request.memory

    def fits(changed: MemoryRequest) -> bool:
        return _fits(problem, replace(problem.request, memory=changed))

    if memory.context is not None:
        step = _CONTEXT_STEP if memory.context > _CONTEXT_STEP else 1
        steps = _largest((memory.context - 1) // step, lambda n: fits(replace(memory, context=n * step)))
        if steps:
            yield f"with a context of {steps * step:,} tokens"
    batch = _largest(memory.batch - 1, lambda n: fits(replace(memory, batch=n)))
    if batch:
        yield f"with a batch of {batch:,}"
    caches = memory.training is None and memory.context is not None
    wide = DTYPES[problem.needs.kv_dtype].bits > DTYPES[_NARROW_KV].bits
    if caches and wide and fits(replace(memory, kv_dtype=_NARROW_KV)):
        yield f"with a KV cache in {_NARROW_KV}"
    lighter = () if memory.training is None else _LIGHTER_TRAINING[memory.training]
    for method in lighter:
        if fits(replace(memory, training=method)):
            yield f"with training by {method}"


def _fits(problem: NodeProblem, changed: NodeRequest) -> bool:
    return NodeProblem(problem.arrangement, problem.facts, changed, problem.by).fits()


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to `most` that fits, 0 if none; what fits, fits with less."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _part_sentence(problem: NodeProblem) -> str:
    units = problem.arrangement.units
    count = problem.placement.units_that_fit()
    if count == 0:
        return f"Not even the first of its {len(units):,} layers fits on the first node"
    return f"As it is, the first {count:,} of {len(units):,} layers fit, to {units[count - 1].layer.name}"
