"""Reading one tensor name: where its first index stands, and which module it belongs to.

An *index* is a component of ASCII digits (`layers.7`), or digits behind one of a few words (`layers_7`).  All
reading is from left to right, once, and in C where a name is long: checkpoints have 100,000 of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from mmsplit.layers.rules import UNDERSCORE_WORDS, ends_module

#: At most nine digits: longer numbers are somebody's hash, and comparing them costs more than it tells.
_INDEX: Final = re.compile(r"(?<![^._])[0-9]{1,9}(?![^.])", re.ASCII)

#: Components beyond this are not looked at one by one.  Real names have fewer than twenty.
MAX_COMPONENTS: Final = 64


@dataclass
class NumberedList:
    """A list found in the names: `model.layers` with its members, each a list of tensor names.

    `path` is the list's own name, `word` its last component; `members` maps the prefix of a member
    (`model.layers.7`) to the names below it.
    """

    path: str
    word: str
    members: dict[str, list[str]] = field(default_factory=dict)

    @cached_property
    def children(self) -> dict[str, set[str]]:
        """The modules right below each member, by its prefix: `self_attn`, `mlp` … but no parameters."""
        return {prefix: _children_of(prefix, names) for prefix, names in self.members.items()}


def find_index(name: str, start: int = 0) -> tuple[int, int] | None:
    """Return the half-open range of the digits of the first index at or behind `start`, or None."""
    found = _INDEX.search(name, start)
    while found is not None:
        at = found.start()
        if at == 0 or name[at - 1] == "." or name[name.rfind(".", 0, at) + 1 : at - 1] in UNDERSCORE_WORDS:
            return found.span()
        found = _INDEX.search(name, found.end())
    return None


def is_index(component: str) -> bool:
    """Return whether a whole component is an index."""
    return len(component) <= 9 and component.isascii() and component.isdigit()


def index_of(member: str) -> int:
    """Return the number at the end of a member's prefix: 7 for `model.layers.7` and `model.layers_7`."""
    return int(member[max(member.rfind("."), member.rfind("_")) + 1 :])


def last_word(path: str) -> str:
    """Return the last component of a dotted path."""
    return path[path.rfind(".") + 1 :]


def split_by_index(names: Iterable[str], start: int) -> tuple[list[str], dict[str, NumberedList]]:
    """Part names by the first index at or behind `start` (a character offset, the same in all of them).

    Returns the names that have none, and the numbered lists of the others by path.
    """
    plain: list[str] = []
    members: dict[str, list[str]] = {}
    search = _INDEX.search
    below: list[str] = []
    inside = ""  # what the names of the member before begin with: they mostly come together
    for name in names:
        if inside and name.startswith(inside):
            below.append(name)
            continue
        found = search(name, start)
        if found is None:
            plain.append(name)
            continue
        at, end = found.span()
        if at and name[at - 1] == "_":
            span = find_index(name, start)
            if span is None:
                plain.append(name)
                continue
            end = span[1]
        prefix = name[:end]
        below = members.setdefault(prefix, [])
        below.append(name)
        inside = f"{prefix}."
    lists: dict[str, NumberedList] = {}
    for prefix, below in members.items():
        path = prefix[: max(prefix.rfind("."), prefix.rfind("_"), 0)]
        found_list = lists.get(path)
        if found_list is None:
            found_list = lists[path] = NumberedList(path, last_word(path))
        found_list.members[prefix] = below
    return plain, lists


def _children_of(member: str, names: Iterable[str]) -> set[str]:
    """Return the first components below a member's prefix that are modules, not parameters."""
    start = len(member) + 1
    found = {name[start:stop] for name in names if (stop := name.find(".", start)) != -1}
    return {child for child in found if not ends_module(child)}


def module_ends(name: str, start: int = 0) -> list[int]:
    """Return the offsets at which the module components of `name` end, from the one that holds `start` on.

    The last component is a parameter and does not count; nor does anything from a parameter word on.
    Empty for a parameter that hangs in no module.
    """
    ends: list[int] = []
    begin = start
    while len(ends) < MAX_COMPONENTS:
        stop = name.find(".", begin)
        if stop == -1 or ends_module(name[begin:stop]):
            break
        ends.append(stop)
        begin = stop + 1
    return ends
