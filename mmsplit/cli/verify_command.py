"""`mmsplit verify`."""

from __future__ import annotations

import shlex
from datetime import datetime, timedelta
from pathlib import Path

import click

from mmsplit.checkpoint import IoMode
from mmsplit.cli.options import PATH, json_option, root_option, unknown_dtypes_option, work_options
from mmsplit.cli.progress import ProgressDisplay
from mmsplit.cli.render import clean, echo, echo_json, fault_line, size
from mmsplit.cli.scrub_options import scrub_of, scrub_options
from mmsplit.cli.source_options import SOURCE, hub_of, hub_options
from mmsplit.errors import IntegrityError
from mmsplit.sidecar.partition_reader import Fault
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.verbs.verify import Level, verify


@click.command("verify")
@click.argument("path", metavar="SET", type=PATH)
@click.option(
    "--level",
    type=click.Choice(["quick", "stored", "full"]),
    default="stored",
    show_default=True,
    help="quick: structure and sizes; stored: every stored byte; full: and decode it all.",
)
@click.option("--against", type=SOURCE, help="A checkpoint, or a model of the Hub, to compare with, byte for byte.")
@root_option
@click.option("--signature", type=PATH, help="Demand the set that this signature vouches for; with --key.")
@click.option("--key", type=PATH, help="The public key to the signature: a PEM file.")
@scrub_options
@hub_options
@unknown_dtypes_option
@work_options
@json_option
def verify_command(
    path: Path,
    level: Level,
    against: str | None,
    root_digest: str | None,
    signature: Path | None,
    key: Path | None,
    subset: str | None,
    since: datetime | timedelta | None,
    history: Path | None,
    max_rate: int | None,
    revision: str | None,
    cache_dir: Path | None,
    token: str | None,
    connections: int,
    allow_unknown_dtypes: bool,
    threads: int | None,
    io: IoMode,
    quiet: bool,
    as_json: bool,
) -> int:
    """Verify the partition set SET, or one partition, and report all damage."""
    with ProgressDisplay(quiet) as progress:
        result = verify(
            path,
            level=level,
            against=against,
            root_digest=root_digest,
            signature=signature,
            public_key=key,
            hub=hub_of(revision, cache_dir, token, connections),
            allow_unknown_dtypes=allow_unknown_dtypes,
            scrub=scrub_of(subset, since, history, max_rate),
            threads=threads,
            io=io,
            progress=progress,
        )
    if result.single is not None:
        ids, num_parts = ", ".join(map(str, result.single.part_ids)), result.single.num_parts
        plural = "s" if len(result.single.part_ids) > 1 else ""
        click.echo(
            f"note: {SET_MANIFEST_NAME} is not here: partition{plural} {ids} of {num_parts} verified, each by itself",
            err=True,
        )
    if as_json:
        echo_json(result.as_json())
    elif result.ok:
        echo(
            f"ok: {result.partition_count} partition(s), {size(result.checked_bytes)} read, level {level}"
            + (f", subset {subset}" if subset else "")
            + (f", same as {against}" if against else "")
            + (f", bound by {result.root_digest}" if result.root_digest else "")
        )
    else:
        for fault in result.problems:
            echo(clean(fault_line(fault)))
        click.echo("mmsplit: " + "\n".join(map(clean, _advice(path, against, result.problems))), err=True)
    return 0 if result.ok else IntegrityError.exit_code


def _advice(path: Path, against: str | None, problems: tuple[Fault, ...]) -> list[str]:
    """What to do about problems, in lines."""
    root = path if path.is_dir() else path.parent
    of_set = [fault for fault in problems if Path(fault.file).is_relative_to(root)]
    found = f"{len(problems)} problem(s) found"
    if not of_set:
        return [f"{found}, all in {against}; nothing is wrong with {path}"]
    source = "SOURCE" if against is None or len(of_set) < len(problems) else shlex.quote(against)
    repair = f"mmsplit repair {shlex.quote(str(path))} --from {source}"
    lines = [f"{found}. Make what is damaged again with: {repair}"]
    if any(fault.what in ("manifest is missing", "payload is missing") for fault in of_set):
        one = shlex.quote(str(root / "partition_K.json"))
        lines.append(f"A node that has only some partitions verifies each by its name: mmsplit verify {one}")
    return lines
