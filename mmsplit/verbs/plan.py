"""`plan`: who would get what, from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mmsplit.checkpoint import Checkpoint
from mmsplit.errors import PlanError
from mmsplit.planning import (
    By,
    NodeList,
    NodeRequest,
    Plan,
    PlanRequest,
    Rule,
    RuleList,
    SplitBy,
    TiedMode,
    notes_before_split,
    parse_nodes,
    parse_rules,
    plan_for_nodes_or_parts,
)
from mmsplit.remote.source import HubOptions, open_source

#: A file of a thousand machines is a tenth of this.
_MAX_TOML_BYTES: Final = 1 << 20


def plan(
    source: str | Path | Checkpoint,
    num_parts: int | None = None,
    *,
    by: By = "bytes",
    weights: Sequence[float | str] | None = None,
    boundaries: Sequence[str] | None = None,
    tied: TiedMode = "duplicate",
    split_by: SplitBy = "layer",
    rule: Rule | None = None,
    nodes: NodeRequest | None = None,
    hub: HubOptions | None = None,
    allow_unknown_dtypes: bool = False,
) -> Plan:
    """Plan the partitions of a checkpoint; no weight is read.

    `source` is a directory, a shard, a weights index, an open checkpoint, or a model of the Hub (`org/name`, reached as
    `hub` says).  With `nodes` (see `read_nodes`) the plan puts the model on those machines, and nobody else says into
    how many partitions.  `rule` takes a function, or what `read_rules` returns.  The other arguments are those of
    `PlanRequest`.  Raises `CheckpointError`, `NetworkError` or
    `PlanError`.
    """
    source = open_source(source, hub, allow_unknown_dtypes=allow_unknown_dtypes)
    request = PlanRequest(
        num_parts=num_parts,
        by=by,
        weights=weights,
        boundaries=boundaries,
        tied=tied,
        split_by=split_by,
        rule=rule,
    )
    planned = plan_for_nodes_or_parts(source, request, nodes)
    return planned._replace(notes=notes_before_split(planned, source.config))


def read_nodes(path: str | Path, reserve: float | str | None = None) -> NodeList:
    """Read a nodes file (TOML; see `mmsplit.planning.nodes`).  `reserve` replaces the file's own default.

    Raises `PlanError` naming the node and the field.
    """
    return parse_nodes(_read_toml(path, "nodes"), str(path), reserve)


def read_rules(path: str | Path) -> RuleList:
    """Read a rules file (TOML; see `mmsplit.planning.rule_cut`): what `rule` takes.

    Raises `PlanError` naming the rule and the field.
    """
    return parse_rules(_read_toml(path, "rules"), str(path))


def _read_toml(path: str | Path, kind: str) -> str:
    """Read a small text file; `kind` says in errors what it is for."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_TOML_BYTES + 1)
    except OSError as error:
        hint = "Give the path of a TOML file that you may read."
        raise PlanError(f"{kind} file cannot be read: {error.strerror or error}", path=path, hint=hint) from error
    if len(data) > _MAX_TOML_BYTES:
        expected = f"at most {_MAX_TOML_BYTES:,} bytes"
        raise PlanError(f"{kind} file is too long", path=path, expected=expected, hint="Is this the file you meant?")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        hint = "Save it as UTF-8."
        raise PlanError(f"{kind} file is not UTF-8", path=path, offset=error.start, hint=hint) from error
