"""`mmsplit merge`."""

from __future__ import annotations

from pathlib import Path

import click

from mmsplit.checkpoint import IoMode
from mmsplit.cli.consume_option import announce_disk, consume_option
from mmsplit.cli.options import PATH, json_option, root_option, work_options
from mmsplit.cli.progress import ProgressDisplay
from mmsplit.cli.render import echo, echo_json, size
from mmsplit.verbs.merge import MergeResult, merge


@click.command("merge")
@click.argument("path", metavar="SET", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Directory for the checkpoint.")
@click.option("--resume", is_flag=True, help="Keep shards that are there and right, make the rest.")
@consume_option("partition's payload", "all of it is in finished shards")
@root_option
@work_options
@json_option
def merge_command(
    path: Path,
    output: Path,
    resume: bool,
    consume: bool,
    root_digest: str | None,
    threads: int | None,
    io: IoMode,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge the partition set SET into the original checkpoint, byte for byte."""
    with ProgressDisplay(quiet) as progress:
        result = merge(
            path,
            output,
            resume=resume,
            consume=consume,
            root_digest=root_digest,
            announce=announce_disk,
            threads=threads,
            io=io,
            progress=progress,
        )
    if as_json:
        echo_json(result.as_json())
        return
    for shard in result.shards:
        kept = "  (was there already)" if shard.name in result.kept else ""
        digest = "no SHA-256 was recorded" if shard.sha256 is None else shard.sha256.removeprefix("sha256:")
        echo(f"{digest}  {result.path / shard.name}{kept}")
    click.echo(f"{size(result.total_bytes)} in {len(result.shards)} shard(s), {_held_to(result)}", err=True)
    if result.deleted:
        click.echo(f"the partition set {path} is deleted: its shards are read back and right", err=True)


def _held_to(result: MergeResult) -> str:
    """Say what the shards were compared with: the Hub may have published the SHA-256 of some of them only."""
    recorded = sum(shard.sha256 is not None for shard in result.shards)
    if recorded == len(result.shards):
        return "SHA-256 as split"
    checked = "the checksums of all chunks are right"
    return f"{checked}; {'no SHA-256 was recorded' if not recorded else f'SHA-256 as split of {recorded}'}"
