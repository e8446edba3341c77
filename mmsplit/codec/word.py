"""How the numbers of a dtype come apart into byte planes, and back together.  Pure numpy, no allocation per block.

A *word* is one little-endian number of 1, 2, 4 or 8 bytes.  Plane p holds byte p of every word, in element order:
plane 0 the lowest.  Where the word is sign(1) exponent(8) mantissa(rest) (BF16, F32), its top 16 bits are
regrouped first so that no byte boundary cuts the exponent:

    bit      15  14 … 7    6 … 0            15 … 8     7   6 … 0
             s   exponent  mantissa   ->    exponent   s   mantissa

In trained weights the exponents are few and skewed, sign and mantissa are noise: one plane compresses, the others
are stored as they are.

Three things make it fast, where strided views would move one byte at a time.  Casts between integers run on whole
vectors: a narrowing cast keeps the lowest byte of each word, a widening one puts zeros above it.  They run as well at
odd addresses, so that a shift by whole bytes is a view that begins earlier or later.  And `bitwise_or` on bytes does
not ask how wide the words are.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmsplit.dtypes import DTYPES

#: Bytes of words per pass.  128 KiB would stay in the L2 cache, but each call of numpy takes the interpreter lock
#: again, and two threads that meet there lose more than the cache gives.  Measured best of 128 KiB to 4 MiB: decoding
#: is 1.7 to 2.2 times as fast as with 128 KiB on two threads, 1.2 to 1.3 times on one.
_BLOCK_BYTES: Final = 1 << 20

Bytes = NDArray[np.uint8]
Words = NDArray[np.unsignedinteger]

#: Little-endian words by width: scratch is shifted by bytes, so its order counts, too.
_WORD: Final = {width: np.dtype(f"<u{width}") for width in (1, 2, 4, 8)}


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


def is_zeros(plane: Bytes) -> bool:
    """Return whether no byte is set, as in the low planes of numbers that came from a narrower type."""
    # The first bytes tell as a rule.
    return not plane[:64].any() and plane.max(initial=0) == 0


class WordSplitter:
    """Takes words apart and puts them together; holds three blocks of scratch, so one per thread."""

    def __init__(self, block_bytes: int = _BLOCK_BYTES) -> None:
        """Work on `block_bytes` of words at a time, a multiple of 8."""
        self._block_bytes = block_bytes
        self._rooms = (np.empty(block_bytes, np.uint8), np.empty(block_bytes, np.uint8))
        self._shifted = np.empty(block_bytes + 4, np.uint8)

    def split(self, raw: Bytes, layout: WordLayout, planes: list[Bytes]) -> None:
        """Write the planes of `raw` (whole words, at any address) into `planes`, each one byte per word."""
        width = layout.word_bytes
        plain = width - 2 if layout.exponent8 else width
        for start in range(0, len(raw), self._block_bytes):
            block = raw[start : start + self._block_bytes]
            first, last = start // width, (start + len(block)) // width
            for byte in range(plain):
                _cut(block, width, byte, planes[byte][first:last])
            if layout.exponent8:
                self._split_exponents(block, width, planes[-2][first:last], planes[-1][first:last])

    def merge(self, planes: list[Bytes], layout: WordLayout, raw: Bytes) -> None:
        """Inverse of `split`: write the words of `planes` into `raw`."""
        width = layout.word_bytes
        if width == 1:
            raw[:] = planes[0]
            return
        used = [not is_zeros(plane) for plane in planes]
        for start in range(0, len(raw), self._block_bytes):
            block = raw[start : start + self._block_bytes]
            first, last = start // width, (start + len(block)) // width
            self._merge_block([plane[first:last] for plane in planes], used, layout, block)

    def _split_exponents(self, block: Bytes, width: int, low: Bytes, high: Bytes) -> None:
        size = 2 * len(low)
        words = block.view(_WORD[2])
        if width > 2:
            words = self._rooms[0][:size].view(_WORD[2])
            _cut(block, width, width - 2, words)
        scratch = self._shifted[:size].view(_WORD[2])
        np.right_shift(words, 7, out=scratch)
        np.copyto(high, scratch, casting="unsafe")  # s is cut off, the exponent stays
        np.bitwise_and(words, 0x807F, out=scratch)
        joined = self._rooms[1][:size]
        np.bitwise_or(self._shifted[:size], self._shifted[1 : size + 1], out=joined)  # s comes down beside the mantissa
        np.copyto(low, joined.view(_WORD[2]), casting="unsafe")

    def _merge_block(self, planes: list[Bytes], used: list[bool], layout: WordLayout, out: Bytes) -> None:
        """Join planes to words of 2 bytes, those to words of 4, those to words of 8; the last join writes `out`."""
        count = len(planes[0])
        room = out if len(planes) == 2 else self._rooms[0]
        words: list[Words | None] = []
        for plane in range(0, len(planes), 2):
            low, high = planes[plane : plane + 2]
            target = room[plane * count : (plane + 2) * count]
            if layout.exponent8 and plane + 2 == len(planes):
                words.append(self._merge_exponents(low, high, target))
            else:
                words.append(self._join(low if used[plane] else None, high if used[plane + 1] else None, 2, target))
        if len(words) == 4:
            lower, upper = self._rooms[1][: 4 * count], self._rooms[1][4 * count : 8 * count]
            words = [self._join(words[0], words[1], 4, lower), self._join(words[2], words[3], 4, upper)]
        if len(words) == 2:
            words = [self._join(words[0], words[1], layout.word_bytes, out)]
        if words[0] is None:
            out[:] = 0

    def _merge_exponents(self, low: Bytes, high: Bytes, out: Bytes) -> Words:
        words = out.view(_WORD[2])
        np.copyto(words, high)
        np.multiply(words, 1 << 7, out=words)  # does what a shift does, and is twice as fast
        scratch = self._shifted[: len(out)].view(_WORD[2])
        np.copyto(scratch.view("<i2"), low.view(np.int8))  # widened with its sign: s fills the upper byte
        np.bitwise_and(scratch, 0x807F, out=scratch)
        np.bitwise_or(words, scratch, out=words)
        return words

    def _join(self, low: Words | None, high: Words | None, width: int, out: Bytes) -> Words | None:
        """Write words of `width` bytes, at any address: `low` their lower halves, `high` their upper ones.

        None stands for zeros; nothing is written where both are.
        """
        words, half = out.view(_WORD[width]), width // 2
        if high is None:
            if low is None:
                return None
            np.copyto(words, low)
        elif low is None:
            out[:half] = 0
            np.copyto(out[half:-half].view(_WORD[width]), high[:-1])
            out[-half:] = high[-1:].view(np.uint8)
        else:
            upper = self._shifted[: half + len(out)]
            upper[:half] = 0
            np.copyto(upper[half:].view(_WORD[width]), high)
            np.copyto(words, low)
            np.bitwise_or(out, upper[: len(out)], out=out)
        return words


def _cut(block: Bytes, width: int, first: int, out: Words) -> None:
    """Copy the bytes from `first` on of every word of `width` bytes, as many as `out` holds of each, into `out`."""
    # Read from there on, they are the lowest bytes of a word, and the cast keeps those.  Only the last word would
    # reach past the end.
    last = len(block) - width + first
    np.copyto(out[:-1], block[first:last].view(_WORD[width]), casting="unsafe")
    out[-1:] = block[last : last + out.itemsize].view(out.dtype)
