"""The parity files that a split makes beside its payloads, if it is asked for them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mmsplit.sidecar.manifest import manifest_name, payload_name
from mmsplit.sidecar.output_files import output_errors
from mmsplit.sidecar.parity_layout import parity_name, plan_parity
from mmsplit.sidecar.parity_writer import ensure_parity, parity_counter
from mmsplit.workers import ProgressCallback


class ParityOfSplit:
    """Parity of `percent` of each payload in `directory`; None for none at all."""

    def __init__(self, directory: Path, percent: float | None, threads: int, progress: ProgressCallback | None) -> None:
        self._directory = directory
        self._percent = percent
        self._threads = threads
        self._progress = progress
        self._done: set[int] = set()

    def make(self, part_ids: Iterable[int]) -> None:
        """Make the parity files of finished partitions; each is looked for once."""
        if self._percent is None:
            return
        wanted = [part_id for part_id in part_ids if part_id not in self._done]
        counter = parity_counter((self._directory / payload_name(part_id) for part_id in wanted), self._progress)
        for part_id in wanted:
            ensure_parity(self._directory / manifest_name(part_id), self._percent, self._threads, counter)
            self._done.add(part_id)

    def size_bytes(self, payload_bytes: int) -> int:
        """Length of the parity file of a payload of that length."""
        return 0 if self._percent is None else plan_parity(payload_bytes, self._percent).file_bytes

    def missing_bytes(self, part_ids: Iterable[int]) -> int:
        """What the parity files of finished partitions will take beyond what is there of them."""
        missing = 0
        for part_id in () if self._percent is None else part_ids:
            payload, parity = self._directory / payload_name(part_id), self._directory / parity_name(part_id)
            with output_errors(payload):
                there = parity.stat().st_size if parity.is_file() else 0
                missing += max(0, self.size_bytes(payload.stat().st_size) - there)
        return missing
