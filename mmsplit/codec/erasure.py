"""Reed-Solomon erasure coding over GF(2^8): k data blocks get m parity blocks, and any k of the k + m give all back.

Pure.  The code is systematic, with the Cauchy matrix that sidecar/PARITY.md writes down.  The arithmetic that touches
every byte is that of ISA-L, by way of pyeclib, the library under OpenStack Swift.  What is left for lost blocks is
small: the parity of what is there, taken from the parity that was stored, is what the lost blocks alone would give;
and a Cauchy matrix has an inverse that can be written down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from mmsplit.errors import MissingExtraError

if TYPE_CHECKING:
    from pyeclib.ec_iface import ECDriver

#: k + m is at most this, since every block of a stripe has a number of its own in GF(2^8).
MOST_BLOCKS: Final = 255
_POLYNOMIAL: Final = 0x11D
_BACKEND: Final = "isa_l_rs_cauchy"
_INSTALL: Final = "Install it with: pip install 'mmsplit[parity]'"

Block = NDArray[np.uint8]


class StripeCode:
    """Encodes stripes of `data_count` blocks to `parity_count` more, and makes lost data blocks again.

    Blocks of a stripe have one length, a multiple of 16 bytes, and are numbered: data from 0, parity from 0.  Raises
    `MissingExtraError` where pyeclib, or ISA-L in it, is not installed.
    """

    def __init__(self, data_count: int, parity_count: int) -> None:
        self.data_count = data_count
        self.parity_count = parity_count
        self._driver = _open_driver(data_count, parity_count)

    def encode(self, data: bytes) -> list[Block]:
        """Return the parity blocks of one stripe, whose data blocks lie one after the other."""
        block_bytes = len(data) // self.data_count
        blocks = self._driver.encode(data)[self.data_count :]  # each behind a header of the library's own
        return [np.frombuffer(block, np.uint8, offset=len(block) - block_bytes) for block in blocks]

    def restore(self, wanted: int, lost: Sequence[int], differences: Mapping[int, Block]) -> Block:
        """Return the data block `wanted`, one of those that are `lost`.

        `differences` has, for as many parity blocks as are lost, the stored parity XOR the parity of the data blocks
        that are there, zeros in the place of the lost ones.
        """
        restored = np.zeros_like(next(iter(differences.values())))
        factors = _inverse_row(wanted, lost, [self.data_count + number for number in differences])
        for factor, difference in zip(factors, differences.values(), strict=True):
            restored ^= _multiples(factor)[difference]
        return restored


def require_erasure_library() -> None:
    """Raise `MissingExtraError` where nothing can be encoded or restored."""
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


def _logarithms() -> tuple[list[int], list[int]]:
    """Return powers of 2 in GF(2^8), and the logarithm of every element but 0, which has none."""
    powers, logarithms, value = [0] * 255, [0] * 256, 1
    for exponent in range(255):
        powers[exponent], logarithms[value] = value, exponent
        value = value << 1 ^ (_POLYNOMIAL if value & 0x80 else 0)
    return powers, logarithms


_POWERS, _LOGARITHMS = _logarithms()


def _multiples(factor: int) -> Block:
    """Return the products of `factor`, not 0, with 0 to 255."""
    log = _LOGARITHMS[factor]
    return np.array([0, *(_POWERS[(log + _LOGARITHMS[value]) % 255] for value in range(1, 256))], np.uint8)


def _inverse_row(wanted: int, columns: Sequence[int], rows: Sequence[int]) -> list[int]:
    """Return a row of the inverse of the Cauchy matrix 1 / (row XOR column): the one that gives column `wanted`."""

    def log_product(number: int, others: Sequence[int]) -> int:
        return sum(_LOGARITHMS[number ^ other] for other in others if other != number)

    above = log_product(wanted, rows) - log_product(wanted, columns)
    return [
        _POWERS[(above + log_product(row, columns) - log_product(row, rows) - _LOGARITHMS[row ^ wanted]) % 255]
        for row in rows
    ]
