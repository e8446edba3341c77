"""Names of tensors: the rule that finds the state dict, and what cannot be a name."""

from __future__ import annotations

import pytest
from torch_builder import ORDERED_DICT, dict_of, integer, program, storage_id, tensor_of, text, tuple_of

from mmsplit.checkpoint import state_dict
from mmsplit.checkpoint.pickle_layout import PickleRefusalError, parse_pickle
from mmsplit.checkpoint.state_dict import StateDict, name_tensors
from mmsplit.checkpoint.torch_objects import TorchVocabulary

T = tensor_of()


def named(value: bytes) -> StateDict:
    """The tensors of a pickled value."""
    return name_tensors(parse_pickle(program(value), TorchVocabulary())[0])


NAMES = {
    "flat": (dict_of({"a.w": T, "b": T}), ["a.w", "b"], ()),
    "ordered dict": (ORDERED_DICT + text("w") + T + b"s", ["w"], ()),
    "Python 2's ordered dict": (
        b"ccollections\nOrderedDict\n](](" + text("b") + T + b"e](" + text("a") + T + b"ee\x85R",
        ["b", "a"],
        (),
    ),
    "wrapped": (dict_of({"epoch": integer(3), "model": dict_of({"w": T, "v": T})}), ["w", "v"], ("model",)),
    "wrapped twice": (
        dict_of({"state": dict_of({"model": dict_of({"w": T, "v": T})})}),
        ["w", "v"],
        ("state", "model"),
    ),
    "wrapped, of one tensor": (dict_of({"model": dict_of({"w": T})}), ["w"], ("model",)),
    "several": (dict_of({"a": dict_of({"w": T}), "b": dict_of({"w": T})}), ["a.w", "b.w"], ()),
    "beside a tensor": (dict_of({"model": dict_of({"w": T}), "step": T}), ["model.w", "step"], ()),
    "nested": (dict_of({"a": dict_of({"b": dict_of({"w": T}), "c": T})}), ["b.w", "c"], ("a",)),
    "integer keys": (dict_of([(integer(0), T), (integer(-7), T)]), ["0", "-7"], ()),
    "list": (b"](" + T + T + b"e", ["0", "1"], ()),
    "tuple in a dict": (dict_of({"a": tuple_of(T, b"N", T), "b": T}), ["a.0", "a.2", "b"], ()),
    "empty name": (dict_of({"": T}), [""], ()),
    "keys that are no names, above no tensor": (dict_of([(b"\x88", b"N"), (text("w"), T)]), ["w"], ()),
}


@pytest.mark.parametrize(("value", "names", "wrapper"), NAMES.values(), ids=NAMES)
def test_names_follow_the_rule(value: bytes, names: list[str], wrapper: tuple[str, ...]) -> None:
    """In the order of the pickle, what all have in common left out."""
    found = named(value)
    assert [name for name, _ in found.tensors] == names
    assert found.wrapper == wrapper


HOSTILE = {
    "None": (b"N", "not a state dict"),
    "number": (integer(3), "not a state dict"),
    "one tensor": (T, "one tensor, not a state dict"),
    "storage": (storage_id(), "not a state dict"),
    "empty dict": (b"}", "no tensors"),
    "dict of numbers": (dict_of({"epoch": integer(3)}), "no tensors"),
    "key twice": (dict_of([(text("w"), T), (text("w"), T)]), "two tensors have the name 'w'"),
    "text and integer": (dict_of([(text("0"), T), (integer(0), T)]), "two tensors have the name '0'"),
    "dotted and nested": (dict_of({"a.w": T, "a": dict_of({"w": T}), "b": T}), "two tensors have the name 'a.w'"),
    "key is True": (dict_of([(b"\x88", T)]), "neither text nor an integer"),
    "key is None": (dict_of([(b"N", T)]), "neither text nor an integer"),
    "key is a float": (dict_of([(b"G" + bytes(8), T)]), "neither text nor an integer"),
    "key is a tuple": (dict_of([(b")", T)]), "neither text nor an integer"),
    "key is a dict": (dict_of([(b"}", T)]), "neither text nor an integer"),
    "key above is a tuple": (dict_of([(b")", dict_of({"w": T}))]), "neither text nor an integer"),
    "key of 2**64": (dict_of([(integer(2**64), T)]), "neither text nor an integer"),
    "key of 16,000 bits": (
        dict_of([(b"\x8b\xd0\x07\0\0" + b"\x7f" * 2000, T)]),
        "neither text nor an integer",
    ),
    "lone surrogate": (dict_of({"\ud800": T}), "lone surrogate"),
    "nested 100 deep": (dict_of({"a": b"]" * 100 + T + b"a" * 100}), "nested more than 64 deep"),
    "dict in itself": (b"}q\0" + text("a") + b"h\0s", "nested more than 64 deep, or within themselves"),
    "list in itself": (b"]q\0h\0a", "nested more than 64 deep, or within themselves"),
}


@pytest.mark.parametrize(("value", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_object_is_refused(value: bytes, words: str) -> None:
    """One refusal each."""
    with pytest.raises(PickleRefusalError, match=words):
        named(value)


def doubling(levels: int, last: bytes) -> bytes:
    """A list of twice the same list of twice the same list …"""
    parts = last
    for level in range(levels):
        parts = b"](" + parts + b"q" + bytes([level]) + b"h" + bytes([level]) + b"e"
    return parts


def test_few_lists_do_not_stand_for_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """2**40 values out of 40 lists are more than anybody visits."""
    monkeypatch.setattr(state_dict, "_MAX_VISITS", 10_000)
    for last in (T, b"N"):
        with pytest.raises(PickleRefusalError, match="stands for more than 10,000 values"):
            named(doubling(40, last))
    assert len(named(doubling(5, T)).tensors) == 32


def test_few_long_keys_do_not_make_many_long_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters of all names together are counted."""
    monkeypatch.setattr(state_dict, "_MAX_NAME_CHARACTERS", 10_000)
    with pytest.raises(PickleRefusalError, match="more than 10,000 characters"):
        named(dict_of({"k" * 1000: doubling(5, T)}))


def test_note_names_what_is_no_tensor() -> None:
    """The first few; keys that are no text as a question mark."""
    found = named(dict_of([(text("w"), T), (b"N", b"N"), (text("epoch"), integer(1))]))
    assert found.notes == ("values that are no tensors stay in the file's own bytes: ?, epoch",)
    assert named(dict_of({"w": T})).notes == ()
