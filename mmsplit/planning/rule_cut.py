r"""A cut by one's own rule: which partition gets a tensor, as a function or as a file of patterns.  Pure.

default = 0           # optional: the partition of what no rule matches

[[rule]]
match = "*.mlp.*"     # a pattern over whole tensor names: * is any text, ? any character, [ab] one of these
partition = 1

[[rule]]
regex = 'layers\.[0-3]\.'  # or a regular expression that is found anywhere in the name
partition = 2

The first rule that matches wins.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mmsplit.checkpoint import TensorInfo
from mmsplit.errors import PlanError
from mmsplit.layers import Layer
from mmsplit.planning.plan import PlannedLayer
from mmsplit.planning.planner import MAX_PARTS, Rule
from mmsplit.planning.sublayers import Cut, Placed, shown
from mmsplit.planning.ties import Tie
from mmsplit.planning.toml_fields import parse_toml, require_known, show_value, wrong_field

MAX_RULES: Final = 1024
_MAX_PATTERN: Final = 1000
_FILE_KEYS: Final = ("default", "rule")
_RULE_KEYS: Final = ("match", "regex", "partition")
#: A group that repeats and is itself repeated: matching it can take longer than anyone lives.
_NESTED_REPEAT: Final = re.compile(r"\((?:[^()\\]|\\.)*[*+}](?:[^()\\]|\\.)*\)[*+{]")


@dataclass(frozen=True, slots=True)
class RuleList:
    """The rules of a file: patterns over tensor names, the first that matches wins; else `default`, if there is one."""

    rules: tuple[tuple[re.Pattern[str], int], ...]
    default: int | None = None

    def __call__(self, tensor: TensorInfo) -> int | None:
        """Return the partition of a tensor, or None."""
        return next((part_id for pattern, part_id in self.rules if pattern.search(tensor.name)), self.default)


def cut_by_rule(layers: Sequence[Layer], tensors: Mapping[str, TensorInfo], rule: Rule) -> Cut:
    """Give each tensor to the partition that the rule says.

    A tied weight is asked about under the name under which it is used (`lm_head.weight`), too; where the rule has no
    answer it stays with the weight.  Raises `PlanError` for an answer that is none, naming the tensor.
    """
    unmatched: list[str] = []
    highest = 0
    placed = []
    for layer in layers:
        parts: dict[int, list[TensorInfo]] = {}
        for name in layer.tensors:
            part_id = _ask(rule, tensors[name])
            if part_id is None:
                unmatched.append(name)
            else:
                parts.setdefault(part_id, []).append(tensors[name])
                highest = max(highest, part_id)
        placed.append(
            tuple(
                Placed(
                    part_id,
                    PlannedLayer(layer.name, layer.layer_type, layer.stack, layer.block_index, tuple(found)),
                )
                for part_id, found in parts.items()
            )
        )
    if unmatched:
        raise PlanError(
            f"the rule has no partition for {len(unmatched):,} tensors: {shown(unmatched)}",
            hint="Add a rule that matches them, or a default.",
        )
    got = {part_id for layer_parts in placed for part_id, _ in layer_parts}
    missing = [part_id for part_id in range(highest + 1) if part_id not in got]
    if missing:
        raise PlanError(
            f"the rule gives nothing to partition {', '.join(map(str, missing[:4]))}",
            expected=f"something for each of 0 to {highest}",
            hint="Partitions are counted from 0, without a gap.",
        )

    def of_tie(tie: Tie) -> int | None:
        part_id = _ask(rule, tensors[tie.tensor]._replace(name=tie.alias))
        return part_id if part_id is None or part_id <= highest else None

    return Cut(tuple(placed), (None,) * (highest + 1), of_tie)


def _ask(rule: Rule, tensor: TensorInfo) -> int | None:
    part_id = rule(tensor)
    if part_id is not None and (type(part_id) is not int or not 0 <= part_id < MAX_PARTS):
        raise PlanError(
            "the rule's answer is no partition",
            tensor=tensor.name,
            expected=f"a whole number from 0 to {MAX_PARTS - 1:,}, or None",
            found=show_value(part_id),
        )
    return part_id


def parse_rules(text: str, where: str) -> RuleList:
    """Parse a file of rules; `where` names it in errors.  Raises `PlanError` naming the rule and the field."""
    document = parse_toml(text, "rules", where)
    require_known(document, _FILE_KEYS, "the file", where)
    default = _partition(document["default"], "the file", "default", where) if "default" in document else None
    tables = document.get("rule", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise wrong_field(where, "the file", "rule", "a table [[rule]] for each rule", tables)
    if not tables and default is None:
        raise wrong_field(where, "the file", "rule", "at least one table [[rule]], or a default", "none")
    if len(tables) > MAX_RULES:
        raise wrong_field(where, "the file", "rule", f"at most {MAX_RULES} of them", len(tables))
    return RuleList(tuple(_rule(table, f"rule {k}", where) for k, table in enumerate(tables, 1)), default)


def _rule(table: Mapping[str, object], who: str, where: str) -> tuple[re.Pattern[str], int]:
    require_known(table, _RULE_KEYS, who, where)
    if ("match" in table) == ("regex" in table):
        found = "both" if "match" in table else "none"
        raise wrong_field(where, who, "match", "either match or regex", found)
    field = "match" if "match" in table else "regex"
    text = table[field]
    if not isinstance(text, str) or not text or len(text) > _MAX_PATTERN:
        raise wrong_field(where, who, field, f"text of 1 to {_MAX_PATTERN} characters", text)
    if "partition" not in table:
        raise wrong_field(where, who, "partition", f"a whole number from 0 to {MAX_PARTS - 1:,}", "none")
    return _pattern(text, field, who, where), _partition(table["partition"], who, "partition", where)


def _pattern(text: str, field: str, who: str, where: str) -> re.Pattern[str]:
    if field == "match":
        return re.compile(r"\A" + fnmatch.translate(text))
    if _NESTED_REPEAT.search(text):
        raise wrong_field(where, who, field, "a regular expression without repeats of what repeats itself", text)
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise PlanError(
            f"{who}, field {field!r} is no regular expression: {str(error)[:100]}",
            path=where,
            found=show_value(text),
            hint="Correct it in the file; match takes plain wildcards.",
        ) from error


def _partition(value: object, who: str, field: str, where: str) -> int:
    if type(value) is int and 0 <= value < MAX_PARTS:
        return value
    raise wrong_field(where, who, field, f"a whole number from 0 to {MAX_PARTS - 1:,}", value)
