"""What the tests of the remote room share beside their fixtures."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
from huggingface_hub import constants

from mmsplit.remote.patience import Clock

WEIGHTS = random.Random(7).randbytes(1_000_000)
CONFIG = b'{"model_type": "llama"}'


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Do to huggingface_hub what HF_ENDPOINT does when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


class FakeClock(NamedTuple):
    """Time that passes only when somebody sleeps; `pauses` are all sleeps so far."""

    pauses: list[float]
    start: float = 1_800_000_000.0

    def now(self) -> float:
        return self.start + sum(self.pauses)

    def clock(self) -> Clock:
        """What is handed to the code under test; chance always makes pauses as short as they may be."""
        return Clock(sleep=self.pauses.append, now=self.now, chance=lambda: 0.0)
