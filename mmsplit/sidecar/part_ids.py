"""Which partitions a directory has files of."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from mmsplit.errors import FormatError
from mmsplit.sidecar.output_files import refuse_shortage

_PARTITION: Final = re.compile(r"^partition_(\d+)(\.json|\.bin)$", re.ASCII)


def part_ids_in(root: Path, suffixes: Collection[str] = (".json", ".bin")) -> tuple[int, ...]:
    """Return the ids of the partitions of which a file with one of these suffixes lies in `root`, in order.

    None where there is no directory, or none that may be listed.  Raises `OutputError`, `FormatError` for a machine or
    a disk that fails.
    """
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ()
    except OSError as error:
        refuse_shortage(error, root)
        raise FormatError(f"directory cannot be read: {error.strerror}", path=root) from error
    matches = (_PARTITION.match(name) for name in names)
    return tuple(sorted({int(match[1]) for match in matches if match and match[2] in suffixes}))
