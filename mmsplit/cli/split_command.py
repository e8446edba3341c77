"""`mmsplit split`."""

from __future__ import annotations

from pathlib import Path

import click

from mmsplit.checkpoint import IoMode
from mmsplit.cli.consume_option import announce_disk, consume_option
from mmsplit.cli.node_options import node_options
from mmsplit.cli.options import PART_IDS, PATH, PERCENT, json_option, planning_options, work_options
from mmsplit.cli.progress import ProgressDisplay
from mmsplit.cli.render import echo, echo_json, notes, size, written_table
from mmsplit.cli.source_options import chosen_source, hub_of, hub_options, source_argument
from mmsplit.codec import CodecName
from mmsplit.planning import By, NodeRequest, SplitBy, TiedMode
from mmsplit.sidecar.output_directory import Existing
from mmsplit.verbs.plan import read_rules
from mmsplit.verbs.split import SplitResult, split


@click.command("split")
@source_argument
@click.option("-o", "--output", type=PATH, required=True, help="Directory for the partition set.")
@planning_options
@node_options
@click.option(
    "--only",
    type=PART_IDS,
    metavar="K,…",
    help="Write only these partitions, counted from 0.  From the Hub, only their bytes are fetched.",
)
@click.option(
    "--codec",
    type=click.Choice(["planes", "zstd", "raw"]),
    default="planes",
    show_default=True,
    help="planes: byte planes of each number, entropy-coded where it pays; zstd: plain zstd; raw: as it is.",
)
@click.option("--resume", is_flag=True, help="Go on with an unfinished split of the same source and plan.")
@click.option("--force", is_flag=True, help="Replace what mmsplit wrote to the output before.")
@click.option("--buffered", is_flag=True, help="Write through the page cache, not past it.")
@click.option(
    "--no-source-sha256",
    is_flag=True,
    help="Do not compute the SHA-256 of the source shards: a third less work, and merge has less to compare with.",
)
@click.option(
    "--parity",
    type=PERCENT,
    help="Beside each payload, a parity file of this share of it, 2% say: repair then needs no source.",
)
@click.option(
    "--model-id",
    metavar="ORG/NAME",
    help="The model on the Hub, in place of SOURCE; with a path as SOURCE, the id for the manifests.",
)
@click.option(
    "--keep-source",
    is_flag=True,
    help="Download the shards to the Hub cache, and keep them; each is split as soon as it is there.",
)
@consume_option("shard of SOURCE", "all of it is in finished partitions")
@hub_options
@work_options
@json_option
def split_command(
    source: str | None,
    output: Path,
    num_parts: int | None,
    split_by: SplitBy,
    rules_file: Path | None,
    by: By,
    weights: tuple[str, ...] | None,
    boundaries: tuple[str, ...] | None,
    tied: TiedMode,
    allow_unknown_dtypes: bool,
    nodes: NodeRequest | None,
    only: tuple[int, ...] | None,
    codec: CodecName,
    resume: bool,
    force: bool,
    buffered: bool,
    no_source_sha256: bool,
    parity: float | None,
    keep_source: bool,
    consume: bool,
    model_id: str | None,
    revision: str | None,
    cache_dir: Path | None,
    token: str | None,
    connections: int,
    threads: int | None,
    io: IoMode,
    quiet: bool,
    as_json: bool,
) -> None:
    """Split the checkpoint SOURCE into a partition set.

    SOURCE is a checkpoint's directory, one of its shards or its weights index, or a model of the Hub: org/name,
    org/name@revision.  A model of the Hub is split while it is downloaded; its shards never touch the disk.
    """
    if resume and force:
        raise click.UsageError("--resume and --force exclude each other")
    existing: Existing = "resume" if resume else "force" if force else "refuse"
    with ProgressDisplay(quiet) as progress:
        result = split(
            chosen_source(source, None if source else model_id),
            output,
            num_parts,
            by=by,
            weights=weights,
            boundaries=boundaries,
            tied=tied,
            split_by=split_by,
            rule=None if rules_file is None else read_rules(rules_file),
            nodes=nodes,
            only=only,
            codec=codec,
            threads=threads,
            existing=existing,
            io=io,
            direct=not buffered,
            source_sha256=not no_source_sha256,
            parity=parity,
            model_id=model_id if source else None,
            revision=revision,
            hub=hub_of(revision, cache_dir, token, connections)._replace(keep_source=keep_source),
            allow_unknown_dtypes=allow_unknown_dtypes,
            consume=consume,
            announce=announce_disk,
            progress=progress,
        )
    if as_json:
        echo_json(result.as_json())
    else:
        _show(result)
        notes(result.plan.notes)


def _show(result: SplitResult) -> None:
    if result.already_finished:
        echo(f"{result.path} holds this split already; nothing to do")
    elif result.resumed_bytes:
        echo(f"{size(result.resumed_bytes)} were there already, intact")
    if result.moved_bytes is not None:
        echo(f"{size(result.needed_bytes)} of the model needed, {size(result.moved_bytes)} moved over the network")
    echo(written_table(result.partitions, result.plan))
    if result.deleted:
        echo(f"\n  {len(result.deleted)} shard(s) of the source deleted: {', '.join(result.deleted)}")
    if result.root_digest is None:
        echo(f"\n  {len(result.partitions)} of {result.plan.num_parts} partitions; no set yet")
    else:
        echo(f"\n  root digest {result.root_digest}")
