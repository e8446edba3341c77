"""`mmsplit repair`."""

from __future__ import annotations

from pathlib import Path

import click

from mmsplit.cli.options import PART_IDS, PATH, json_option, root_option
from mmsplit.cli.progress import ProgressDisplay
from mmsplit.cli.render import clean, echo, echo_json, fault_line, size, table
from mmsplit.cli.source_options import SOURCE, hub_of, hub_options
from mmsplit.errors import IntegrityError
from mmsplit.verbs.repair import RepairLevel, RepairResult, repair


@click.command("repair")
@click.argument("path", metavar="SET", type=PATH)
@click.option(
    "--from",
    "sources",
    type=SOURCE,
    multiple=True,
    metavar="SOURCE",
    help="Checkpoint (a path, a model of the Hub), or another copy of the set (a directory, or what pull takes)."
    " Several are asked in order.",
)
@click.option("--only", type=PART_IDS, metavar="K,…", help="Only these partitions, counted from 0.")
@click.option(
    "--level",
    type=click.Choice(["quick", "stored", "full"]),
    default="stored",
    show_default=True,
    help="How closely to look for damage, as in verify.",
)
@click.option("--rebuild-manifest", is_flag=True, help="Only bring lost partition_K.json back, from the payloads.")
@root_option
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@hub_options
@click.option("-t", "--threads", type=click.IntRange(1, 1024), help="Threads that compute.  [default: processors]")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
def repair_command(
    path: Path,
    sources: tuple[str, ...],
    only: tuple[int, ...] | None,
    level: RepairLevel,
    rebuild_manifest: bool,
    root_digest: str | None,
    dry_run: bool,
    revision: str | None,
    cache_dir: Path | None,
    token: str | None,
    connections: int,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Repair the partition set SET, or one partition: what is damaged is made again, byte for byte, and verified."""
    with ProgressDisplay(quiet) as progress:
        result = repair(
            path,
            sources,
            only=only,
            level=level,
            rebuild_manifest=rebuild_manifest,
            root_digest=root_digest,
            dry_run=dry_run,
            hub=hub_of(revision, cache_dir, token, connections),
            threads=threads,
            progress=progress,
        )
    if as_json:
        echo_json(result.as_json())
    else:
        _show(result)
    return 0 if result.ok else IntegrityError.exit_code


def _show(result: RepairResult) -> None:
    rows = [
        (
            clean(Path(item.file).name),
            clean(item.what if item.tensor is None else f"{item.what} of {item.tensor}"),
            "" if item.start is None or item.stop is None else f"{item.start:,} to {item.stop:,}",
            clean(item.source or ""),
        )
        for item in result.mended
    ]
    if rows:
        header = ("file", "to repair" if result.dry_run else "repaired", "bytes", "from")
        echo(table(header, rows, (False, False, True, False)))
    for fault in result.problems:
        echo(clean(fault_line(fault)))
    count = f"{len(result.partitions)} partition(s)"
    if result.problems:
        click.echo(f"mmsplit: {len(result.problems)} problem(s) left, {len(rows)} thing(s) repaired", err=True)
    elif not rows:
        echo(f"ok: nothing to repair in {count}")
    elif result.dry_run:
        echo(f"\n  {len(rows)} thing(s) to repair in {count}; nothing was done")
    else:
        echo(
            f"\n  {len(rows)} thing(s) repaired in {count}, {size(result.source_bytes)} read from the source; all whole"
        )
