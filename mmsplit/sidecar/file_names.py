"""By these files a partition set is known.  A module of its own: whoever only looks for one imports nothing else."""

from __future__ import annotations

from typing import Final

SET_MANIFEST_NAME: Final = "partition_set.json"
#: What an unfinished split remembers.
STATE_NAME: Final = "unfinished_split.json"
