"""`mmsplit sign`."""

from __future__ import annotations

from pathlib import Path

import click

from mmsplit.cli.options import PATH, json_option
from mmsplit.cli.render import clean, echo, echo_json
from mmsplit.errors import RequestError
from mmsplit.verbs.sign import sign


@click.command("sign")
@click.argument("path", metavar="SET", type=PATH)
@click.option("--key", type=PATH, required=True, help="Private key: a PEM file, curve P-256, P-384 or P-521.")
@click.option("--password-file", type=PATH, help="File whose first line is the password of the key.")
@click.option("-o", "--output", type=PATH, help="The signature.  [default: SET/partition_set.json.sig]")
@click.option("--every-file", is_flag=True, help="List every file, not only partition_set.json, which binds them.")
@click.option("--force", is_flag=True, help="Replace a signature that is there.")
@json_option
def sign_command(
    path: Path,
    key: Path,
    password_file: Path | None,
    output: Path | None,
    every_file: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Sign the partition set SET in the form of OpenSSF Model Signing."""
    password = None if password_file is None else _first_line(password_file)
    result = sign(path, key, output=output, password=password, every_file=every_file, force=force)
    if as_json:
        echo_json(result.as_json())
    else:
        echo(clean(str(result.path)))
        echo(f"signed: root digest {result.root_digest}")


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").split("\n", 1)[0].rstrip("\r")
    except (OSError, ValueError) as error:
        raise RequestError(f"password cannot be read: {error}", path=path) from error
