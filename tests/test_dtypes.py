"""The one table of dtypes, against the libraries it speaks of."""

import ml_dtypes
import numpy as np
import pytest
import safetensors

from mmsplit.dtypes import DTYPES, DType


def test_table_has_the_22_names_of_safetensors() -> None:
    """Keys are the names; the reference knows each of them, and its width."""
    assert len(DTYPES) == 22
    for name, dtype in DTYPES.items():
        assert dtype.name == name
        header = f'{{"a":{{"dtype":"{name}","shape":[8],"data_offsets":[0,{dtype.bits}]}}}}'.encode()
        safetensors.deserialize(len(header).to_bytes(8, "little") + header + bytes(dtype.bits))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_numpy_sees_the_width_of_the_table(dtype: DType) -> None:
    """Every dtype of whole bytes has a name in numpy or ml_dtypes; those below a byte have none."""
    if dtype.bits < 8:
        assert dtype.numpy_name is None
        assert dtype.word_bytes == 1
        return
    assert dtype.numpy_name is not None
    assert np.dtype(getattr(ml_dtypes, dtype.numpy_name, None) or dtype.numpy_name).itemsize * 8 == dtype.bits
    assert dtype.bits // 8 % dtype.word_bytes == 0


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if dtype.exponent8])
def test_exponent_of_eight_bits_is_where_the_codec_takes_it_apart(name: str) -> None:
    """Doubling a number changes the eight bits below the sign by one, and nothing else."""
    dtype = DTYPES[name]
    numpy_dtype = np.dtype(
        "float32" if name == "C64" else getattr(ml_dtypes, dtype.numpy_name, None) or dtype.numpy_name
    )
    word = f"<u{dtype.word_bytes}"
    one, two = (np.array([-value], numpy_dtype).view(word).item() for value in (1, 2))
    assert two - one == 1 << (8 * dtype.word_bytes - 9)
