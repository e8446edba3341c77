"""How the numbers of a dtype come apart into byte planes, and back together.  Pure numpy, no allocation per call.

A *word* is one little-endian number of 1, 2, 4 or 8 bytes.  Plane p holds byte p of every word, in element order:
plane 0 the lowest.  Where the word is sign(1) exponent(8) mantissa(rest) (BF16, F32), its top 16 bits are
regrouped first so that no byte boundary cuts the exponent:

    bit      15  14 … 7    6 … 0            15 … 8     7   6 … 0
             s   exponent  mantissa   ->    exponent   s   mantissa

In trained weights the exponents are few and skewed, sign and mantissa are noise: one plane compresses, the others
are stored as they are.  All passes run over blocks that stay in the L2 cache; larger ones were half as fast.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmsplit.dtypes import DTYPES

#: Words per pass: 128 KiB of 16-bit words.  Measured best among 8 Ki to 128 Ki words.
_BLOCK_WORDS: Final = 1 << 16

Bytes = NDArray[np.uint8]
Words = NDArray[np.unsignedinteger]


class WordLayout(NamedTuple):
    """How a chunk's bytes are read as words; `code` is what the chunk index records."""

    code: int
    word_bytes: int
    exponent8: bool


LAYOUTS: Final = (
    WordLayout(0, 1, False),
    WordLayout(1, 2, False),
    WordLayout(2, 4, False),
    WordLayout(3, 8, False),
    WordLayout(4, 2, True),
    WordLayout(5, 4, True),
)
_BYTES_LAYOUT: Final = LAYOUTS[0]


def layout_for(dtype: str) -> WordLayout:
    """Return the layout for a dtype; bytes for one that is not known."""
    known = DTYPES.get(dtype)
    if known is None:
        return _BYTES_LAYOUT
    return next(
        layout for layout in LAYOUTS if layout.word_bytes == known.word_bytes and layout.exponent8 == known.exponent8
    )


class WordSplitter:
    """Takes words apart and puts them together; holds two blocks of scratch, so one per thread."""

    def __init__(self) -> None:
        self._a = np.empty(_BLOCK_WORDS, np.uint16)
        self._b = np.empty(_BLOCK_WORDS, np.uint16)

    def split(self, raw: Bytes, layout: WordLayout, planes: list[Bytes]) -> None:
        """Write the planes of `raw` (whole words) into `planes`, `word_bytes` arrays of one byte per word."""
        if layout.word_bytes == 1:
            planes[0][:] = raw
            return
        words16 = raw.view("<u2")  # works at any address; unaligned input is only slower
        halves = layout.word_bytes // 2
        for half in range(halves):
            low, high = planes[2 * half], planes[2 * half + 1]
            lane = words16[half::halves]
            regroup = layout.exponent8 and half == halves - 1
            for start in range(0, len(lane), _BLOCK_WORDS):
                block = lane[start : start + _BLOCK_WORDS]
                stop = start + len(block)
                self._split_block(block, low[start:stop], high[start:stop], regroup)

    def merge(self, planes: list[Bytes], layout: WordLayout, raw: Bytes) -> None:
        """Inverse of `split`: write the words of `planes` into `raw`."""
        if layout.word_bytes == 1:
            raw[:] = planes[0]
            return
        words16 = raw.view("<u2")
        halves = layout.word_bytes // 2
        for half in range(halves):
            low, high = planes[2 * half], planes[2 * half + 1]
            lane = words16[half::halves]
            regroup = layout.exponent8 and half == halves - 1
            for start in range(0, len(lane), _BLOCK_WORDS):
                block = lane[start : start + _BLOCK_WORDS]
                stop = start + len(block)
                self._merge_block(low[start:stop], high[start:stop], block, regroup)

    def _split_block(self, words: Words, low: Bytes, high: Bytes, regroup: bool) -> None:
        a, b = self._a[: len(words)], self._b[: len(words)]
        if regroup:
            np.right_shift(words, 7, out=a)
            np.copyto(high, a, casting="unsafe")  # s is cut off, the exponent stays
            np.bitwise_and(words, 0x807F, out=a)
            np.right_shift(a, 8, out=b)
            np.bitwise_or(a, b, out=a)
            np.copyto(low, a, casting="unsafe")
        else:
            np.right_shift(words, 8, out=a)
            np.copyto(high, a, casting="unsafe")
            np.copyto(low, words, casting="unsafe")

    def _merge_block(self, low: Bytes, high: Bytes, words: Words, regroup: bool) -> None:
        a, b = self._a[: len(words)], self._b[: len(words)]
        np.copyto(a, high)
        np.copyto(b, low)
        if regroup:
            np.left_shift(a, 7, out=a)
            np.multiply(b, 0x0101, out=b)  # s and mantissa into both bytes, then each where it belongs
            np.bitwise_and(b, 0x807F, out=b)
        else:
            np.left_shift(a, 8, out=a)
        np.bitwise_or(a, b, out=words)
