"""`mmsplit bench`."""

from __future__ import annotations

from pathlib import Path

import click

from mmsplit.benchmark.bench import DEFAULT_SAMPLE_BYTES, BenchResult, bench, planned_write_bytes
from mmsplit.cli.options import PATH, json_option
from mmsplit.cli.render import echo, echo_json, percent, size, table

#: More than this is written only after asking.
_ASK_ABOVE_BYTES = 4_000_000_000


@click.command("bench")
@click.argument("source", type=PATH, required=False)
@click.option("--out", type=PATH, help="Directory on the disk to measure.  [default: for temporary files]")
@click.option(
    "--sample-gb",
    type=click.FloatRange(0.01, 1000),
    default=DEFAULT_SAMPLE_BYTES / 1e9,
    show_default=True,
    help="How much of the checkpoint to work on.",
)
@click.option("--model-gb", type=click.FloatRange(0.001), help="Also estimate the times for a model of this size.")
@click.option("-t", "--threads", type=click.IntRange(1, 1024), help="Most threads to try.  [default: processors]")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before writing much.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
def bench_command(
    source: Path | None,
    out: Path | None,
    sample_gb: float,
    model_gb: float | None,
    threads: int | None,
    yes: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure this machine: read, hash, encode, decode, write, split, verify, load; and say what limits it.

    Works on whole layers of SOURCE, or on a synthetic checkpoint, and cleans up after itself.
    """
    sample_bytes = int(sample_gb * 1e9)
    writes = planned_write_bytes(sample_bytes, synthetic=source is None)
    if (
        writes > _ASK_ABOVE_BYTES
        and not yes
        and not click.confirm(f"This writes up to {size(writes)}. Go on?", err=True)
    ):
        click.echo("not run", err=True)
        return
    say = (lambda _: None) if quiet else (lambda step: click.echo(f"{step} …", err=True))
    result = bench(source, out, sample_bytes=sample_bytes, threads=threads, say=say)
    estimate = {} if model_gb is None else {"seconds_for_model": result.seconds_for(int(model_gb * 1e9))}
    if as_json:
        echo_json(result.as_json() | estimate)
        return
    _show(result)
    if model_gb is not None:
        seconds = result.seconds_for(int(model_gb * 1e9))
        times = ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items())
        echo(f"\n  a model of {model_gb:g} GB: {times}")


def _show(result: BenchResult) -> None:
    cold = "cold" if result.cold else "cached"
    rows = [
        (f"read, {cold}", "disk", _rate(result.read)),
        ("write, durable" + (", O_DIRECT" if result.direct else ""), "disk", _rate(result.write)),
        ("copy in memory", "1 thread", _rate(result.copy)),
        ("xxh3 checksum", "1 thread", _rate(result.checksum)),
        ("SHA-256", "1 thread", _rate(result.digest)),
    ]
    for item in result.dtypes:
        name = f"{item.dtype} (to {percent(item.ratio, 1)})"
        rows.append((f"encode {name}", "1 thread", _rate(item.encode_one)))
        rows.append((f"encode {name}", _threads(result.threads), _rate(item.encode_all)))
        rows.append((f"decode {name}", "1 thread", _rate(item.decode_one)))
        rows.append((f"decode {name}", _threads(result.threads), _rate(item.decode_all)))
    rows += [
        ("split, source cold" if result.cold else "split", _threads(count), _rate(rate))
        for count, rate in result.split_by_threads.items()
    ]
    rows.append((f"verify, {cold}", _threads(result.threads), _rate(result.verify)))
    rows.append((f"load, {cold}", _threads(result.threads), _rate(result.load)))
    echo(f"{result.source}, {size(result.sample_bytes)} of it\n")
    echo(table(("what", "by", "rate"), rows, (False, False, True)))
    limits = ", ".join(
        f"{name} {_rate(rate)}" for name, rate in sorted(result.limits.items(), key=lambda item: item[1])
    )
    echo(f"\n  rates are raw bytes; a split here is limited by the {result.bottleneck} ({limits})\n  {_advice(result)}")


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _advice(result: BenchResult) -> str:
    """Which --threads to use and, where it is not the fastest, why."""
    best, rates = result.best_threads, result.split_by_threads
    fastest = max(rates, key=lambda count: rates[count])
    advice = f"use --threads {best}"
    if best != fastest:
        more = rates[fastest] / rates[best] - 1
        advice += (
            f": {_threads(fastest)} are {100 * more:.0f} % faster, which is within the noise of such a measurement"
        )
    return advice


def _rate(bytes_per_second: float) -> str:
    return f"{size(bytes_per_second)}/s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
