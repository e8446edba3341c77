"""The machines of a plan: what `nodes.toml` says about them, parsed and held to its rules.  Pure.

order = "file"        # the pipeline in the order written here; "any": in the order that is best
reserve = 0.1         # kept free on every node: a fraction of its memory, or an amount ("2 GiB")

[[node]]
name = "desktop"
memory = "24 GiB"     # what the node has for the model
disk = "100 GB"       # optional: room for its partition
speed = 3             # optional: relative to the others, for the objective "speed"
share = 2             # optional: the share of the model it should get, relative to the others
reserve = "2 GiB"     # optional: instead of the one above
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Final, Literal, NamedTuple, get_args

from mmsplit.errors import PlanError
from mmsplit.planning.toml_fields import parse_toml, require_known, show_value, wrong_field

#: Which node comes first in the pipeline: as written, or whichever order is best.
NodeOrder = Literal["file", "any"]

#: vLLM leaves the same tenth of a GPU alone (`gpu_memory_utilization` 0.9): activations, the runtime, fragments.
DEFAULT_RESERVE: Final = 0.1
MAX_NODES: Final = 1024

_NODE_KEYS: Final = ("name", "memory", "disk", "speed", "share", "reserve")
_FILE_KEYS: Final = ("order", "reserve", "node")
_UNIT_BYTES: Final = {
    "B": 1,
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGTP", 1)},
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", 1)},
    "kB": 1000,
}
_SIZE: Final = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]{1,3})", re.ASCII)
_MAX_BYTES: Final = 1 << 60
_SIZE_EXPECTED: Final = "an amount such as '24 GiB' or '24 GB', or a number of bytes"
_RESERVE_EXPECTED: Final = "a fraction from 0 to below 1, or an amount such as '2 GiB' below the node's memory"


class Node(NamedTuple):
    """One machine.  `reserve_bytes` of its memory are kept free; `disk_bytes` None means nobody said."""

    name: str
    memory_bytes: int
    reserve_bytes: int
    disk_bytes: int | None = None
    speed: Fraction | None = None
    share: Fraction | None = None

    @property
    def usable_bytes(self) -> int:
        """Memory that the plan may fill."""
        return self.memory_bytes - self.reserve_bytes


class NodeList(NamedTuple):
    """The machines of a nodes file, in its order."""

    nodes: tuple[Node, ...]
    order: NodeOrder = "file"


def binary_size(count_bytes: int) -> str:
    """Return bytes as memory is sold: 13.2 GiB."""
    amount, unit = float(count_bytes), 0
    while abs(amount) >= 1023.5 and unit < len("KMGTP"):
        amount /= 1024
        unit += 1
    if unit == 0:
        return f"{count_bytes} B"
    return f"{amount:.{0 if abs(amount) >= 99.95 else 1 if abs(amount) >= 9.995 else 2}f} {' KMGTP'[unit]}iB"


def parse_reserve(text: str) -> float | str:
    """Return a reserve as the command line has it: a fraction where it is a plain number, else an amount."""
    return float(text) if re.fullmatch(r"[0-9]*\.?[0-9]+", text, re.ASCII) else text


def parse_nodes(text: str, where: str, reserve: float | str | None = None) -> NodeList:
    """Parse a nodes file.  `where` names it in errors; `reserve` replaces the file's own default.

    Raises `PlanError` naming node and field.
    """
    document = parse_toml(text, "nodes", where)
    return nodes_of(document, where, reserve)


def nodes_of(document: Mapping[str, object], where: str, reserve: float | str | None = None) -> NodeList:
    """Return the nodes of a document that is parsed already; arguments and errors as for `parse_nodes`."""
    require_known(document, _FILE_KEYS, "the file", where)
    order = document.get("order", "file")
    if order not in get_args(NodeOrder):
        raise wrong_field(where, "the file", "order", " or ".join(map(repr, get_args(NodeOrder))), order)
    tables = document.get("node")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        found = "none" if tables is None else tables
        raise wrong_field(where, "the file", "node", "a table [[node]] for each machine", found)
    if len(tables) > MAX_NODES:
        raise wrong_field(where, "the file", "node", f"at most {MAX_NODES} of them", len(tables))
    default = document.get("reserve", DEFAULT_RESERVE)
    nodes = tuple(_node(table, position, default, reserve, where) for position, table in enumerate(tables))
    seen: set[str] = set()
    for node in nodes:
        if node.name in seen:
            raise wrong_field(where, f"node {node.name!r}", "name", "a name of its own", node.name)
        seen.add(node.name)
    return NodeList(nodes, "any" if order == "any" else "file")


def _node(table: Mapping[str, object], position: int, default: object, asked: float | str | None, where: str) -> Node:
    name = table.get("name")
    if not isinstance(name, str) or not name.strip() or len(name) > 100 or not name.isprintable():
        found = "none" if name is None else name
        raise wrong_field(where, f"node {position + 1}", "name", "printable text of at most 100 characters", found)
    who = f"node {name!r}"
    require_known(table, _NODE_KEYS, who, where)
    if "memory" not in table:
        raise wrong_field(where, who, "memory", _SIZE_EXPECTED, "none")
    memory = _size(table["memory"], where, who, "memory")
    if memory == 0:
        raise wrong_field(where, who, "memory", _SIZE_EXPECTED, table["memory"])
    written = table.get("reserve", default if asked is None else None)
    reserve = _reserve_bytes(asked if written is None else written, memory)
    if reserve is None and written is None:
        raise PlanError(
            f"the reserve asked for is none for {who}",
            expected=_RESERVE_EXPECTED,
            found=show_value(asked),
            hint="Correct --reserve (reserve=).",
        )
    if reserve is None:
        raise wrong_field(where, who, "reserve", _RESERVE_EXPECTED, written)
    return Node(
        name=name,
        memory_bytes=memory,
        reserve_bytes=reserve,
        disk_bytes=_size(table["disk"], where, who, "disk") if "disk" in table else None,
        speed=_ratio(table["speed"], where, who, "speed") if "speed" in table else None,
        share=_ratio(table["share"], where, who, "share") if "share" in table else None,
    )


def _size(value: object, where: str, who: str, field: str) -> int:
    size = _size_bytes(value)
    if size is None:
        raise wrong_field(where, who, field, f"{_SIZE_EXPECTED}, up to 1024 PiB", value)
    return size


def _size_bytes(value: object) -> int | None:
    if type(value) is int and 0 <= value <= _MAX_BYTES:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is not None and match[2] in _UNIT_BYTES:
        count = int(Fraction(match[1]) * _UNIT_BYTES[match[2]])
        if count <= _MAX_BYTES:
            return count
    return None


def _reserve_bytes(value: object, memory: int) -> int | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
        return int(memory * Fraction(str(value)))
    amount = _size_bytes(value) if isinstance(value, str) else None
    return amount if amount is not None and amount < memory else None


def _ratio(value: object, where: str, who: str, field: str) -> Fraction:
    """A number as it is written: 0.3 is three tenths, not the float next to it."""
    least = 0 if field == "share" else 1e-9
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= 1e9:
        return Fraction(str(value)).limit_denominator(10**9)
    expected = "a number from 0 to 1e9" if field == "share" else "a number above 0, up to 1e9"
    raise wrong_field(where, who, field, expected, value)
