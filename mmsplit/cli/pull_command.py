"""`mmsplit pull`."""

from __future__ import annotations

from pathlib import Path

import click

from mmsplit.cli.options import PART_IDS, PATH, json_option, root_option
from mmsplit.cli.progress import ProgressDisplay
from mmsplit.cli.render import clean, echo, echo_json, size, table
from mmsplit.cli.source_options import connections_option, token_option
from mmsplit.remote.source import HubOptions
from mmsplit.verbs.pull import PullResult, pull


@click.command("pull")
@click.argument("source", metavar="SOURCE")
@click.option("-o", "--output", type=PATH, required=True, help="Directory for the partition set.")
@click.option("--only", type=PART_IDS, metavar="K,…", help="Only these partitions, counted from 0.")
@root_option
@click.option("--revision", help="Branch, tag or commit on the Hub.  [default: main]")
@token_option()
@connections_option("Ranges that are fetched at once.")
@click.option("--force", is_flag=True, help="Fetch what is there and wrong again; replace another set of mmsplit's.")
@click.option("--buffered", is_flag=True, help="Write through the page cache, not past it.")
@click.option("-t", "--threads", type=click.IntRange(1, 1024), help="Threads that hash.  [default: processors]")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
def pull_command(
    source: str,
    output: Path,
    only: tuple[int, ...] | None,
    root_digest: str | None,
    revision: str | None,
    token: str | None,
    connections: int,
    force: bool,
    buffered: bool,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Get the partition set published at SOURCE, or some of its partitions; each byte is verified on arrival.

    SOURCE is a model of the Hub or a folder of it (org/name, org/name@revision:folder), the address of a folder
    (https://…, s3://…, whatever fsspec reaches), or a directory.  Interrupted, the same command goes on.
    """
    if source == "":
        raise click.UsageError("SOURCE is empty")
    with ProgressDisplay(quiet) as progress:
        result = pull(
            source,
            output,
            only=only,
            root_digest=root_digest,
            hub=HubOptions(revision=revision, token=token, connections=connections),
            force=force,
            threads=threads,
            direct=not buffered,
            progress=progress,
        )
    if as_json:
        echo_json(result.as_json())
    else:
        _show(result)


def _show(result: PullResult) -> None:
    rows = [
        (
            str(each.part_id),
            size(result.manifest.partitions[each.part_id].payload_bytes),
            size(each.fetched_bytes),
            size(each.present_bytes),
        )
        for each in result.partitions
    ]
    echo(table(("partition", "size", "fetched", "was there"), rows, (True, True, True, True)))
    of_all = f"{len(rows)} of {len(result.manifest.partitions)} partitions"
    echo(f"\n  {of_all} of {clean(result.manifest.model_id)}, all verified")
    echo(f"  root digest {result.root_digest}")
