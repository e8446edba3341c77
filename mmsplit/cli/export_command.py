"""`mmsplit export`."""

from __future__ import annotations

from pathlib import Path

import click

from mmsplit.checkpoint import IoMode
from mmsplit.cli.node_options import node_options
from mmsplit.cli.options import PART_IDS, PATH, json_option, planning_options, root_option, work_options
from mmsplit.cli.progress import ProgressDisplay
from mmsplit.cli.render import echo, echo_json, notes, size, table
from mmsplit.cli.source_options import chosen_source, hub_of, hub_options, model_id_option, source_argument
from mmsplit.exporting.weight_files import DEFAULT_SHARD_BYTES
from mmsplit.planning import By, NodeRequest, SplitBy, TiedMode
from mmsplit.sidecar.output_directory import Existing
from mmsplit.verbs.export import DEFAULT_JSON_BYTES, ExportResult, To, export
from mmsplit.verbs.plan import read_rules


@click.command("export")
@source_argument
@click.option("-o", "--output", type=PATH, required=True, help="Directory for the files.")
@click.option(
    "--part",
    "part_ids",
    type=PART_IDS,
    metavar="K,…",
    help="Only these partitions, counted from 0.  [default: the whole model]",
)
@click.option(
    "--to",
    type=click.Choice(["safetensors", "json"]),
    default="safetensors",
    show_default=True,
    help="safetensors: what transformers, vLLM and others load; json: numbers as text, for small models.",
)
@click.option(
    "--max-shard-gb",
    type=click.FloatRange(min=0, min_open=True),
    default=DEFAULT_SHARD_BYTES / 1e9,
    show_default=True,
    help="Most gigabytes of tensors in one safetensors file.",
)
@click.option("--resume", is_flag=True, help="Keep files of the same export that are there and right, make the rest.")
@click.option("--force", is_flag=True, help="Replace what an earlier export wrote to the output.")
@click.option("-y", "--yes", is_flag=True, help=f"Write more than {size(DEFAULT_JSON_BYTES)} of JSON.")
@root_option
@planning_options
@node_options
@model_id_option()
@click.option("--keep-source", is_flag=True, help="Download the shards to the Hub cache, and keep them.")
@hub_options
@work_options
@json_option
def export_command(
    source: str | None,
    output: Path,
    part_ids: tuple[int, ...] | None,
    to: To,
    max_shard_gb: float,
    resume: bool,
    force: bool,
    yes: bool,
    root_digest: str | None,
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
    keep_source: bool,
    revision: str | None,
    cache_dir: Path | None,
    token: str | None,
    connections: int,
    threads: int | None,
    io: IoMode,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write partitions, or a whole model, for programs that do not know mmsplit.

    SOURCE is a partition set or one of its partitions; or a checkpoint's directory, one of its shards or its weights
    index, or a model of the Hub, which is then cut as `plan` would, without partitions in between.
    """
    if resume and force:
        raise click.UsageError("--resume and --force exclude each other")
    existing: Existing = "resume" if resume else "force" if force else "refuse"
    with ProgressDisplay(quiet) as progress:
        result = export(
            chosen_source(source, model_id),
            output,
            num_parts,
            part_ids=part_ids,
            to=to,
            by=by,
            weights=weights,
            boundaries=boundaries,
            tied=tied,
            split_by=split_by,
            rule=None if rules_file is None else read_rules(rules_file),
            nodes=nodes,
            max_shard_bytes=max(1, int(max_shard_gb * 1e9)),
            max_bytes=None if yes else DEFAULT_JSON_BYTES,
            on_estimate=lambda estimate: click.echo(f"about {size(estimate)} of JSON", err=True),
            existing=existing,
            root_digest=root_digest,
            threads=threads,
            io=io,
            hub=hub_of(revision, cache_dir, token, connections)._replace(keep_source=keep_source),
            allow_unknown_dtypes=allow_unknown_dtypes,
            progress=progress,
        )
    if as_json:
        echo_json(result.as_json())
    else:
        _show(result)
        notes(result.notes)


def _show(result: ExportResult) -> None:
    if result.moved_bytes is not None:
        echo(f"{size(result.moved_bytes)} moved over the network")
    rows = [
        (file.name, size(file.size_bytes or 0), "was there already" if file.name in result.kept else "")
        for file in result.files
    ]
    echo(table(("file", "size", ""), rows, (False, True, False)))
    parts = "whole model"
    if len(result.part_ids) < result.num_parts:
        parts = f"partition {', '.join(map(str, result.part_ids))} of {result.num_parts}"
    echo(f"\n  {parts}, {size(result.total_bytes)} in {result.path}")
