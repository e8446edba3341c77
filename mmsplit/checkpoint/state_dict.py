"""Which tensors a saved object holds, and what they are called.  Pure.

The rule.  A tensor's path is the keys of the dicts, and the positions in the lists and tuples, that lead to it.  As
long as all tensors lie below one same first key, that key is a wrapper ({"model": {...}, "epoch": 3}) and is left
out; `wrapper` says what was left out.  The rest of the path, joined by dots, is the name.  So a state dict keeps its
names, alone in the file or beside values that are no tensors; of several state dicts in one file each keeps its key.
Values that are no tensors stay in the file's own bytes and are mentioned in a note.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from mmsplit.checkpoint.pickle_layout import MAX_OPCODES, PickledDict, PickleRefusalError, kind_of
from mmsplit.checkpoint.torch_objects import TensorRef

#: A path may be this long.  What refers to itself is longer.
MAX_DEPTH: Final = 64
#: Values visited, and characters of all names together: a few shared lists can stand for a tree without end.
_MAX_VISITS: Final = MAX_OPCODES
_MAX_NAME_CHARACTERS: Final = 16 << 20
_INT64_MAX: Final = 2**63 - 1


class StateDict(NamedTuple):
    """Named tensors in the order of the pickle.  `wrapper` are the keys left out; `notes` are for a person."""

    tensors: tuple[tuple[str, TensorRef], ...]
    wrapper: tuple[str, ...]
    notes: tuple[str, ...]


class _Key(NamedTuple):
    """One step of a path.  `text` is None for a key that cannot be part of a name; `above` is the path before it."""

    text: str | None
    depth: int
    above: _Key | None


def name_tensors(root: object) -> StateDict:
    """Find the tensors of a saved object by the rule above.

    Raises `PickleRefusalError` if there are none, two have the same name, or a name cannot be one.
    """
    if not isinstance(root, PickledDict | list | tuple):
        raise PickleRefusalError(
            f"file holds {'one tensor' if isinstance(root, TensorRef) else kind_of(root)}, not a state dict",
            hint="Save a dict of named tensors: torch.save(model.state_dict(), path).",
        )
    found, others = _walk(root)
    if not found:
        raise PickleRefusalError("file holds no tensors")
    shortest = min(len(path) for path, _ in found)
    first = found[0][0]
    depth = 0
    while depth < shortest - 1 and all(path[depth] == first[depth] for path, _ in found):
        depth += 1
    tensors = tuple([(".".join(path[depth:]), tensor) for path, tensor in found])
    _require_names([name for name, _ in tensors])
    return StateDict(tensors, first[:depth], _notes(first[:depth], others))


def _walk(root: object) -> tuple[list[tuple[tuple[str, ...], TensorRef]], list[str]]:
    """Return all tensors with their paths, depth first, and the paths of all other values that are no containers."""
    found: list[tuple[tuple[str, ...], TensorRef]] = []
    others: list[str] = []
    characters = visits = 0
    todo: list[tuple[object, _Key | None]] = [(root, None)]
    while todo:
        value, key = todo.pop()
        visits += 1
        if visits > _MAX_VISITS:
            raise PickleRefusalError(f"file stands for more than {_MAX_VISITS:,} values")
        if isinstance(value, TensorRef):
            path = _path(key)
            characters += sum(map(len, path))
            if characters > _MAX_NAME_CHARACTERS:
                raise PickleRefusalError(f"names have more than {_MAX_NAME_CHARACTERS:,} characters together")
            found.append((path, value))
        elif isinstance(value, PickledDict | list | tuple):
            depth = key.depth if key else 0
            if depth >= MAX_DEPTH:
                raise PickleRefusalError(f"values are nested more than {MAX_DEPTH} deep, or within themselves")
            pairs = value.items if isinstance(value, PickledDict) else enumerate(value)
            children = [(item, _Key(_key_text(name), depth + 1, key)) for name, item in pairs]
            todo.extend(reversed(children))
        elif len(others) < _NOTED:
            others.append(".".join([text or "?" for text in _texts(key)])[:80])
    return found, others


#: How many of the values that are no tensors a note names; one more is looked for, to know whether there are more.
_NAMED: Final = 3
_NOTED: Final = _NAMED + 1


def _texts(key: _Key | None) -> list[str | None]:
    texts = []
    while key is not None:
        texts.append(key.text)
        key = key.above
    return texts[::-1]


def _path(key: _Key | None) -> tuple[str, ...]:
    path = []
    for text in _texts(key):
        if text is None:
            raise PickleRefusalError("tensor lies under a key that is neither text nor an integer")
        path.append(text)
    return tuple(path)


def _key_text(key: object) -> str | None:
    if isinstance(key, str):
        return key
    return str(key) if type(key) is int and abs(key) <= _INT64_MAX else None


def _require_names(names: list[str]) -> None:
    if len(set(names)) != len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise PickleRefusalError(f"two tensors have the name {twice[:200]!r}")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise PickleRefusalError(f"name {name[:200]!r} holds a lone surrogate, which is not text") from None


def _notes(wrapper: tuple[str, ...], others: list[str]) -> tuple[str, ...]:
    notes = []
    if wrapper:
        notes.append(f"the tensors lie under {'.'.join(wrapper)[:200]!r}, which is left out of their names")
    if others:
        names = f"{', '.join(others[:_NAMED])}{' …' if len(others) > _NAMED else ''}"
        notes.append(f"values that are no tensors stay in the file's own bytes: {names}")
    return tuple(notes)
