"""`mmsplit inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from mmsplit.cli.options import json_option, unknown_dtypes_option
from mmsplit.cli.render import clean, count, echo, echo_json, layer_table, notes, percent, size, table
from mmsplit.cli.source_options import chosen_source, hub_of, hub_options, model_id_option, source_argument
from mmsplit.verbs.inspect import CheckpointInfo, PartitionInfo, SetInfo, inspect


@click.command("inspect")
@source_argument
@click.option("--layers", "every_layer", is_flag=True, help="One line per layer, also where many are alike.")
@unknown_dtypes_option
@model_id_option()
@hub_options
@json_option
def inspect_command(
    source: str | None,
    every_layer: bool,
    allow_unknown_dtypes: bool,
    model_id: str | None,
    revision: str | None,
    cache_dir: Path | None,
    token: str | None,
    connections: int,
    as_json: bool,
) -> None:
    """Show what SOURCE holds: a checkpoint, a partition, a partition set, or a model of the Hub (org/name)."""
    hub = hub_of(revision, cache_dir, token, connections)
    info = inspect(chosen_source(source, model_id), hub=hub, allow_unknown_dtypes=allow_unknown_dtypes)
    if as_json:
        echo_json(info.as_json())
    elif isinstance(info, CheckpointInfo):
        _show_checkpoint(info, every_layer)
    elif isinstance(info, PartitionInfo):
        _show_partition(info, every_layer)
    else:
        _show_set(info)


def _show_checkpoint(info: CheckpointInfo, every_layer: bool) -> None:
    checkpoint = info.checkpoint
    facts = info.as_json()["dtypes"]
    dtypes = (
        ", ".join(f"{clean(dtype)} {size(total)}" for dtype, total in facts.items()) if isinstance(facts, dict) else ""
    )
    echo(
        f"{clean(checkpoint.model_id)}: {size(checkpoint.total_bytes)}, {count(checkpoint.total_params)} parameters,"
        f" {len(checkpoint.tensors):,} tensors in {len(checkpoint.shards)} shard(s); {dtypes}\n"
    )
    echo(layer_table(info.layers, every=every_layer))
    notes(info.notes)


def _show_partition(info: PartitionInfo, every_layer: bool) -> None:
    manifest = info.manifest
    echo(
        f"partition {manifest.part_id} of {manifest.num_parts} of {clean(manifest.model_id)}:"
        f" {size(manifest.total_bytes)} stored in {size(manifest.stored_bytes)}"
        f" ({percent(manifest.stored_bytes, manifest.total_bytes)}),"
        f" {count(manifest.total_params)} parameters, {len(manifest.stored_tensors()):,} tensors\n"
    )
    echo(layer_table(manifest.layers, every=every_layer))


def _show_set(info: SetInfo) -> None:
    manifest = info.manifest
    echo(
        f"{clean(manifest.model_id)}: {len(manifest.partitions)} partitions, {size(manifest.total_bytes)} stored in"
        f" {size(manifest.stored_bytes)} ({percent(manifest.stored_bytes, manifest.total_bytes)}), codec"
        f" {manifest.codec}\n"
    )
    rows = [
        (
            str(entry.part_id),
            count(entry.total_params),
            size(entry.total_bytes),
            size(entry.stored_bytes),
            percent(entry.stored_bytes, entry.total_bytes),
            "missing" if entry.part_id in info.missing else "",
        )
        for entry in manifest.partitions
    ]
    echo(table(("partition", "params", "raw", "stored", "ratio", ""), rows, (True,) * 5 + (False,)))
    shards = len(manifest.shards)
    echo(f"\n  merges into {shards} shard(s), {size(sum(shard.size_bytes for shard in manifest.shards))}")
    echo(f"  root digest {manifest.root_digest}")
