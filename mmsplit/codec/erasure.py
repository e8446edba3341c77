"""Reed-Solomon erasure coding over GF(2^8): k blocks get m more, and any k of the k + m give all back.  Pure.

The code is systematic, with the Cauchy matrix that sidecar/PARITY.md writes down.  The arithmetic is that of ISA-L,
by way of pyeclib, the library under OpenStack Swift.  That puts a header of its own before each block, which is no
part of what is stored: it does not depend on the data, and is taken from a stripe of zeros where it is needed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from mmsplit.errors import MissingExtraError

if TYPE_CHECKING:
    from pyeclib.ec_iface import ECDriver

#: k + m is at most this, since every block of a stripe has a number of its own in GF(2^8).
MOST_BLOCKS: Final = 255
#: Blocks are multiples of so many bytes.
BLOCK_ALIGNMENT: Final = 16
_BACKEND: Final = "isa_l_rs_cauchy"
_INSTALL: Final = "Install it with: pip install 'mmsplit[parity]'"


class StripeCode:
    """Encodes and restores stripes of `data_count` + `parity_count` blocks of equal length.

    Raises `MissingExtraError` where pyeclib, or ISA-L in it, is not installed.
    """

    def __init__(self, data_count: int, parity_count: int) -> None:
        self.data_count = data_count
        self.parity_count = parity_count
        self._driver = _open_driver(data_count, parity_count)
        self._headers: tuple[int, list[bytes]] = (0, [])

    def encode(self, data: bytes) -> list[memoryview]:
        """Return the parity blocks of one stripe, its data blocks lying one after the other."""
        block_bytes = len(data) // self.data_count
        blocks = self._driver.encode(data)[self.data_count :]
        return [memoryview(block)[-block_bytes:] for block in blocks]

    def restore(self, blocks: Mapping[int, bytes]) -> bytes:
        """Return the data blocks of one stripe, one after the other, from any `data_count` of its blocks.

        They are numbered: data from 0, parity from `data_count`.
        """
        block_bytes = len(next(iter(blocks.values())))
        if self._headers[0] != block_bytes:
            sample = self._driver.encode(bytes(self.data_count * block_bytes))
            self._headers = block_bytes, [block[:-block_bytes] for block in sample]
        headers = self._headers[1]
        return self._driver.decode([headers[number] + block for number, block in blocks.items()])


def require_erasure_library() -> None:
    """Raise `MissingExtraError` where stripes can be neither encoded nor restored."""
    _open_driver(2, 1)


def _open_driver(data_count: int, parity_count: int) -> ECDriver:
    try:
        from pyeclib.ec_iface import ECDriver, ECDriverError
    except ImportError as error:
        raise MissingExtraError(f"parity needs the package pyeclib: {error}", hint=_INSTALL) from error
    try:
        return ECDriver(k=data_count, m=parity_count, ec_type=_BACKEND)
    except ECDriverError as error:
        raise MissingExtraError(f"pyeclib was built without ISA-L: {error}", hint=_INSTALL) from error
