"""Tables and sizes as a person reads them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import click

if TYPE_CHECKING:  # every command prints, few read payloads: numpy alone takes 0.1 s to import
    from mmsplit.planning import Plan, PlannedPartition
    from mmsplit.sidecar.partition_reader import Fault
    from mmsplit.sidecar.set_manifest import PartitionEntry

#: Longest text in a cell of a table, in characters.
_CELL_LIMIT: Final = 120
_UNITS: Final = ("", "k", "M", "G", "T", "P")


class LayerLike(Protocol):
    """What planned layers and layers in a manifest have in common."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def layer_type(self) -> str: ...  # noqa: D102
    @property
    def stack(self) -> str | None: ...  # noqa: D102
    @property
    def total_params(self) -> int: ...  # noqa: D102
    @property
    def total_bytes(self) -> int: ...  # noqa: D102


def clean(text: str, limit: int | None = None) -> str:
    """Escape what does not print: names come from files of strangers, and a terminal obeys what it is sent."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return shown if limit is None or len(shown) <= limit else f"{shown[: limit - 1]}…"


def echo(text: str) -> None:
    """Print a line of the result.  That its reader has gone is not our error: the command ends as it would have."""
    try:
        click.echo(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def echo_json(value: object) -> None:
    """Print a result for programs."""
    echo(json.dumps(value, indent=1))


def size(count_bytes: float) -> str:
    """Return bytes with a decimal unit: 2.47 GB."""
    return f"{_scaled(count_bytes)}B"


def count(number: float) -> str:
    """Return a count with a decimal unit: 1.24 G."""
    return _scaled(number).rstrip()


def _scaled(number: float) -> str:
    power = 0
    while abs(number) >= 999.5 and power < len(_UNITS) - 1:
        number /= 1000
        power += 1
    decimals = 0 if power == 0 or abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    digits = f"{number:.{decimals}f}"
    return f"{digits} {_UNITS[power]}"


def percent(part: float, whole: float) -> str:
    """Return a share: 66.4 %."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[bool]) -> str:
    """Return aligned columns; numeric ones are set to the right."""
    lines = [list(head), *([clean(cell, _CELL_LIMIT) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  "
        + "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def contents(part: PlannedPartition) -> str:
    """Return first and last layer, and those that moved there: model.embed_tokens … model.layers.7, lm_head."""
    layers = part.layers
    names = [layer.name for layer in layers if not layer.moved]
    span = names if len(names) < 2 else [f"{names[0]} … {names[-1]}"]
    found = ", ".join([*span, *(layer.name for layer in layers if layer.moved)]) or "-"
    return found if part.label is None else f"{part.label}: {found}"


def written_table(entries: Sequence[PartitionEntry], plan: Plan) -> str:
    """Return a table of partitions that were written, with the machine that each is for where the plan has any."""
    rows = []
    for entry in entries:
        part = plan.partitions[entry.part_id]
        ratio = percent(entry.stored_bytes, entry.total_bytes)
        node = () if plan.placement is None else (part.node or "-",)
        rows.append(
            (*node, str(entry.part_id), contents(part), size(entry.total_bytes), size(entry.stored_bytes), ratio)
        )
    heads = (*(() if plan.placement is None else ("node",)), "partition", "layers", "raw", "stored", "ratio")
    return table(heads, rows, [head not in {"node", "layers"} for head in heads])


def layer_table(layers: Sequence[LayerLike], *, every: bool) -> str:
    """Return a table of layers; unless `every`, neighbours of one stack and size share a line."""
    rows = []
    for group in _groups(layers, every):
        first, last = group[0], group[-1]
        name = first.name if len(group) == 1 else f"{first.name} … {last.name.rpartition('.')[2]}"
        each = "" if len(group) == 1 else f"{len(group)} x "
        rows.append((name, first.layer_type, f"{each}{count(first.total_params)}", f"{each}{size(first.total_bytes)}"))
    return table(("layer", "type", "params", "size"), rows, (False, False, True, True))


def _groups(layers: Sequence[LayerLike], every: bool) -> list[list[LayerLike]]:
    groups: list[list[LayerLike]] = []
    for layer in layers:
        previous = groups[-1][-1] if groups else None
        if (
            not every
            and previous is not None
            and layer.stack is not None
            and (layer.stack, layer.total_params, layer.total_bytes)
            == (previous.stack, previous.total_params, previous.total_bytes)
        ):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def notes(lines: Iterable[str]) -> None:
    """Print notes to stderr."""
    for line in lines:
        click.echo(f"note: {clean(line)}", err=True)


def fault_line(fault: Fault) -> str:
    """Return where a fault lies and what it is: file, layer, tensor, bytes."""
    where = [fault.file]
    if fault.layer is not None:
        where.append(f"layer {fault.layer}")
    if fault.tensor is not None:
        where.append(f"tensor {fault.tensor}")
    if fault.start is not None and fault.stop is not None:
        where.append(f"bytes {fault.start:,} to {fault.stop:,}")
    return f"{', '.join(where)}: {fault.what}"
