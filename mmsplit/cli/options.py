"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class _AnyPath(click.ParamType[Path]):
    """A path as it is given; what is wrong with it is for the verbs to say.  Empty text is no path."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Refuse empty text, which would mean the current directory."""
        if value in ("", b""):
            self.fail("the path is empty", param, ctx)
        return Path(value)


PATH = _AnyPath()


class NameList(click.ParamType[tuple[str, ...]]):
    """Text separated by commas."""

    name = "a,b,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Split at commas; an empty item is an error."""
        if isinstance(value, tuple):
            return value
        items = tuple(item.strip() for item in str(value).split(","))
        if not all(items):
            self.fail(f"{value!r} has an empty item", param, ctx)
        return items


class PartIdList(click.ParamType[tuple[int, ...]]):
    """Numbers of partitions, separated by commas."""

    name = "k,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Refuse what is no number; whether there is such a partition is for the verbs to say."""
        if isinstance(value, tuple):
            return value
        items = [item.strip() for item in str(value).split(",")]
        if not all(item.isascii() and item.isdigit() for item in items):
            self.fail(f"{value!r} is not a list of partition numbers such as 0,2", param, ctx)
        return tuple(int(item) for item in items)


PART_IDS = PartIdList()


class Percent(click.ParamType[float]):
    """A share in percent, with or without the sign."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Take 2%, 2 or 0.5%; which shares are possible is for the verbs to say."""
        try:
            return float(str(value).strip().removesuffix("%"))
        except ValueError:
            self.fail(f"{value!r} is not a percentage such as 2%", param, ctx)


PERCENT = Percent()


def planning_options(command: F) -> F:
    """Add the options that say how to plan a checkpoint."""
    return _planning_options(unknown_dtypes_option(command), default_tied="duplicate")


def set_planning_options(command: F) -> F:
    """Add those that say how to plan what a partition set holds; it says itself how it treats tied weights."""
    return _planning_options(command, default_tied=None)


def _planning_options(command: F, default_tied: str | None) -> F:
    for option in reversed(
        (
            click.option("-n", "--num-parts", type=int, help="Number of partitions."),
            click.option(
                "--split-by",
                type=click.Choice(["layer", "type", "expert"]),
                default="layer",
                show_default=True,
                help="layer: runs of layers; type: attention, MLP, embedding … each in a partition of its own;"
                " expert: a trunk, and partitions of the experts of a mixture.",
            ),
            click.option(
                "--rule",
                "rules_file",
                type=PATH,
                help="TOML file of patterns over tensor names, each with the partition that gets what matches.",
            ),
            click.option(
                "--by",
                type=click.Choice(["bytes", "params", "layers"]),
                default="bytes",
                show_default=True,
                help="What to balance.",
            ),
            click.option("--weights", type=NameList(), help="Relative share of each partition: 3,2,1."),
            click.option(
                "--boundaries",
                type=NameList(),
                help="First layer of each partition but the first: model.layers.8,…",
            ),
            click.option(
                "--tied",
                type=click.Choice(["duplicate", "reference", "colocate"]),
                default=default_tied,
                show_default=True,
                help="A tied weight that a later partition needs: give it a copy, refer to the original, or move"
                " the layers that use it there." + ("" if default_tied else "  [default: as in SET]"),
            ),
        )
    ):
        command = option(command)
    return command


def unknown_dtypes_option(command: F) -> F:
    """Add --allow-unknown-dtypes."""
    return click.option(
        "--allow-unknown-dtypes", is_flag=True, help="Carry dtypes mmsplit does not know as opaque bytes."
    )(command)


def root_option(command: F) -> F:
    """Add --root."""
    return click.option(
        "--root", "root_digest", metavar="DIGEST", help="Demand the set of this root digest: sha256:…, as split prints."
    )(command)


def json_option(command: F) -> F:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def work_options(command: F) -> F:
    """Add the options of commands that move bytes."""
    for option in reversed(
        (
            click.option(
                "-t",
                "--threads",
                type=click.IntRange(1, 1024),
                help="Threads that compute.  [default: processors]",
            ),
            click.option(
                "--io",
                type=click.Choice(["auto", "mmap", "pread"]),
                default="auto",
                show_default=True,
                help="How to read: auto maps files that nobody can truncate meanwhile, and reads the others; mmap maps"
                " them all; pread maps none.",
            ),
            click.option("-q", "--quiet", is_flag=True, help="No progress."),
        )
    ):
        command = option(command)
    return command
