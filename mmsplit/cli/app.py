"""The commands, put together; each is imported when it is used, so that `--help` answers at once."""

from __future__ import annotations

import importlib
from typing import Final

import click

from mmsplit import __version__

#: Command -> what it does, in the order of the help page.  `NAME` is `mmsplit.cli.NAME_command.NAME_command`.
_COMMANDS: Final = {
    "inspect": "Show what a path holds: checkpoint, partition or partition set.",
    "plan": "Show who would get what, from headers alone.",
    "download": "Download a model of the Hub, resumed and verified.",
    "split": "Split a checkpoint into a partition set.",
    "verify": "Find every byte of a set that is not as it was written.",
    "repair": "Make what is damaged in a set again, from the checkpoint or another copy.",
    "repartition": "Cut the model of a set another way; encoded chunks are moved as they are.",
    "parity": "Make parity files, from which a set repairs itself without a source.",
    "sign": "Sign a set, so that others can tell that it is yours.",
    "merge": "Merge a set into the original checkpoint, byte for byte.",
    "export": "Write partitions, or a model, as safetensors for any loader, or as JSON.",
    "pull": "Get a published set, or some of its partitions, verified on arrival.",
    "push": "Publish a set on the Hub, with a page that says what it is.",
    "bench": "Measure this machine, and say what limits it.",
}

_RESUMED: Final = "The same command goes on with --resume."
_AS_IT_IS: Final = "The same command goes on."
_ANEW: Final = "Nothing was changed; the same command begins anew."
#: Command -> what there is to do when it was interrupted.
GOES_ON: Final = {
    "inspect": _ANEW,
    "plan": _ANEW,
    "download": _AS_IT_IS,
    "split": _RESUMED,
    "verify": _ANEW,
    "repair": "What is mended stays; the same command goes on.",
    "repartition": _RESUMED,
    "parity": "Parity files that are finished stay; the same command goes on.",
    "sign": _ANEW,
    "merge": _RESUMED,
    "export": _RESUMED,
    "pull": _AS_IT_IS,
    "push": "The same command sends what the Hub does not have yet.",
    "bench": "What it wrote is removed; the same command begins anew.",
}

_EPILOG: Final = """\b
Exit codes:
  0  done                          5  integrity: bytes are not as they were written
  2  usage, or an impossible plan  6  output: exists, locked, no space, no permission
  3  checkpoint                    7  network
  4  format: not a partition set   8  an optional package is missing
  130  interrupted
"""


class _Commands(click.Group):
    """A group whose commands are in modules of their own."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"mmsplit.cli.{cmd_name}_command")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(
    cls=_Commands,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="mmsplit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def app(debug: bool) -> None:  # debug is read by `mmsplit.cli.run`
    """Split model checkpoints larger than RAM by layer into verified partitions, and merge them back bit for bit."""
