"""`mmsplit plan`."""

from __future__ import annotations

from pathlib import Path

import click

from mmsplit.cli.node_options import node_options, show_placement
from mmsplit.cli.options import json_option, planning_options
from mmsplit.cli.render import contents, count, echo, echo_json, notes, percent, size, table
from mmsplit.cli.source_options import chosen_source, hub_of, hub_options, model_id_option, source_argument
from mmsplit.planning import By, NodeRequest, Plan, SplitBy, TiedMode
from mmsplit.verbs.plan import plan, read_rules


@click.command("plan")
@source_argument
@planning_options
@node_options
@model_id_option()
@hub_options
@json_option
def plan_command(
    source: str | None,
    num_parts: int | None,
    split_by: SplitBy,
    rules_file: Path | None,
    by: By,
    weights: tuple[str, ...] | None,
    boundaries: tuple[str, ...] | None,
    tied: TiedMode,
    allow_unknown_dtypes: bool,
    nodes: NodeRequest | None,
    model_id: str | None,
    revision: str | None,
    cache_dir: Path | None,
    token: str | None,
    connections: int,
    as_json: bool,
) -> None:
    """Show who would get what, from headers alone; nothing is written.

    SOURCE is a checkpoint's directory, one of its shards or its weights index, or a model of the Hub: org/name,
    org/name@revision.
    """
    result = plan(
        chosen_source(source, model_id),
        num_parts,
        by=by,
        weights=weights,
        boundaries=boundaries,
        tied=tied,
        split_by=split_by,
        rule=None if rules_file is None else read_rules(rules_file),
        nodes=nodes,
        hub=hub_of(revision, cache_dir, token, connections),
        allow_unknown_dtypes=allow_unknown_dtypes,
    )
    if as_json:
        echo_json(result.as_json())
    else:
        if result.placement is None:
            show_plan(result)
        else:
            show_placement(result.placement, result.partitions)
        notes(result.notes)


def show_plan(plan: Plan) -> None:
    """Print the partitions of a plan and how even they are."""
    total = sum(part.total_bytes for part in plan.partitions)
    rows = [
        (
            str(part.part_id),
            contents(part),
            f"{len(part.layers)}",
            count(part.total_params),
            size(part.total_bytes),
            percent(part.total_bytes, total),
        )
        for part in plan.partitions
    ]
    echo(
        table(
            ("partition", "layers", "count", "params", "size", "share"),
            rows,
            (True, False, True, True, True, True),
        )
    )
    balance = plan.balance
    above = f"{100 * balance.excess:.1f} % above a perfect split"
    if plan.split_by in ("type", "rule"):
        echo(f"\n  cut by {plan.split_by}, not balanced: partition {balance.bottleneck} is the largest, {above}")
    else:
        whose = "experts balanced" if plan.split_by == "expert" else "balanced"
        echo(f"\n  {whose} by {balance.by}: partition {balance.bottleneck} is the bottleneck, {above}")
