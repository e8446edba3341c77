"""A virtual environment of the project's own, for the scripts beside this file; standard library only.

Made at first use in `.venv` at the top of the checkout, brought up to date when pyproject.toml changes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_MINIMUM = (3, 11)


def enter(extra: str = "") -> None:
    """Go on in the project's environment, with mmsplit and one of its extras installed; returns only there."""
    if sys.version_info < _MINIMUM:
        sys.exit(f"mmsplit needs Python {'.'.join(map(str, _MINIMUM))} or newer; this is {sys.version.split()[0]}")
    environment = ROOT / ".venv"
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if Path(sys.prefix).resolve() == environment.resolve():
        return
    stamp = environment / f"installed-{extra or 'mmsplit'}"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + sys.version.encode()).hexdigest()
    if not (python.exists() and stamp.exists() and stamp.read_text() == wanted):
        print(f"Preparing {environment} …", file=sys.stderr, flush=True)
        _run([sys.executable, "-m", "venv", "--clear" if not python.exists() else "--upgrade", str(environment)])
        target = f"{ROOT}[{extra}]" if extra else str(ROOT)
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", target])
        stamp.write_text(wanted)
    command = [str(python), *sys.argv]
    if os.name == "nt":
        sys.exit(subprocess.call(command))
    os.execv(python, command)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, check=False)
    if result.returncode:
        sys.exit(f"could not prepare the environment: {' '.join(command)} failed (exit {result.returncode})")
