"""Routed experts in tensor names: one tensor per expert, or one for all of them with the expert as first dimension."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NamedTuple

from mmsplit.layers.naming import MAX_COMPONENTS, is_index

#: A list or module of experts of which a router picks some: `experts`, `local_experts`, GGUF's `ffn_gate_exps`.
_EXPERTS: Final = re.compile(r"(?!shared?_)(?:\w+_)?(?:experts|exps)(?:_\w+)?", re.ASCII)
#: A member of such a list that has a name: `expert_3`.
_EXPERT: Final = re.compile(r"experts?_([0-9]{1,9})", re.ASCII)
#: Modules that hold the weights of all experts in one tensor each, under no word of their own (Step3, Granite).
_MOE: Final = re.compile(r"moe|\w+_moe|moe_\w+", re.ASCII)
#: The same, wherever it stands (JetMoE).
_PACKED_LINEAR: Final = frozenset({"input_linear", "output_linear"})
#: What stands below `experts` and yet is not one expert's: their router, a norm of what they say.
_COMMON: Final = re.compile(r".*norm.*|.*router.*|.*correction_bias|gate", re.ASCII)
_LONGEST_WORD: Final = 64


class ExpertPlace(NamedTuple):
    """The experts that a tensor is of: the `module` that holds them, and which; None if it has all of them, packed."""

    module: str
    number: int | None


def expert_place(name: str, dimension_count: int) -> ExpertPlace | None:
    """Return where a tensor stands among routed experts; None if it is not of any, or common to all."""
    if not _may_hold_experts(name):
        return None
    components = name.split(".", MAX_COMPONENTS)
    end = -1
    for position, component in enumerate(components):
        end += 1 + len(component)
        if len(component) > _LONGEST_WORD:
            continue
        word = component.lower()
        below = components[position + 1 :]
        if _EXPERTS.fullmatch(word):
            return _below_experts(name[:end], below)
        if dimension_count < 3:
            continue
        if word in _PACKED_LINEAR:
            return ExpertPlace(name[:end], None)
        if _MOE.fullmatch(word) and below and not any("share" in other.lower() for other in below):
            return ExpertPlace(name[:end], None)
    return None


def _below_experts(module: str, below: list[str]) -> ExpertPlace | None:
    """Read what follows a word for experts: a number, a second such word and one, or a packed weight."""
    for component in below[:2]:
        if is_index(component):
            return ExpertPlace(module, int(component))
        numbered = _EXPERT.fullmatch(component)
        if numbered:
            return ExpertPlace(module, int(numbered[1]))
        if not _is_list_of_experts(component):
            break
    return None if any(_is_common(component) for component in below) else ExpertPlace(module, None)


def _may_hold_experts(name: str) -> bool:
    lower = name.lower()
    return "exp" in lower or "moe" in lower or "put_linear" in lower


@lru_cache(maxsize=1024)
def _is_list_of_experts(component: str) -> bool:
    return len(component) <= _LONGEST_WORD and _EXPERTS.fullmatch(component.lower()) is not None


@lru_cache(maxsize=1024)
def _is_common(component: str) -> bool:
    return len(component) <= _LONGEST_WORD and _COMMON.fullmatch(component.lower()) is not None
