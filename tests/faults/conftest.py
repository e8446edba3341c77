"""What the tests of this room share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from machine import without_waiting


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """A loss of power is simulated here, so that no sync has to wait for the disk, which others use, too."""
    with without_waiting():
        yield
