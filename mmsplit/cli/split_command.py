"""`mmsplit split`."""

from __future__ import annotations

from pathlib import Path

import click

from mmsplit.checkpoint import IoMode
from mmsplit.cli.options import PATH, json_option, planning_options, work_options
from mmsplit.cli.progress import ProgressDisplay
from mmsplit.cli.render import echo, echo_json, layer_range, notes, percent, size, table
from mmsplit.codec import CodecName
from mmsplit.planning import By, TiedMode
from mmsplit.sidecar.output_directory import Existing
from mmsplit.verbs.split import SplitResult, split


@click.command("split")
@click.argument("source", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Directory for the partition set.")
@planning_options
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
@click.option("--model-id", help="Model id for the manifests.  [default: from the Hub cache, or the directory's name]")
@click.option("--revision", help="Revision for the manifests.  [default: from the Hub cache]")
@work_options
@json_option
def split_command(
    source: Path,
    output: Path,
    num_parts: int | None,
    by: By,
    weights: tuple[str, ...] | None,
    boundaries: tuple[str, ...] | None,
    tied: TiedMode,
    allow_unknown_dtypes: bool,
    codec: CodecName,
    resume: bool,
    force: bool,
    buffered: bool,
    model_id: str | None,
    revision: str | None,
    threads: int | None,
    io: IoMode,
    quiet: bool,
    as_json: bool,
) -> None:
    """Split the checkpoint SOURCE into a partition set."""
    if resume and force:
        raise click.UsageError("--resume and --force exclude each other")
    existing: Existing = "resume" if resume else "force" if force else "refuse"
    with ProgressDisplay(quiet) as progress:
        result = split(
            source,
            output,
            num_parts,
            by=by,
            weights=weights,
            boundaries=boundaries,
            tied=tied,
            codec=codec,
            threads=threads,
            existing=existing,
            io=io,
            direct=not buffered,
            model_id=model_id,
            revision=revision,
            allow_unknown_dtypes=allow_unknown_dtypes,
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
    rows = [
        (
            str(entry.part_id),
            layer_range(part.layers),
            size(entry.total_bytes),
            size(entry.stored_bytes),
            percent(entry.stored_bytes, entry.total_bytes),
        )
        for entry, part in zip(result.manifest.partitions, result.plan.partitions, strict=True)
    ]
    echo(table(("partition", "layers", "raw", "stored", "ratio"), rows, (True, False, True, True, True)))
    echo(f"\n  root digest {result.root_digest}")
