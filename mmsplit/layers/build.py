"""From tensor names to the layer map: sort into blocks, name what is left, put all in forward order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from mmsplit.layers.crosscheck import depth_notes
from mmsplit.layers.layer import Layer, LayerMap
from mmsplit.layers.naming import MAX_COMPONENTS, find_index, module_ends
from mmsplit.layers.ordering import layer_key, tensor_key
from mmsplit.layers.rules import role_of
from mmsplit.layers.stacks import Sorting, find_blocks

#: So many names stand in the note about unknown modules; the map has them all.
_NAMES_IN_NOTE: Final = 5


@dataclass(slots=True)
class _Draft:
    """A layer whose tensors are still in the order in which they came."""

    name: str
    layer_type: str | None  # None where no rule knows the module
    stack: str | None
    index: int | None
    tensors: list[str]

    def suffixes(self) -> list[str]:
        """Return the tensors' names without the layer's, and all of it where parallel lists share no prefix."""
        prefix = self.name
        return [name.removeprefix(prefix) for name in self.tensors]


def build_layer_map(tensor_names: Iterable[str], config: Mapping[str, object] | None = None) -> LayerMap:
    """Sort tensor names into layers in forward order; every name ends in exactly one layer.

    Pure, independent of the order of `tensor_names`, and never raises: a name that no rule knows becomes a
    layer of type "other" by its module, with a note.  `config` is the parsed config.json; it is compared,
    never followed.

    Blocks for multi-token prediction come behind the main stack: as its last indices where they are numbered
    on (`model.layers.61` of 61), so before the final norm; as a module of their own (`mtp.layers.0`) behind
    the model and before the head, which they use.
    """
    drafts = _draft(find_blocks(dict.fromkeys(tensor_names)))
    drafts.sort(key=lambda draft: (layer_key(draft.name, draft.layer_type is not None), draft.name))
    return LayerMap(tuple(_in_order(drafts)), tuple(_notes(drafts, config)))


def _draft(sorting: Sorting) -> list[_Draft]:
    """Make layers of what was sorted: a layer per block, and layers by module of all that is in no block."""
    drafts = {b.name: _Draft(b.name, "block", b.stack, b.index, b.tensors) for b in sorting.blocks.values()}
    for (word, prefix), below in sorting.turns.items():
        drafts[prefix] = _Draft(prefix, _type_of(word, ""), None, None, below)
    containers = _containers(block.stack for block in sorting.blocks.values())
    for name, start in sorted(sorting.loose):
        module, layer_type = _module_of(name, start, containers)
        # What a stage runs around its blocks is neither the model's input nor its output.
        inside = "other" if start and layer_type in {"embedding", "head"} else layer_type
        drafts.setdefault(module, _Draft(module, inside, None, None, [])).tensors.append(name)
    return list(drafts.values())


def _containers(stacks: Iterable[str]) -> set[str]:
    """Return the paths of all modules that hold a stack: whatever their name, they are not one layer."""
    found: set[str] = set()
    for path in set(stacks):
        end = len(path)
        for _ in range(MAX_COMPONENTS):  # nobody asks about modules deeper than that
            if end <= 0 or path[:end] in found:
                break
            found.add(path[:end])
            end = path.rfind(".", 0, end)
    return found


def _module_of(name: str, start: int, containers: set[str]) -> tuple[str, str | None]:
    """Return the layer that a tensor outside all blocks belongs to, and its type (None: no rule knows it).

    It is the outermost module with a role and no stack inside; else the innermost module before any index
    that holds no stack either; else, right below a container, the parameter itself.
    """
    span = find_index(name, start)
    first_index = len(name) if span is None else span[0]
    innermost = 0
    begin = start
    around = _word_around(name, start)
    for end in module_ends(name, start):
        component = name[begin:end]
        if name[:end] not in containers:
            layer_type = _type_of(component, around)
            if layer_type is not None:
                return name[:end], layer_type
            if end < first_index:
                innermost = end
        begin = end + 1
        around = component
    if innermost:
        return name[:innermost], None
    stop = name.find(".", begin)
    parameter_end = len(name) if stop == -1 else stop
    return name[:parameter_end], _type_of(name[begin:parameter_end], around)


def _word_around(name: str, start: int) -> str:
    """Return the list word of the stage that ends at `start`: `attentions` for `mid.attentions.1.norm`."""
    return name[:start].rstrip(".0123456789").rpartition(".")[2] if start else ""


def _type_of(component: str, around: str) -> str | None:
    """Return the layer type of a module without stacks; None for containers and what no rule knows."""
    role = role_of(component, around)
    return None if role is None else role.layer_type


def _in_order(drafts: Sequence[_Draft]) -> Iterator[Layer]:
    """Put the tensors of each layer in order and freeze it.

    The layers of a stack share their suffixes: each is ranked once, and layers are sorted by small integers.
    """
    suffixes = [draft.suffixes() for draft in drafts]
    distinct = sorted(set(chain.from_iterable(suffixes)), key=lambda suffix: (tensor_key(suffix), suffix))
    rank_of = {suffix: rank for rank, suffix in enumerate(distinct)}.__getitem__
    for draft, own in zip(drafts, suffixes, strict=True):
        tensors = [name for _, name in sorted(zip(map(rank_of, own), draft.tensors, strict=True))]
        yield Layer(draft.name, draft.layer_type or "other", draft.stack, draft.index, tuple(tensors))


def _notes(drafts: Iterable[_Draft], config: Mapping[str, object] | None) -> list[str]:
    """Say in one sentence what no rule knew, and in one each what config.json sees differently."""
    notes = []
    unknown = [draft.name for draft in drafts if draft.layer_type is None]
    if unknown:
        shown = ", ".join(unknown[:_NAMES_IN_NOTE]) + (", …" if len(unknown) > _NAMES_IN_NOTE else "")
        notes.append(f"no rule knows these modules, each is a layer of its own ({len(unknown)}): {shown}")
    if config is not None:
        notes += depth_notes(config, Counter(draft.stack for draft in drafts if draft.stack is not None))
    return notes
