"""What the tests of this room share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from machine import without_waiting


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """A loss of power is simulated here, so that no sync has to wait for the disk, which others use, too."""
    with without_waiting():
        yield
