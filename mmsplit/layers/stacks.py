"""Deciding which numbered lists are stacks of blocks, which are stages, and which are just numbered.

The word of a list says what it may be, and what hangs below its members says what it is: a list of bare
parameters (`merger.mlp.0.weight`, `classifier.layers.0.weight`) is no stack whatever its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from mmsplit.layers.naming import NumberedList, index_of, is_index, split_by_index
from mmsplit.layers.rules import (
    ATTENTION,
    CONVOLUTION_PAIRS,
    CONVOLUTION_PARTS,
    PARALLEL_ATTENTION,
    PARALLEL_FEED_FORWARD,
    PARALLEL_OTHER,
    STAGE_PAIRS,
    STAGE_WORDS,
    TURNS,
    UNIT_BY_ANY_STAGE,
    UNIT_BY_FIRST_STAGE,
    UNIT_STAGES,
    is_stack_word,
    role_of,
)

#: Lists are looked for inside lists to this depth: stages, layers, experts, and some to spare.
_MAX_NESTING: Final = 6


@dataclass(slots=True)
class Block:
    """One member of a stack: its prefix, the stack's path, its index, and the names below it."""

    name: str
    stack: str
    index: int
    tensors: list[str]


@dataclass(slots=True)
class Sorting:
    """What has been decided so far: blocks by name, and the names that are in no block.

    `turns` holds members that are no blocks but layers of their own, because they take turns with blocks: the
    names below them, by (list word, prefix).  `loose` holds (name, start): the components before the
    character offset `start` belong to an opened stage.
    """

    blocks: dict[str, Block] = field(default_factory=dict)
    turns: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    loose: list[tuple[str, int]] = field(default_factory=list)

    def add_stack(self, numbered: NumberedList, path: str, prefixes: Iterable[str]) -> None:
        """Add members as blocks of the stack `path`, joining what a parallel list has added before."""
        for prefix in prefixes:
            name = path + prefix[len(numbered.path) :]
            block = self.blocks.get(name)
            if block is None:
                self.blocks[name] = Block(name, path, index_of(prefix), numbered.members[prefix])
            else:
                block.tensors.extend(numbered.members[prefix])


class _Place(NamedTuple):
    """Where the sorting stands: the offsets to look from and of the innermost stage, and the nesting."""

    start: int
    stage_end: int
    nesting: int

    def below(self, prefix: str) -> _Place:
        """Return the place below a member that is neither block nor stage."""
        return _Place(len(prefix) + 1, self.stage_end, self.nesting + 1)

    def inside_stage(self, prefix: str) -> _Place:
        """Return the place below a member that is a stage."""
        return _Place(len(prefix) + 1, len(prefix) + 1, self.nesting + 1)


def find_blocks(names: Iterable[str]) -> Sorting:
    """Sort tensor names into blocks and loose ones.  Every name ends in exactly one of the two."""
    sorting = Sorting()
    _sort(names, _Place(0, 0, 0), sorting)
    return sorting


def _sort(names: Iterable[str], place: _Place, sorting: Sorting) -> None:
    """Sort the names that share everything before `place.start`."""
    if place.nesting > _MAX_NESTING:
        sorting.loose.extend((name, place.stage_end) for name in names)
        return
    plain, lists = split_by_index(names, place.start)
    sorting.loose.extend((name, place.stage_end) for name in plain)
    leaders = _parallel_leaders(lists)
    for numbered in lists.values():
        if numbered.path in leaders:
            sorting.add_stack(numbered, leaders[numbered.path], numbered.members)
        elif stages := _stages_of(numbered):
            sorting.add_stack(numbered, numbered.path, numbered.members.keys() - stages)
            for prefix in stages:
                _sort(numbered.members[prefix], place.inside_stage(prefix), sorting)
        elif _is_stack(numbered):
            sorting.add_stack(numbered, numbered.path, numbered.members)
        elif numbered.word in TURNS:
            sorting.turns.update(((numbered.word, prefix), below) for prefix, below in numbered.members.items())
        else:
            for prefix, below in numbered.members.items():
                _sort(below, place.below(prefix), sorting)


def _is_stack(numbered: NumberedList) -> bool:
    """Return whether the members are blocks, by the word of the list and the modules below its members.

    A word that says blocks needs one module below; a word that says nothing needs two different ones; a word
    that says something else (`projectors`) needs attention among them.
    """
    word = numbered.word
    if is_stack_word(word):
        return any(numbered.children.values())
    different = {child for children in numbered.children.values() for child in children if not is_index(child)}
    if len(different) < 2 or any(_is_container_word(child) for child in different):
        return False
    return not _is_leaf_word(word) or any(ATTENTION.fullmatch(child) for child in different)


def _is_leaf_word(word: str) -> bool:
    role = role_of(word)
    return role is not None and role.layer_type is not None


def _is_container_word(word: str) -> bool:
    role = role_of(word)
    return role is not None and role.layer_type is None


def _stages_of(numbered: NumberedList) -> set[str]:
    """Return the prefixes of those members that are stages; the members of a plain list of blocks are not."""
    if _are_units(numbered):
        return set()
    return {
        prefix
        for prefix, children in numbered.children.items()
        if not any((numbered.word, child) in UNIT_STAGES for child in children)
        and _holds_stack(numbered, prefix, children)
    }


def _holds_stack(numbered: NumberedList, prefix: str, children: set[str]) -> bool:
    """Return whether a member holds lists that are stacks, so that it is a stage rather than a block."""
    inner_words = {child for child in children if _may_hold(numbered.word, child)}
    if not inner_words:
        return False
    paths = {prefix if is_index(child) else f"{prefix}.{child}" for child in inner_words}
    _, inner = split_by_index(numbered.members[prefix], len(prefix) + 1)
    return any(_is_inner_stack(numbered.word, found) for found in inner.values() if found.path in paths)


def _may_hold(outer: str, child: str) -> bool:
    """Return whether `outer` may be a list of stages that hold the list `child` (an index: no name)."""
    pair = (outer, "" if is_index(child) else child)
    return outer in STAGE_WORDS or pair in STAGE_PAIRS or pair in CONVOLUTION_PAIRS


def _is_inner_stack(outer: str, inner: NumberedList) -> bool:
    if (outer, inner.word) in CONVOLUTION_PAIRS:
        return all(children and children <= CONVOLUTION_PARTS for children in inner.children.values())
    return _is_stack(inner)


def _are_units(numbered: NumberedList) -> bool:
    """Return whether stages run as units, by what they hold beside their blocks."""
    if numbered.word not in {"layers", "stages", "levels"}:
        return False
    first = min(numbered.members, key=lambda prefix: (index_of(prefix), prefix))
    if numbered.children[first] & UNIT_BY_FIRST_STAGE:
        return True
    return any(children & UNIT_BY_ANY_STAGE for children in numbered.children.values())


def _parallel_leaders(lists: Mapping[str, NumberedList]) -> dict[str, str]:
    """Return, for lists that make one layer per index together, the path of the list that names them."""
    siblings: dict[str, list[NumberedList]] = {}
    for path, numbered in lists.items():
        siblings.setdefault(path.removesuffix(numbered.word), []).append(numbered)
    leaders: dict[str, str] = {}
    for family in siblings.values():
        attentions = [found.path for found in family if PARALLEL_ATTENTION.fullmatch(found.word)]
        feed_forwards = [found.path for found in family if PARALLEL_FEED_FORWARD.fullmatch(found.word)]
        if attentions and feed_forwards:
            others = [found.path for found in family if PARALLEL_OTHER.fullmatch(found.word)]
            leaders.update((path, min(attentions)) for path in (*attentions, *feed_forwards, *others))
    return leaders
