"""What the tests of this room share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Processes are killed here, not machines: what was written is there whether or not it was synced.

    Thousands of syncs would take the time of a disk that others use, too.  That files are synced before they get
    their names is tested where it is done, in tests/sidecar.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield
