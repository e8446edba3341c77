"""Words taken apart into planes and put together again."""

import numpy as np
import pytest

from mmsplit.codec import word
from mmsplit.codec.word import LAYOUTS, WordLayout, WordSplitter, layout_for
from mmsplit.dtypes import DTYPES


def ids(layout: WordLayout) -> str:
    return f"{layout.word_bytes} bytes{', exponent of 8 bits' if layout.exponent8 else ''}"


def split(raw: np.ndarray, layout: WordLayout) -> list[np.ndarray]:
    planes = [np.empty(len(raw) // layout.word_bytes, np.uint8) for _ in range(layout.word_bytes)]
    WordSplitter().split(raw, layout, planes)
    return planes


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
def test_planes_hold_what_the_docstring_says(layout: WordLayout) -> None:
    """Byte p of every word in plane p; with an 8-bit exponent the two top bytes are regrouped."""
    raw = np.random.default_rng(1).integers(0, 256, 40 * layout.word_bytes, np.uint8)
    expected = raw.reshape(-1, layout.word_bytes).T.copy()
    if layout.exponent8:
        top = expected[-1].astype(int) << 8 | expected[-2]
        expected[-1] = top >> 7 & 0xFF
        expected[-2] = (top >> 15) << 7 | top & 0x7F
    np.testing.assert_array_equal(split(raw, layout), expected)


def test_every_16_bit_word_survives_both_layouts() -> None:
    """All 65,536 of them: NaN payloads, -0, denormals, infinities."""
    raw = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    for layout in (LAYOUTS[1], LAYOUTS[4]):
        back = np.empty_like(raw)
        WordSplitter().merge(split(raw, layout), layout, back)
        np.testing.assert_array_equal(back, raw)


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
@pytest.mark.parametrize("words", [0, 1, 3, 63, 64, 65, 129])
@pytest.mark.parametrize("shift", [0, 1])
def test_merge_is_the_inverse_of_split(
    monkeypatch: pytest.MonkeyPatch, layout: WordLayout, words: int, shift: int
) -> None:
    """Around the edges of a block of 64 words, at even and odd addresses; nothing outside is written."""
    monkeypatch.setattr(word, "_BLOCK_WORDS", 64)
    size = words * layout.word_bytes
    raw = np.random.default_rng(words).integers(0, 256, size + 1, np.uint8)[shift : shift + size]
    target = np.full(size + 9, 0xAA, np.uint8)
    WordSplitter().merge(split(raw, layout), layout, target[shift : shift + size])
    np.testing.assert_array_equal(target[shift : shift + size], raw)
    assert (target[:shift] == 0xAA).all()
    assert (target[shift + size :] == 0xAA).all()


def test_layout_follows_the_table_of_dtypes() -> None:
    """By word size and exponent; bytes for a dtype of tomorrow."""
    found = {name: (layout_for(name).word_bytes, layout_for(name).exponent8) for name in DTYPES}
    assert found == {name: (dtype.word_bytes, dtype.exponent8) for name, dtype in DTYPES.items()}
    assert found["BF16"] == (2, True)
    assert found["C64"] == (4, True)
    assert layout_for("F2_TOMORROW") == LAYOUTS[0]
    assert [layout.code for layout in LAYOUTS] == list(range(len(LAYOUTS)))
