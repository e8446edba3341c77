"""A pickle read as data: what its opcodes would build, told without building it.  Pure.

Law: nothing named in a pickle is ever imported, looked up or called.  `pickletools.genops`, which only decodes, gives
the opcodes; a small stack machine follows them.  It knows the opcodes that protocols 2 to 5 write for plain data;
what a global or a persistent id stands for is the caller's `Vocabulary`, and what that does not know is refused by
name.

Values are None, bool, int, float, str, bytes, tuple, list, `PickledDict`, and whatever the vocabulary returns.  They
may be nested beyond Python's recursion limit, refer to themselves, and hold integers too long to print: never
compare, hash or format one before its type is known.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

#: Bounds on time and memory.  A tensor takes some 45 opcodes, so this is a file of 90,000 tensors.
MAX_OPCODES: Final = 4_000_000
_MAX_PROTOCOL: Final = 5

_LITERALS: Final = frozenset(
    (
        *("BININT", "BININT1", "BININT2", "INT", "LONG1", "LONG4", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    )
)


class PickleRefusalError(Exception):
    """Why a pickle is not read.  Internal: whoever knows the file turns it into an error of the tree.

    `offset` counts from the start of the pickle.  `is_undecodable` tells bytes that are no pickle, or end before it
    does, from a pickle that says what it must not.
    """

    def __init__(
        self, what: str, *, hint: str | None = None, offset: int | None = None, is_undecodable: bool = False
    ) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.offset = offset
        self.is_undecodable = is_undecodable


@dataclass(slots=True, eq=False)
class PickledDict:
    """A dict as the pickle fills it: pairs in order, keys of any kind, possibly twice."""

    items: list[tuple[object, object]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Constructor:
    """What a global that is called stands for: a pure function of the arguments' values.

    It may raise `PickleRefusalError` without an offset.
    """

    name: str
    build: Callable[[tuple[object, ...]], object]


class Vocabulary(Protocol):
    """What the names in a pickle mean.  Both raise `PickleRefusalError` for what they do not know."""

    def find_global(self, name: str) -> object:
        """Return the value of `module.name`; a `Constructor` if it may be called."""

    def find_persistent(self, saved_id: object) -> object:
        """Return what a persistent id stands for."""


def parse_pickle(data: bytes, vocabulary: Vocabulary) -> tuple[object, int]:
    """Return the value of the pickle that `data` begins with, and the pickle's length in bytes.

    Raises `PickleRefusalError`, and nothing else.
    """
    machine = _Machine(vocabulary)
    steps = machine.steps()
    for count, (opcode, argument, position) in enumerate(_iter_opcodes(data)):
        name = opcode.name
        if count >= MAX_OPCODES:
            raise PickleRefusalError(f"pickle has more than {MAX_OPCODES:,} opcodes", offset=position)
        if name in _LITERALS:
            machine.stack.append(argument)
            continue
        if name == "STOP":
            return machine.result(position), (position or 0) + 1
        step = steps.get(name)
        try:
            if step is None:
                raise _not_known(name, argument)
            step(argument)
        except PickleRefusalError as refusal:
            refusal.offset = position
            raise
        except IndexError:
            raise PickleRefusalError(f"opcode {name} finds the stack empty", offset=position) from None
    raise AssertionError("genops ends with STOP or raises")  # pragma: no cover


def _iter_opcodes(data: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, object, int | None]]:
    try:
        yield from pickletools.genops(data)
    except (ValueError, Warning) as error:  # a caller may have made errors of warnings; STRING can give one
        what = f"not a pickle, or one that is cut short: {str(error)[:200]}"
        raise PickleRefusalError(what, is_undecodable=True) from None


def _not_known(opcode: str, argument: object) -> PickleRefusalError:
    named = f", which names {str(argument)[:200]!r}," if opcode == "INST" else ""
    return PickleRefusalError(
        f"pickle opcode {opcode}{named} is not one that a state dict needs",
        hint="Save the state dict, and that alone: torch.save(model.state_dict(), path).",
    )


class _Machine:
    """The stack, the marks and the memo.  A step that finds too little on the stack raises `IndexError`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.stack: list[object] = []
        self._below: list[list[object]] = []  # one stack for each mark that is open
        self._memo: dict[int, object] = {}
        self._vocabulary = vocabulary

    def steps(self) -> dict[str, Callable[[object], None]]:
        """Return what each opcode does, literals left out.  The argument is as `genops` decodes it."""
        return {
            "PROTO": self._protocol,
            "FRAME": lambda _: None,
            "NONE": lambda _: self.stack.append(None),
            "NEWTRUE": lambda _: self.stack.append(True),
            "NEWFALSE": lambda _: self.stack.append(False),
            "BINSTRING": self._text_of_python_2,
            "SHORT_BINSTRING": self._text_of_python_2,
            "MARK": self._mark,
            "EMPTY_TUPLE": lambda _: self.stack.append(()),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "TUPLE": self._tuple_from_mark,
            "EMPTY_LIST": lambda _: self.stack.append([]),
            "APPEND": lambda _: self._extend([self.stack.pop()]),
            "APPENDS": lambda _: self._extend(self._pop_mark()),
            "EMPTY_DICT": lambda _: self.stack.append(PickledDict()),
            "SETITEM": lambda _: self._set_items([self.stack.pop(-2), self.stack.pop()]),
            "SETITEMS": lambda _: self._set_items(self._pop_mark()),
            "BINPUT": self._put,
            "LONG_BINPUT": self._put,
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            "BINGET": self._get,
            "LONG_BINGET": self._get,
            "GLOBAL": self._global,
            "STACK_GLOBAL": self._stack_global,
            "REDUCE": self._reduce,
            "BUILD": self._build,
            "BINPERSID": self._persistent,
        }

    def result(self, offset: int | None) -> object:
        """Return the one value that is left."""
        if len(self.stack) != 1 or self._below:
            raise PickleRefusalError("pickle does not end with one value", offset=offset)
        return self.stack[0]

    def _protocol(self, version: object) -> None:
        if not isinstance(version, int) or version > _MAX_PROTOCOL:
            raise PickleRefusalError(f"pickle protocol {version} is not known; the newest known is {_MAX_PROTOCOL}")

    def _text_of_python_2(self, text: object) -> None:
        try:
            # genops decodes such bytes as Latin-1, torch.load as UTF-8.
            self.stack.append(str(text).encode("latin-1").decode("utf-8"))
        except UnicodeDecodeError:
            raise PickleRefusalError("text written by Python 2 is not UTF-8") from None

    def _mark(self, _: object) -> None:
        self._below.append(self.stack)
        self.stack = []

    def _pop_mark(self) -> list[object]:
        items, self.stack = self.stack, self._below.pop()
        return items

    def _tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise IndexError
        self.stack[-size:] = [tuple(self.stack[-size:])]

    def _tuple_from_mark(self, _: object) -> None:
        items = self._pop_mark()
        self.stack.append(tuple(items))

    def _extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise PickleRefusalError(f"items are appended to {kind_of(target)}, not to a list")
        target.extend(items)

    def _set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, PickledDict):
            raise PickleRefusalError(f"items are set in {kind_of(target)}, not in a dict")
        if len(items) % 2:
            raise PickleRefusalError("a dict is given a key without a value")
        target.items.extend(zip(items[::2], items[1::2], strict=True))

    def _put(self, index: object) -> None:
        if not isinstance(index, int):  # pragma: no cover - genops decodes integers
            raise AssertionError
        self._memo[index] = self.stack[-1]

    def _get(self, index: object) -> None:
        if not isinstance(index, int) or index not in self._memo:
            raise PickleRefusalError(f"memo {index} is read before it is written")
        self.stack.append(self._memo[index])

    def _global(self, argument: object) -> None:
        module, _, name = str(argument).partition(" ")  # genops joins the two lines by a space
        self.stack.append(self._vocabulary.find_global(f"{module}.{name}"))

    def _stack_global(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleRefusalError("the name of a global is not text")
        self.stack.append(self._vocabulary.find_global(f"{module}.{name}"))

    def _reduce(self, _: object) -> None:
        arguments, constructor = self.stack.pop(), self.stack.pop()
        if not isinstance(constructor, Constructor):
            raise PickleRefusalError(f"{kind_of(constructor)} is called, which is not a function known here")
        if type(arguments) is not tuple:
            raise PickleRefusalError(f"{constructor.name} is called with {kind_of(arguments)}, not with a tuple")
        self.stack.append(constructor.build(arguments))

    def _build(self, _: object) -> None:
        # Attributes of a dict (an OrderedDict's `_metadata`: versions of modules) are none of its items.
        self.stack.pop()
        if not isinstance(self.stack[-1], PickledDict):
            raise PickleRefusalError(f"attributes are set on {kind_of(self.stack[-1])}")

    def _persistent(self, _: object) -> None:
        self.stack.append(self._vocabulary.find_persistent(self.stack.pop()))


def kind_of(value: object) -> str:
    """What sort of value it is, in few words and without looking into it."""
    return "a dict" if isinstance(value, PickledDict) else f"a value of type {type(value).__name__}"
