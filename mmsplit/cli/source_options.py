"""SOURCE, which is a path or a model of the Hub, and how to reach the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mmsplit.cli.options import PATH
from mmsplit.remote.source import HubOptions

F = TypeVar("F", bound=Callable[..., Any])

_CONNECTIONS = click.IntRange(1, 256)


class _Source(click.ParamType[str]):
    """Text as it is given; whether it is a path or a model is for the verbs to say."""

    name = "source"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse empty text, which would mean the current directory."""
        if value in ("", b""):
            self.fail("the source is empty", param, ctx)
        return str(value)


SOURCE = _Source()


def source_argument(command: F) -> F:
    """Add SOURCE, which `--model-id` may stand for."""
    return click.argument("source", type=SOURCE, required=False)(command)


def model_id_option(text: str = "The model on the Hub: the same as SOURCE.") -> Callable[[F], F]:
    """Add --model-id."""
    return click.option("--model-id", metavar="ORG/NAME", help=text)


def chosen_source(source: str | None, model_id: str | None) -> str:
    """Return SOURCE or --model-id, whichever was given."""
    if source is None and model_id is None:
        raise click.UsageError("Missing argument 'SOURCE': a path, or a model of the Hub such as org/name.")
    if source is not None and model_id is not None:
        raise click.UsageError("SOURCE and --model-id are two ways to say the same; give one.")
    return source or model_id or ""


def token_option(kind: str = "Access token") -> Callable[[F], F]:
    """Add --token."""
    return click.option(
        "--token",
        help=f"{kind} of the Hub; better put into HF_TOKEN, where no process list shows it."
        "  [default: HF_TOKEN, or the login of hf auth login]",
    )


def connections_option(text: str) -> Callable[[F], F]:
    """Add --connections."""
    default = HubOptions().connections
    return click.option("--connections", type=_CONNECTIONS, default=default, show_default=True, help=text)


def hub_options(command: F) -> F:
    """Add the options that say how to reach the Hub."""
    for option in reversed(
        (
            click.option("--revision", help="Branch, tag or commit on the Hub.  [default: main]"),
            click.option("--cache-dir", type=PATH, help="The Hub cache.  [default: as HF_HOME says]"),
            token_option(),
            connections_option("Ranges fetched from the Hub at once."),
        )
    ):
        command = option(command)
    return command


def hub_of(revision: str | None, cache_dir: Path | None, token: str | None, connections: int) -> HubOptions:
    """Put what `hub_options` gave together."""
    return HubOptions(revision=revision, token=token, cache_dir=cache_dir, connections=connections)
