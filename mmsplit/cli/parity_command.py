"""`mmsplit parity`."""

from __future__ import annotations

from pathlib import Path

import click

from mmsplit.cli.options import PART_IDS, PATH, PERCENT, json_option
from mmsplit.cli.progress import ProgressDisplay
from mmsplit.cli.render import echo, echo_json, size, table
from mmsplit.cli.render import percent as share
from mmsplit.verbs.parity import ParityResult, parity


@click.command("parity")
@click.argument("path", metavar="SET", type=PATH)
@click.option(
    "--percent",
    type=PERCENT,
    default="2%",
    show_default=True,
    help="How much of each payload, 0.5% to 50%: about as much may be lost.",
)
@click.option("--only", type=PART_IDS, metavar="K,…", help="Only these partitions, counted from 0.")
@click.option("-t", "--threads", type=click.IntRange(1, 1024), help="Threads that compute.  [default: processors]")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
def parity_command(
    path: Path, percent: float, only: tuple[int, ...] | None, threads: int | None, quiet: bool, as_json: bool
) -> None:
    """Make a parity file beside each payload of SET, or of one partition: repair then needs no source.

    One that is there is kept if it is sound and of that percentage, else made again.
    """
    with ProgressDisplay(quiet) as progress:
        result = parity(path, percent, only=only, threads=threads, progress=progress)
    if as_json:
        echo_json(result.as_json())
    else:
        _show(result)


def _show(result: ParityResult) -> None:
    rows = [
        (
            entry.file,
            size(entry.parity_bytes),
            share(entry.parity_bytes, entry.payload_bytes),
            size(entry.longest_loss_bytes),
            f"{entry.parity_count} of {entry.block_bytes:,}",
            "made" if entry.is_new else "there already",
        )
        for entry in result.partitions
    ]
    header = ("file", "size", "of payload", "one loss of up to", "or any blocks of bytes", "")
    echo(table(header, rows, (False, True, True, True, True, False)))
