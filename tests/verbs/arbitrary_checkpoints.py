"""Arbitrary checkpoints, for laws that hold of all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from checkpoints import CAUSAL_CONFIG, MIB, Weight, write_checkpoint
from hypothesis import strategies as st

from mmsplit.dtypes import DTYPES

_STEMS = ["model.embed_tokens", "model.norm", "lm_head", "odd", *(f"model.layers.{k}.mlp.up_proj" for k in range(4))]
_LARGE = 4 * MIB + 70_001  # just over one chunk


class Case(NamedTuple):
    """What to write; see `write_checkpoint`."""

    shards: list[list[Weight]]
    index: bool
    metadata: dict[str, str] | None
    files: dict[str, bytes]
    pad: int

    def write(self, root: Path) -> Path:
        """Write it to the directory `root`."""
        return write_checkpoint(
            root, self.shards, index=self.index, metadata=self.metadata, files=self.files, pad=self.pad
        )


def _shapes(dtype: str) -> st.SearchStrategy[tuple[int, ...]]:
    def whole_bytes(shape: tuple[int, ...]) -> bool:
        return math.prod(shape) * DTYPES[dtype].bits % 8 == 0

    return st.lists(st.integers(0, 40), max_size=4).map(tuple).filter(whole_bytes)


_weights = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda dtype: st.builds(Weight, st.just(""), st.just(dtype), _shapes(dtype), st.sampled_from([0, 20, 100, 256]))
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Checkpoints of any dtypes and shapes, empty tensors and one of two chunks among them."""
    names = draw(st.lists(st.sampled_from(_STEMS), min_size=1, max_size=8, unique=True))
    weights = [draw(_weights)._replace(name=f"{name}.weight") for name in names]
    if draw(st.integers(0, 7)) == 0:
        weights[0] = Weight(weights[0].name, "U8", (_LARGE,), 10)
    count = draw(st.integers(1, min(4, len(weights))))
    return Case(
        shards=[weights[k::count] for k in range(count)],
        index=draw(st.booleans()),
        metadata=draw(st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2)),
        files=draw(
            st.sampled_from(
                [{}, {"config.json": CAUSAL_CONFIG}, {"config.json": b"?", "deep/er/vocab.txt": b"\0" * 99}]
            )
        ),
        pad=draw(st.integers(0, 9)),
    )
