"""ggml's tensor types, by the number that a GGUF file stores: their name, and the size of their blocks.  Pure.

A type that safetensors has, too, bears its name, and its width is that of `mmsplit.dtypes`, the one table of dtypes.
All others are quantised: a row is cut into blocks of so many elements, each stored in so many bytes, scales included.
To the rest of mmsplit those are dtypes it does not know, and so opaque bytes; none is in `mmsplit.dtypes`.

Sources: the numbers are those of `enum ggml_type` in ggml/include/ggml.h, the sizes those of the `block_*` structures
in ggml/src/ggml-common.h, both as of llama.cpp in 2026 (gguf-py 0.19).  31 to 33 were taken back, but files of them
exist; their blocks are those of Q4_0 in another order.  Numbers that are not here: 4 and 5 are older than GGUF, 36 to
38 mean different things to different programs, and from 97 on forks have types of their own.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from mmsplit.dtypes import DTYPES


class GgmlType(NamedTuple):
    """One tensor type: `block_elements` elements, neighbours in a row, take `block_bytes` bytes."""

    name: str
    block_elements: int
    block_bytes: int


_PLAIN: Final = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}

_BLOCKS: Final = {
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    9: GgmlType("Q8_1", 32, 40),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    15: GgmlType("Q8_K", 256, 292),
    16: GgmlType("IQ2_XXS", 256, 66),
    17: GgmlType("IQ2_XS", 256, 74),
    18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50),
    20: GgmlType("IQ4_NL", 32, 18),
    21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82),
    23: GgmlType("IQ4_XS", 256, 136),
    29: GgmlType("IQ1_M", 256, 56),
    31: GgmlType("Q4_0_4_4", 32, 18),
    32: GgmlType("Q4_0_4_8", 32, 18),
    33: GgmlType("Q4_0_8_8", 32, 18),
    34: GgmlType("TQ1_0", 256, 54),
    35: GgmlType("TQ2_0", 256, 66),
    39: GgmlType("MXFP4", 32, 17),
    40: GgmlType("NVFP4", 64, 36),
    41: GgmlType("Q1_0", 128, 18),
}

GGML_TYPES: Final[dict[int, GgmlType]] = {
    **{number: GgmlType(name, 1, DTYPES[name].bits // 8) for number, name in _PLAIN.items()},
    **_BLOCKS,
}
