"""The command line: each command parses, makes one API call, prints.  The only room that prints.

stdout carries the result, stderr progress and messages.  Exit codes are those of `mmsplit.errors`.
"""

from __future__ import annotations

import gc
import io
import os
import sys
import traceback
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    # The headers of a large model are a million small records without a cycle; to look for cycles among them again and
    # again, as they are read, takes a tenth of the time of a plan.
    gc.set_threshold(200_000, 20, 20)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code; prints errors, with --debug their traceback, too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character shows its code
    # numpy's BLAS would start threads that spin for a while; nothing here multiplies matrices.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import click

    from mmsplit.cli.app import GOES_ON, app
    from mmsplit.errors import MmsplitError, OutputError

    debug = "--debug" in arguments
    words = [word for word in arguments if word != "--debug"]  # wherever it stands
    try:
        result = app.main(words, prog_name="mmsplit", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            _abandon_stdout()
        return code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as stop:
        interrupted = isinstance(stop, KeyboardInterrupt) or isinstance(stop.__cause__, KeyboardInterrupt)
        command = next((word for word in words if not word.startswith("-")), "")
        said = f"interrupted. {GOES_ON.get(command, '')}".rstrip() if interrupted else "nothing done"
        click.echo(f"mmsplit: {said}", err=True)
        return 130
    except MmsplitError as error:
        if debug:
            traceback.print_exc()
        from mmsplit.cli.render import clean

        click.echo(clean(f"mmsplit: error: {error}"), err=True)
        return error.exit_code
    except OSError as error:
        if debug:
            traceback.print_exc()
        if error.filename is None:
            _abandon_stdout()
        where = error.filename or "the result"
        click.echo(f"mmsplit: error: {where}: {error.strerror or error}", err=True)
        return OutputError.exit_code
    except Exception as error:
        if debug:
            traceback.print_exc()
        click.echo(
            f"mmsplit: internal error: {type(error).__name__}: {error}. Run again with --debug for the traceback.",
            err=True,
        )
        return 1


def _abandon_stdout() -> None:
    """Give Python nothing to complain about at exit, when it flushes what nobody takes."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        pass  # no stdout of a file's kind
