"""`mmsplit repartition`."""

from __future__ import annotations

from pathlib import Path

import click

from mmsplit.checkpoint import IoMode
from mmsplit.cli.node_options import node_options
from mmsplit.cli.options import PART_IDS, PATH, json_option, root_option, set_planning_options, work_options
from mmsplit.cli.progress import ProgressDisplay
from mmsplit.cli.render import echo, echo_json, notes, size, written_table
from mmsplit.cli.source_options import connections_option, token_option
from mmsplit.planning import By, NodeRequest, SplitBy, TiedMode
from mmsplit.remote.source import HubOptions
from mmsplit.sidecar.output_directory import Existing
from mmsplit.verbs.plan import read_rules
from mmsplit.verbs.repartition import RepartitionResult, repartition


@click.command("repartition")
@click.argument("source", metavar="SET")
@click.option("-o", "--output", type=PATH, required=True, help="Directory for the new partition set.")
@set_planning_options
@node_options
@click.option(
    "--only",
    type=PART_IDS,
    metavar="K,…",
    help="Write only these partitions, counted from 0; only payloads that hold bytes of them are read.",
)
@root_option
@click.option("--resume", is_flag=True, help="Go on with an unfinished repartition of the same set and plan.")
@click.option("--force", is_flag=True, help="Replace what mmsplit wrote to the output before.")
@click.option("--buffered", is_flag=True, help="Write through the page cache, not past it.")
@click.option("--revision", help="Branch, tag or commit on the Hub.  [default: main]")
@token_option()
@connections_option("Ranges of a set elsewhere that are fetched at once.")
@work_options
@json_option
def repartition_command(
    source: str,
    output: Path,
    num_parts: int | None,
    split_by: SplitBy,
    rules_file: Path | None,
    by: By,
    weights: tuple[str, ...] | None,
    boundaries: tuple[str, ...] | None,
    tied: TiedMode | None,
    nodes: NodeRequest | None,
    only: tuple[int, ...] | None,
    root_digest: str | None,
    resume: bool,
    force: bool,
    buffered: bool,
    revision: str | None,
    token: str | None,
    connections: int,
    threads: int | None,
    io: IoMode,
    quiet: bool,
    as_json: bool,
) -> None:
    """Cut the model of the partition set SET another way; encoded chunks are moved as they are, each one verified.

    SET is a directory, or a published set as `mmsplit pull` takes it.  The result is byte for byte what a split of the
    original checkpoint with the same options and codec gives; the checkpoint itself is not needed.
    """
    if source == "":
        raise click.UsageError("SET is empty")
    if resume and force:
        raise click.UsageError("--resume and --force exclude each other")
    existing: Existing = "resume" if resume else "force" if force else "refuse"
    with ProgressDisplay(quiet) as progress:
        result = repartition(
            source,
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
            root_digest=root_digest,
            threads=threads,
            existing=existing,
            io=io,
            direct=not buffered,
            hub=HubOptions(revision=revision, token=token, connections=connections),
            progress=progress,
        )
    if as_json:
        echo_json(result.as_json())
    else:
        _show(result)
        notes(result.plan.notes)


def _show(result: RepartitionResult) -> None:
    if result.already_finished:
        echo(f"{result.path} holds this set already; nothing to do")
    elif result.resumed_bytes:
        echo(f"{size(result.resumed_bytes)} were there already, intact")
    echo(written_table(result.partitions, result.plan))
    if not result.already_finished:
        echo(f"\n  {_moved(result)}")
    if result.root_digest is None:
        echo(f"  {len(result.partitions)} of {result.plan.num_parts} partitions; no set yet")
    else:
        echo(f"  root digest {result.root_digest}")


def _moved(result: RepartitionResult) -> str:
    said = [f"{size(result.copied_bytes)} of encoded chunks copied"]
    if result.shared_bytes:
        said.append(f"{size(result.shared_bytes)} shared with the input")
    if result.encoded_bytes:
        said.append(f"{size(result.encoded_bytes)} encoded again")
    return ", ".join(said) + "; each compared with its checksum"
