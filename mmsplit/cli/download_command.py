"""`mmsplit download`."""

from __future__ import annotations

from pathlib import Path

import click

from mmsplit.cli.options import PATH, json_option
from mmsplit.cli.progress import ProgressDisplay
from mmsplit.cli.render import clean, echo, echo_json, notes, size, table
from mmsplit.cli.source_options import hub_options
from mmsplit.verbs.download import DownloadResult, download


@click.command("download")
@click.argument("model_id", metavar="ID[@REVISION]")
@hub_options
@click.option("--local-dir", type=PATH, help="A plain folder for the files, instead of the cache.")
@click.option("--include", multiple=True, metavar="GLOB", help="Download exactly what matches; may be repeated.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out what matches; may be repeated.")
@click.option("--verify", is_flag=True, help="Hash large files that are there already, too.")
@click.option("--force", is_flag=True, help="Replace files in --local-dir that are not those of the Hub.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
def download_command(
    model_id: str,
    revision: str | None,
    cache_dir: Path | None,
    local_dir: Path | None,
    token: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    connections: int,
    verify: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Download the files that matter of the model ID; stopped, the same command continues."""
    if cache_dir is not None and local_dir is not None:
        raise click.UsageError("--cache-dir and --local-dir exclude each other")
    try:
        with ProgressDisplay(quiet) as progress:
            result = download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                local_dir=local_dir,
                token=token,
                include=include,
                exclude=exclude,
                connections=connections,
                verify=verify,
                force=force,
                progress=progress,
            )
    except KeyboardInterrupt:
        click.echo("mmsplit: interrupted. The same command continues from what is there.", err=True)
        return 130
    if as_json:
        echo_json(result.as_json())
    else:
        _show(result)
        notes(result.notes)
    return 0


def _show(result: DownloadResult) -> None:
    echo(clean(str(result.path)))
    rows = [(file.name, size(file.size_bytes), file.status) for file in result.files]
    echo(table(("file", "size", ""), rows, (False, True, False)))
    moved = f"{size(result.downloaded_bytes)} downloaded"
    if result.resumed_bytes:
        moved += f", {size(result.resumed_bytes)} continued from an earlier run"
    if result.present_bytes:
        moved += f", {size(result.present_bytes)} there already"
    echo(f"\n  {moved}; commit {result.commit}")
