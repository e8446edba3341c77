"""What the tests of this room share: builders of files that lie in the rooms of others."""

from __future__ import annotations

import sys
from pathlib import Path

for _room in ("checkpoint", "remote", "faults"):
    sys.path.append(str(Path(__file__).parent.parent / _room))
