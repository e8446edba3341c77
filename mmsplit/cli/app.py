"""The commands, put together."""

from __future__ import annotations

import click

from mmsplit import __version__
from mmsplit.cli.inspect_command import inspect_command
from mmsplit.cli.merge_command import merge_command
from mmsplit.cli.plan_command import plan_command
from mmsplit.cli.split_command import split_command
from mmsplit.cli.verify_command import verify_command

_EPILOG = """\b
Exit codes:
  0  done                          5  integrity: bytes are not as they were written
  2  usage, or an impossible plan  6  output: exists, locked, no space, no permission
  3  checkpoint                    7  network
  4  format: not a partition set   8  an optional package is missing
  130  interrupted
"""


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mmsplit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def app(debug: bool) -> None:
    """Split model checkpoints larger than RAM by layer into verified partitions, and merge them back bit for bit."""


for _command in (inspect_command, plan_command, split_command, verify_command, merge_command):
    app.add_command(_command)
