"""Words taken apart into planes and put together again, against a splitter that does one word after the other."""

from itertools import product

import numpy as np
import pytest

from mmsplit.codec.word import LAYOUTS, WordLayout, WordSplitter, is_zeros, layout_for
from mmsplit.dtypes import DTYPES

BLOCK_BYTES = 64
#: Reused by all tests: scratch is left full of what the test before had in it.
SPLITTER = WordSplitter(BLOCK_BYTES)
DEFAULT_BLOCK_BYTES = 1 << 20


def ids(layout: WordLayout) -> str:
    return f"{layout.word_bytes} bytes{', exponent of 8 bits' if layout.exponent8 else ''}"


def planes_of(raw: np.ndarray, layout: WordLayout) -> list[list[int]]:
    """What the module's docstring says, word by word, in Python's integers."""
    planes: list[list[int]] = [[] for _ in range(layout.word_bytes)]
    for start in range(0, len(raw), layout.word_bytes):
        word = int.from_bytes(raw[start : start + layout.word_bytes].tobytes(), "little")
        if layout.exponent8:
            low_bits = 8 * layout.word_bytes - 16
            sign, exponent, mantissa = word >> low_bits + 15, word >> low_bits + 7 & 0xFF, word >> low_bits & 0x7F
            word = exponent << low_bits + 8 | sign << low_bits + 7 | mantissa << low_bits | word & (1 << low_bits) - 1
        for byte, plane in enumerate(planes):
            plane.append(word >> 8 * byte & 0xFF)
    return planes


def noise(count: int, seed: int, shift: int = 0) -> np.ndarray:
    """Bytes at an address that is `shift` past a multiple of 16."""
    room = np.random.default_rng(seed).integers(0, 256, count + 32, np.uint8)
    first = -room.ctypes.data % 16 + shift
    return room[first : first + count]


def split(raw: np.ndarray, layout: WordLayout, splitter: WordSplitter = SPLITTER) -> list[np.ndarray]:
    """Split into planes between bytes that must stay untouched."""
    count = len(raw) // layout.word_bytes
    room = np.full((layout.word_bytes, count + 2), 0xAA, np.uint8)
    splitter.split(raw, layout, list(room[:, 1:-1]))
    assert (room[:, [0, -1]] == 0xAA).all()
    return list(room[:, 1:-1])


def merge(
    planes: list[np.ndarray], layout: WordLayout, shift: int = 0, splitter: WordSplitter = SPLITTER
) -> np.ndarray:
    """Merge into the middle of a buffer whose ends must stay untouched."""
    size = layout.word_bytes * len(planes[0])
    room = noise(size + 16, 0)
    before, after = room[:shift].copy(), room[shift + size :].copy()
    splitter.merge(planes, layout, room[shift : shift + size])
    np.testing.assert_array_equal(room[:shift], before)
    np.testing.assert_array_equal(room[shift + size :], after)
    return room[shift : shift + size]


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
@pytest.mark.parametrize("shift", range(8))
def test_any_length_at_any_address(layout: WordLayout, shift: int) -> None:
    """Nothing, one word, odd numbers of them, and the edges of one block and of two."""
    block = BLOCK_BYTES // layout.word_bytes
    for words in sorted({0, 1, 2, 3, 7, block - 1, block, block + 1, 2 * block - 1, 2 * block, 2 * block + 1}):
        raw = noise(words * layout.word_bytes, seed=words, shift=shift)
        planes = split(raw, layout)
        assert [plane.tolist() for plane in planes] == planes_of(raw, layout)
        np.testing.assert_array_equal(merge(planes, layout, shift), raw)


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_edges_of_a_block_of_the_size_in_use(layout: WordLayout, more: int) -> None:
    """One word around the first block: the blocks are joined where they meet."""
    words = DEFAULT_BLOCK_BYTES // layout.word_bytes + more
    raw = noise(words * layout.word_bytes, seed=words)
    planes = split(raw, layout, WordSplitter())
    tail = 200 * layout.word_bytes
    assert [plane[-200:].tolist() for plane in planes] == planes_of(raw[-tail:], layout)
    np.testing.assert_array_equal(merge(planes, layout, splitter=WordSplitter()), raw)


def test_every_16_bit_word_survives_both_layouts() -> None:
    """All 65,536 of them: NaN payloads, -0, denormals, infinities."""
    raw = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    for layout in (LAYOUTS[1], LAYOUTS[4]):
        planes = split(raw, layout, WordSplitter())
        assert [plane.tolist() for plane in planes] == planes_of(raw, layout)
        np.testing.assert_array_equal(merge(planes, layout, splitter=WordSplitter()), raw)


def test_every_upper_half_of_a_32_bit_word_survives() -> None:
    """Sign, exponent and the upper mantissa of F32, above a lower half that is never zero."""
    words = np.arange(1 << 16, dtype="<u4") << np.uint32(16) | np.arange(1, (1 << 16) + 1, dtype="<u4") % 0xFFFF + 1
    raw = words.astype("<u4").view(np.uint8)
    planes = split(raw, LAYOUTS[5], WordSplitter())
    assert [plane.tolist() for plane in planes] == planes_of(raw, LAYOUTS[5])
    np.testing.assert_array_equal(merge(planes, LAYOUTS[5], splitter=WordSplitter()), raw)


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
@pytest.mark.parametrize("words", [1, 2, 65])
def test_planes_of_zeros_are_merged_as_others_are(layout: WordLayout, words: int) -> None:
    """Every choice of planes that hold nothing, in one block and in several, into memory that is not zero."""
    full = [noise(words, seed=plane + 1) | 1 for plane in range(layout.word_bytes)]
    for chosen in product([False, True], repeat=layout.word_bytes):
        planes = [plane if choose else np.zeros_like(plane) for plane, choose in zip(full, chosen, strict=True)]
        raw = merge(planes, layout, shift=words % 2)
        assert planes_of(raw, layout) == [plane.tolist() for plane in planes]


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
@pytest.mark.parametrize("where", [0, 63, 64, 199])
def test_one_byte_in_a_plane_of_zeros_is_not_lost(layout: WordLayout, where: int) -> None:
    """However late it comes: a plane that begins with zeros need not hold zeros only."""
    for number in range(layout.word_bytes):
        planes = [np.zeros(200, np.uint8) for _ in range(layout.word_bytes)]
        planes[number][where] = 0x80
        assert planes_of(merge(planes, layout), layout) == [plane.tolist() for plane in planes]


def test_zeros_are_told_from_what_is_set_anywhere() -> None:
    """Nothing holds zeros, too."""
    assert is_zeros(np.zeros(0, np.uint8))
    for count in (1, 63, 64, 65, 1000):
        assert is_zeros(np.zeros(count, np.uint8))
        for position in {0, count // 2, count - 1}:
            plane = np.zeros(count, np.uint8)
            plane[position] = 1
            assert not is_zeros(plane)


def test_layout_follows_the_table_of_dtypes() -> None:
    """By word size and exponent; bytes for a dtype of tomorrow."""
    found = {name: (layout_for(name).word_bytes, layout_for(name).exponent8) for name in DTYPES}
    assert found == {name: (dtype.word_bytes, dtype.exponent8) for name, dtype in DTYPES.items()}
    assert found["BF16"] == (2, True)
    assert found["C64"] == (4, True)
    assert layout_for("F2_TOMORROW") == LAYOUTS[0]
    assert [layout.code for layout in LAYOUTS] == list(range(len(LAYOUTS)))
