"""The stack machine: what it reads it reads as pickle does, and nothing a pickle says is ever run."""

from __future__ import annotations

import pickle
import pickletools
import sys
import time
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsplit.checkpoint import pickle_layout
from mmsplit.checkpoint.pickle_layout import Constructor, PickledDict, PickleRefusalError, parse_pickle


class Words:
    """A vocabulary of one constructor and one constant."""

    def find_global(self, name: str) -> object:
        if name == "collections.OrderedDict":
            return Constructor(name, lambda _: PickledDict())
        if name == "a.constant":
            return b"constant"
        raise PickleRefusalError(f"{name!r} is not known")

    def find_persistent(self, saved_id: object) -> object:
        return {"persistent": saved_id} if isinstance(saved_id, str) else None


def value_of(data: bytes) -> object:
    """The value of a pickle, dicts as Python has them."""
    return plain(parse_pickle(data, Words())[0])


def plain(value: Any) -> Any:
    """The value with dicts as Python's."""
    if isinstance(value, PickledDict):
        return {plain(key): plain(item) for key, item in value.items}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.integers(-(2**2000), 2**2000)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
    ),
    max_leaves=20,
)


@given(values, st.sampled_from([3, 4, 5]))
def test_plain_data_is_what_pickle_makes_of_it(value: object, protocol: int) -> None:
    """Law: for data without other classes the machine gives what was pickled, and the length of the pickle."""
    data = pickle.dumps(value, protocol=protocol)
    assert value_of(data) == value
    assert parse_pickle(data + b"more", Words())[1] == len(data)


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=10))
def test_protocol_2_is_read(value: object) -> None:
    """The one torch.save writes; it has no bytes."""
    assert value_of(pickle.dumps(value, protocol=2)) == value


def test_text_of_python_2_is_utf_8() -> None:
    """As torch.load takes it."""
    assert value_of(b"\x80\x02U\x03\xe2\x82\xac.") == "€"
    assert value_of(b"\x80\x02T\x03\0\0\0\xe2\x82\xac.") == "€"


def test_integer_of_python_2_is_read() -> None:
    """Python 2 wrote those of more than 32 bits as text, even in its binary protocol."""
    assert value_of(b"\x80\x02I4294967296\n.") == 2**32


def test_attributes_of_a_dict_are_dropped() -> None:
    """An OrderedDict's `_metadata` is set by BUILD."""
    data = b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\0\0\0aK\x01sb."
    assert value_of(data) == {}


def test_persistent_ids_and_constants_come_from_the_vocabulary() -> None:
    assert value_of(b"\x80\x02X\x01\0\0\0kQ.") == {"persistent": "k"}
    assert value_of(b"\x80\x02ca\nconstant\n.") == b"constant"
    assert value_of(b"\x80\x04\x8c\x01a\x8c\x08constant\x93.") == b"constant"


#: pickle -> words of the refusal.
HOSTILE = {
    "nothing": (b"", "cut short"),
    "no STOP": (b"\x80\x02N", "cut short"),
    "no pickle": (b"\xff\xff\xff", "not a pickle"),
    "text cut short": (b"\x80\x02X\xff\xff\xff\x7fab", "cut short"),
    "text of 2**63 bytes": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.", "cut short"),
    "text of 2**64 bytes": (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "cut short"),
    "text is not UTF-8": (b"\x80\x02X\x01\0\0\0\xff.", "cut short"),
    "negative length": (b"\x80\x02T\xff\xff\xff\xff.", "cut short"),
    "decimal of 5,000 digits": (b"I" + b"9" * 5000 + b"\n.", "cut short"),
    "decimal that is none": (b"Ix\n.", "cut short"),
    "string with a bad escape": (b"S'\\q'\n.", "cut short|STRING"),
    "unterminated string": (b"S'a\n.", "cut short"),
    "protocol 6": (b"\x80\x06N.", "protocol 6 is not known"),
    "empty stack at STOP": (b"\x80\x02.", "does not end with one value"),
    "two values at STOP": (b"\x80\x02NN.", "does not end with one value"),
    "open mark at STOP": (b"\x80\x02N(N.", "does not end with one value"),
    "tuple without a mark": (b"\x80\x02Nt.", "finds the stack empty"),
    "tuple below the stack": (b"\x80\x02N\x86.", "finds the stack empty"),
    "tuple beyond a mark": (b"\x80\x02N(N\x86.", "finds the stack empty"),
    "reduce of nothing": (b"\x80\x02R.", "finds the stack empty"),
    "put of nothing": (b"\x80\x02q\0.", "finds the stack empty"),
    "setitem with one": (b"\x80\x02}Ns.", "finds the stack empty"),
    "memo not written": (b"\x80\x02h\x07.", "memo 7 is read before it is written"),
    "long memo not written": (b"\x80\x02j\xff\xff\xff\xff.", "memo 4294967295 is read before it is written"),
    "append to a tuple": (b"\x80\x02)Na.", "not to a list"),
    "append to a dict": (b"\x80\x02}Na.", "not to a list"),
    "appends to None": (b"\x80\x02N(Ne.", "not to a list"),
    "setitem in a list": (b"\x80\x02]NNs.", "not in a dict"),
    "setitems in a tuple": (b"\x80\x02)(NNu.", "not in a dict"),
    "key without a value": (b"\x80\x02}(NNNu.", "a key without a value"),
    "build on a list": (b"\x80\x02]}b.", "attributes are set on a value of type list"),
    "build on None": (b"\x80\x02N}b.", "attributes are set on"),
    "call of a constant": (b"\x80\x02ca\nconstant\n)R.", "a value of type bytes is called"),
    "call of text": (b"\x80\x02X\x02\0\0\0os)R.", "a value of type str is called"),
    "call with a list": (b"\x80\x02ccollections\nOrderedDict\n]R.", "not with a tuple"),
    "global": (b"\x80\x02cos\nsystem\n.", "'os.system' is not known"),
    "global of the stack": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "'os.system' is not known"),
    "global of numbers": (b"\x80\x04K\x01K\x02\x93.", "name of a global is not text"),
    "global with a dotted name": (b"\x80\x04\x8c\x01a\x8c\x0aconstant.x\x93.", "'a.constant.x' is not known"),
    "global of one line": (b"\x80\x02cos", "cut short"),
    "instance": (b"(S'true'\nios\nsystem\n.", "STRING|'os system'"),
    "instance alone": (b"(ios\nsystem\n.", "INST, which names 'os system',"),
    "object": (b"\x80\x02(ccollections\nOrderedDict\no.", "OBJ is not one"),
    "new object": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ is not one"),
    "extension": (b"\x80\x02\x82\x01.", "EXT1 is not one"),
    "buffer": (b"\x80\x05\x97.", "NEXT_BUFFER is not one"),
    "persistent id as text": (b"P1\n.", "PERSID is not one"),
    "pop": (b"\x80\x02NN0.", "POP is not one"),
}


@pytest.mark.parametrize(("data", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickle_is_refused(data: bytes, words: str) -> None:
    """One refusal each, and never another exception."""
    with pytest.raises(PickleRefusalError, match=words):
        parse_pickle(data, Words())


def test_refusal_tells_where() -> None:
    """The offset is that of the opcode."""
    with pytest.raises(PickleRefusalError) as caught:
        parse_pickle(b"\x80\x02NNcos\nsystem\n.", Words())
    assert caught.value.offset == 4
    assert not caught.value.is_undecodable


def test_cut_short_is_told_from_wrong() -> None:
    """Whoever reads a pickle of unknown length must know whether more bytes would help."""
    with pytest.raises(PickleRefusalError) as caught:
        parse_pickle(b"\x80\x02X\xff\0\0\0", Words())
    assert caught.value.is_undecodable


@pytest.mark.parametrize("opcode", [b"\x85", b"(", b"(t", b"]q\0", b"]", b"}"], ids=repr)
def test_depth_costs_no_stack(opcode: bytes) -> None:
    """Values nested far beyond Python's recursion limit are built, and thrown away, without recursion."""
    depth = 20 * sys.getrecursionlimit()
    data = b"\x80\x02N" + opcode * depth
    close = {b"]": b"a" * depth, b"]q\0": b"a" * depth}.get(opcode, b"")
    try:
        value, _ = parse_pickle(data + close + b".", Words())
    except PickleRefusalError:
        return
    del value


def test_opcodes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of one-byte opcodes ends."""
    monkeypatch.setattr(pickle_layout, "MAX_OPCODES", 1000)
    with pytest.raises(PickleRefusalError, match="more than 1,000 opcodes"):
        parse_pickle(b"\x80\x02" + b"N" * 2000 + b".", Words())
    assert value_of(b"\x80\x02" + b"]" + b"Na" * 498 + b".") == [None] * 498


def test_memo_far_apart_costs_nothing() -> None:
    """An index is a name, not a position."""
    assert value_of(b"\x80\x02Nr\xff\xff\xff\xff0"[:-1] + b".") is None


def test_integer_too_long_to_print_is_carried() -> None:
    """Nothing here formats a value."""
    length = 20_000
    data = b"\x80\x02\x8b" + length.to_bytes(4, "little") + b"\x7f" * length + b"."
    assert parse_pickle(data, Words())[0] == int.from_bytes(b"\x7f" * length, "little")


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_or_a_refusal(data: bytes) -> None:
    """Nothing else, ever."""
    try:
        parse_pickle(data, Words())
    except PickleRefusalError:
        pass


@settings(max_examples=300)
@given(st.lists(st.sampled_from([op.code.encode("latin-1") for op in pickletools.opcodes]), max_size=60), st.randoms())
def test_any_opcodes_give_a_value_or_a_refusal(opcodes: list[bytes], random: Any) -> None:
    """Opcodes with arguments of ones and twos, so that most decode."""
    data = b"\x80\x02N" + b"".join(code + random.choice([b"", b"\1\0\0\0", b"\2\0", b"1\n2\n"]) for code in opcodes)
    try:
        parse_pickle(data + b".", Words())
    except PickleRefusalError:
        pass


def test_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name in a pickle never reaches the import system."""
    marker = "mmsplit_name_that_no_module_has"
    with pytest.raises(PickleRefusalError):
        parse_pickle(f"\x80\x02c{marker}\nname\n.".encode("latin-1"), Words())
    assert marker not in sys.modules
    started = time.time
    with pytest.raises(PickleRefusalError):
        parse_pickle(b"\x80\x02ctime\ntime\n)R.", Words())
    assert time.time is started
