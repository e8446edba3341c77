"""The forward order: a sort key for every layer, made of the components of its name.

Modules are nested, and so is time: what runs first inside `model` is decided among the children of `model`.
So the key of a layer is one element per component, each ranked among its siblings by `rules.ROLES`, and
comparing keys compares level by level.  Numbers count as numbers (`layers.2` before `layers.10`).
"""

from __future__ import annotations

import re
from typing import Final

from mmsplit.layers.naming import MAX_COMPONENTS, is_index
from mmsplit.layers.rules import (
    CORE,
    DESCENDING_WORDS,
    NORM,
    PROJECTOR,
    TAIL,
    TOWER,
    TURNS,
    UNDERSCORE_WORDS,
    rank_inside_block,
    role_of,
)

#: (rank among siblings, word without its number, number)
Element = tuple[int, str, int]

_NUMBERED: Final = re.compile(r"(.*?)_?([0-9]{1,9})", re.ASCII | re.DOTALL)


def layer_key(name: str, is_known: bool) -> tuple[Element, ...]:
    """Return the sort key of a layer; one that no rule knows goes behind the stacks it stands beside."""
    key: list[Element] = []
    components = name.split(".", MAX_COMPONENTS)
    in_tower = False
    turn: int | None = None
    previous = around = ""
    for component, following in zip(components, [*components[1:], ""], strict=True):
        word, number = split_number(component)
        if not word and number >= 0:
            key.append((0, "", -number if previous in DESCENDING_WORDS else number))
            if turn is not None:
                key.append((turn, "", 0))
            turn = None
        elif component in TURNS and is_index(following):
            turn = TURNS[component]
            key.append((CORE, "", 0))
        else:
            turn = None
            rank = _rank(component, word, around, in_tower)
            in_tower = in_tower or rank == TOWER
            if word in UNDERSCORE_WORDS and number >= 0:
                key.extend([(rank, word, 0), (0, "", number)])
            else:
                key.append((rank, word, number))
        previous = component
        if not is_index(component):
            around = component
    if not is_known and key[-1][0] == CORE:
        key[-1] = (TAIL, *key[-1][1:])
    return tuple(key)


def _rank(component: str, word: str, around: str, in_tower: bool) -> int:
    role = role_of(component, around) or role_of(word)
    if role is None:
        return CORE
    if role.rank == PROJECTOR and in_tower:
        return NORM + 1  # the projector that a tower carries itself is the last thing it runs
    return role.rank


def split_number(component: str) -> tuple[str, int]:
    """Return the word and the number of a component, -1 where there is none: `conv2` is ("conv", 2)."""
    found = _NUMBERED.fullmatch(component)
    return (component, -1) if found is None else (found[1], int(found[2]))


def tensor_key(suffix: str) -> tuple[Element, ...]:
    """Return the sort key of a tensor inside its layer; `suffix` is its name without the layer's prefix."""
    key = []
    for component in suffix.split(".", MAX_COMPONENTS):
        word, number = split_number(component)
        key.append((rank_inside_block(component), word, number))
    return tuple(key)
