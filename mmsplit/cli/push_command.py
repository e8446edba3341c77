"""`mmsplit push`."""

from __future__ import annotations

from pathlib import Path

import click

from mmsplit.cli.options import PATH, json_option
from mmsplit.cli.progress import ProgressDisplay
from mmsplit.cli.render import echo, echo_json, size
from mmsplit.cli.source_options import token_option
from mmsplit.remote.source import HubOptions
from mmsplit.verbs.push import push


@click.command("push")
@click.argument("path", metavar="SET", type=PATH)
@click.argument("target", metavar="ID")
@click.option("--private", is_flag=True, help="Make the repository a private one.")
@click.option("--revision", help="Branch to publish to; made if it is not there.  [default: main]")
@token_option("Access token with write permission")
@click.option("--force", is_flag=True, help="Replace another set, or files of other content, that are there.")
@click.option("-t", "--threads", type=click.IntRange(1, 1024), help="Threads that hash.  [default: processors]")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
def push_command(
    path: Path,
    target: str,
    private: bool,
    revision: str | None,
    token: str | None,
    force: bool,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Verify the partition set SET and publish it on the Hub as ID: org/name, org/name@branch or org/name:folder.

    One commit names all files, so that nobody sees half of them.  Interrupted, the same command goes on.
    """
    with ProgressDisplay(quiet) as progress:
        result = push(
            path,
            target,
            private=private,
            force=force,
            hub=HubOptions(revision=revision, token=token),
            threads=threads,
            progress=progress,
            show_upload=not quiet,
        )
    if as_json:
        echo_json(result.as_json())
        return
    echo(result.url)
    click.echo(f"{result.file_count} files, {size(result.total_bytes)} of partitions, page {result.card}", err=True)
    click.echo(f"get it: mmsplit pull {result.place} -o DIR --root {result.root_digest}", err=True)
