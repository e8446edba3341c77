"""The tree of errors: as drawn, with its exit codes, and messages that say all they know."""

import pickle
import re
from pathlib import Path

import pytest

from mmsplit import errors
from mmsplit.errors import HeaderError, MmsplitError, SourceChangedError

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, MmsplitError)]


def test_tree_is_the_one_that_is_drawn() -> None:
    """Names, nesting and exit codes in the docstring are those of the classes."""
    drawn: dict[str, tuple[str, int]] = {}
    trail: list[tuple[int, str, int]] = [(0, "MmsplitError", 0)]
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"(.*[├└]── )(\w+)(?: +(\d))?", line)
        if not found:
            continue
        depth, name = len(found[1]), found[2]
        while trail[-1][0] >= depth:
            trail.pop()
        code = int(found[3]) if found[3] else trail[-1][2]
        drawn[name] = (trail[-1][1], code)
        trail.append((depth, name, code))
    real = {kind.__name__: (kind.__mro__[1].__name__, kind.exit_code) for kind in ALL if kind is not MmsplitError}
    assert drawn == real


def test_exit_codes_keep_clear_of_the_reserved_ones() -> None:
    """0 is success, 1 is never used on purpose, 130 an interrupt; each branch has its own."""
    branches = [kind for kind in ALL if kind.__mro__[1] is MmsplitError]
    codes = [kind.exit_code for kind in branches]
    assert len(set(codes)) == len(codes)
    assert not set(codes) & {0, 1}
    assert max(codes) < 126


MESSAGES = {
    "bare": (MmsplitError("it broke"), "it broke"),
    "path": (MmsplitError("it broke", path=Path("a/b")), "a/b: it broke"),
    "all": (
        HeaderError("wrong length", path="f", tensor="t", offset=1234, expected=1000, found=999, hint="Try again."),
        "f, tensor 't', byte 1,234: wrong length (expected 1,000, found 999). Try again.",
    ),
    "offset 0 is said": (MmsplitError("x", offset=0), "byte 0: x"),
    "found 0 is said": (MmsplitError("x", expected="some", found=0), "x (expected some, found 0)"),
    "expected only": (MmsplitError("x", expected=True), "x (expected True)"),
    "name with control characters": (MmsplitError("x", tensor="\x1b[2J\n"), "tensor '\\x1b[2J\\n': x"),
    "long name": (MmsplitError("x", tensor="n" * 201), f"tensor '{'n' * 200}…[201 characters]': x"),
}


@pytest.mark.parametrize(("error", "message"), MESSAGES.values(), ids=MESSAGES)
def test_message_says_what_is_known(error: MmsplitError, message: str) -> None:
    assert str(error) == message


def test_values_are_attributes() -> None:
    """For callers who act on them; paths are text."""
    error = SourceChangedError("w", path=Path("p"), tensor="t", offset=5, expected=1, found=2, hint="h")
    assert (error.what, error.path, error.tensor, error.offset) == ("w", "p", "t", 5)
    assert (error.expected, error.found, error.hint) == (1, 2, "h")


def test_error_survives_pickling() -> None:
    """It may come out of a process pool, and is still the same error there."""
    error = pickle.loads(pickle.dumps(HeaderError("w", path="p", tensor="t", offset=5, hint="h")))
    assert type(error) is HeaderError
    assert (str(error), error.tensor, error.offset) == ("p, tensor 't', byte 5: w. h", "t", 5)
