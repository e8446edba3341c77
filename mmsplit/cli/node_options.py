"""Machines to plan for, what the model is to do on them, and how a plan on machines is shown."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mmsplit.cli.options import PATH
from mmsplit.cli.render import contents, echo, percent, table
from mmsplit.planning import (
    MemoryRequest,
    NodeRequest,
    Objective,
    PlannedPartition,
    TrainingMethod,
    binary_size,
    parse_reserve,
)
from mmsplit.planning.memory_needs import KV_DTYPES
from mmsplit.planning.plan import NodePlacement, PlannedNode
from mmsplit.verbs.plan import read_nodes

#: Columns that are shown if any node needs such memory.
_NEEDS = (
    ("weights", "weights_bytes"),
    ("kv cache", "cache_bytes"),
    ("training", "training_bytes"),
    ("activations", "activation_bytes"),
)
_BALANCED = {"memory": (), "speed": ("stage time",), "share": ("has of wish",)}

F = TypeVar("F", bound=Callable[..., Any])


class _KvDtype(click.ParamType[str]):
    """The name of a dtype, in capitals or not."""

    name = "dtype"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return it as checkpoints spell it."""
        found = str(value).upper()
        if found not in KV_DTYPES:
            self.fail(f"{value!r} is not one of {', '.join(KV_DTYPES)}", param, ctx)
        return found


_OPTIONS = (
    click.option(
        "--nodes",
        "nodes_file",
        type=PATH,
        help="TOML file of the machines to plan for: name, memory, disk, speed, share of each.",
    ),
    click.option(
        "--objective",
        type=click.Choice(["memory", "speed", "share"]),
        help="With --nodes: least fill, fastest slowest stage, or by shares.  [default: share if nodes have one,"
        " else memory]",
    ),
    click.option("--context", type=click.IntRange(1), help="With --nodes: tokens per sequence, for the KV cache."),
    click.option("--batch", type=click.IntRange(1), help="With --nodes: sequences at a time.  [default: 1]"),
    click.option(
        "--kv-dtype",
        type=_KvDtype(),
        help="With --nodes: dtype of the KV cache, such as F8_E4M3.  [default: the checkpoint's]",
    ),
    click.option(
        "--training",
        type=click.Choice(["adamw", "sgd", "lora"]),
        help="With --nodes: plan for training, with its gradients and optimiser state.",
    ),
    click.option(
        "--lora-rank", type=click.IntRange(1), help="With --training lora: rank of the adapters.  [default: 16]"
    ),
    click.option(
        "--reserve",
        help="With --nodes: memory to keep free on each, a fraction or an amount (0.1, '2 GiB').  [default: 0.1, or as"
        " the file says]",
    ),
)


def node_options(command: F) -> F:
    """Add --nodes and what goes with it; the command gets all of it as `nodes`, a `NodeRequest` or None."""

    @functools.wraps(command)
    def with_nodes(
        *arguments: Any,
        nodes_file: Path | None,
        objective: Objective | None,
        context: int | None,
        batch: int | None,
        kv_dtype: str | None,
        training: TrainingMethod | None,
        lora_rank: int | None,
        reserve: str | None,
        **others: Any,
    ) -> Any:
        given = {
            "--objective": objective,
            "--context": context,
            "--batch": batch,
            "--kv-dtype": kv_dtype,
            "--training": training,
            "--lora-rank": lora_rank,
            "--reserve": reserve,
        }
        if nodes_file is None:
            for option, value in given.items():
                if value is not None:
                    raise click.UsageError(f"{option} needs --nodes")
            return command(*arguments, nodes=None, **others)
        if lora_rank is not None and training != "lora":
            raise click.UsageError("--lora-rank needs --training lora")
        plain = MemoryRequest()
        memory = MemoryRequest(
            context=context,
            batch=batch or plain.batch,
            kv_dtype=kv_dtype,
            training=training,
            lora_rank=lora_rank or plain.lora_rank,
        )
        nodes = read_nodes(nodes_file, None if reserve is None else parse_reserve(reserve))
        return command(*arguments, nodes=NodeRequest(nodes=nodes, objective=objective, memory=memory), **others)

    decorated: Any = with_nodes
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    result: F = decorated
    return result


def show_placement(placement: NodePlacement, partitions: tuple[PlannedPartition, ...]) -> None:
    """Print what the plan asks of each machine, and which of them is the bottleneck."""
    columns = [column for column in _NEEDS if any(getattr(node.needs, column[1]) for node in placement.nodes)]
    rows = []
    for node in placement.nodes:
        needs = node.needs
        rows.append(
            (
                node.node.name,
                "-" if node.part_id is None else str(node.part_id),
                "-" if node.part_id is None else contents(partitions[node.part_id]),
                *(binary_size(getattr(needs, field)) for _, field in columns),
                binary_size(needs.total_bytes),
                binary_size(node.node.usable_bytes),
                percent(needs.total_bytes, node.node.usable_bytes),
                *_balanced(node, placement),
            )
        )
    balanced = _BALANCED[placement.objective]
    heads = ("node", "partition", "layers", *(head for head, _ in columns), "needs", "usable", "fill", *balanced)
    echo(table(heads, rows, [head not in {"node", "layers"} for head in heads]))
    echo(f"\n  {_bottleneck_line(placement)}")


def _balanced(node: PlannedNode, placement: NodePlacement) -> tuple[str, ...]:
    """The cell of what is balanced, where the fill does not say it: time of a stage, or part of the whole."""
    if placement.objective == "speed":
        slowest = max(other.work / other.strength for other in placement.nodes)
        return (percent(node.work / node.strength, slowest),)
    if placement.objective == "share":
        whole = sum(other.work for other in placement.nodes)
        return (f"{percent(node.work, whole)} of {percent(node.strength, sum(n.strength for n in placement.nodes))}",)
    return ()


def _bottleneck_line(placement: NodePlacement) -> str:
    bottleneck = next(node for node in placement.nodes if node.node.name == placement.bottleneck)
    above = f"{100 * placement.excess:.1f} % above a perfect split"
    if placement.objective == "memory":
        return f"{placement.bottleneck} is the fullest: {100 * bottleneck.fill:.1f} % of what it may use, {above}"
    if placement.objective == "speed":
        return f"{placement.bottleneck} is the slowest stage: its time is {above}"
    return f"{placement.bottleneck} has the most for its share: {above}"
