"""A view that is its base under another name is said in the header; any other is refused by name."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from mmsplit.checkpoint import TensorInfo
from mmsplit.errors import RequestError
from mmsplit.exporting.checkpoint_source import aliases_of_views

BASE = TensorInfo("wte", "F32", (4, 6), "a.bin", 100, 196, 24)


class Seen(NamedTuple):
    """A view as a checkpoint has it."""

    name: str = "head"
    dtype: str = "F32"
    shape: tuple[int, ...] = (4, 6)
    stride: tuple[int, ...] = (6, 1)
    offset_bytes: int = 0
    base: str = "wte"


def test_the_same_tensor_is_an_alias() -> None:
    """Also where the stride of a dimension of one element says something else."""
    assert aliases_of_views({"head": Seen()}, {"wte": BASE}) == {"head": "wte"}
    thin = BASE._replace(shape=(1, 24))
    assert aliases_of_views({"head": Seen(shape=(1, 24), stride=(7, 1))}, {"wte": thin}) == {"head": "wte"}


@pytest.mark.parametrize(
    "view",
    [
        Seen(shape=(6, 4), stride=(1, 6)),
        Seen(shape=(2, 6)),
        Seen(offset_bytes=24, shape=(3, 6)),
        Seen(stride=(0, 1)),
        Seen(dtype="I32"),
        Seen(shape=(24,), stride=(1,)),
    ],
)
def test_any_other_is_refused(view: Seen) -> None:
    """Transposed, sliced, expanded, seen as another dtype or shape."""
    with pytest.raises(RequestError, match="view of wte") as raised:
        aliases_of_views({"head": view}, {"wte": BASE})
    assert raised.value.tensor == "head"
