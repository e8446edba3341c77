"""What is wrong with a field of a TOML file, said the same way for every kind of file.  Pure."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping

from mmsplit.errors import PlanError


def require_known(table: Mapping[str, object], known: tuple[str, ...], who: str, where: str) -> None:
    """Raise `PlanError` for a field that is none of the `known` ones; `who` names the table, `where` the file."""
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"Did you mean {close[0]}?" if close else "Remove it, or correct its name."
            expected = f"one of {', '.join(known)}"
            raise PlanError(
                f"{who} has an unknown field", path=where, expected=expected, found=show_value(key), hint=hint
            )


def wrong_field(where: str, who: str, field: str, expected: str, found: object) -> PlanError:
    """Return the error for a field that is missing ("none" was found) or is not what it should be."""
    return PlanError(
        f"{who}, field {field!r} is wrong or missing",
        path=where,
        expected=expected,
        found=show_value(found),
        hint="Correct it in the file.",
    )


def parse_toml(text: str, kind: str, where: str) -> dict[str, object]:
    """Parse the text of a file of a `kind`, "nodes" say.  Raises `PlanError` with the line that is wrong."""
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        hint = "Correct it; text is written in quotes, and each table begins with its name in brackets."
        raise PlanError(f"{kind} file is not TOML: {str(error)[:200]}", path=where, hint=hint) from error


def show_value(value: object) -> str:
    """Show what was found without flooding the terminal; an endless integer is not even printed."""
    if type(value) is int and abs(value) > 10**20:
        return "an integer of more than 20 digits"
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'table'} of {len(value):,}"
    text = value if value == "none" else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
