"""The JSON form of a partition: its names, and how its text is written.

    {"part_id": 1, "layers": [
    {"name": "model.norm.weight", "layer_type": "norm", "shape": [4], "parameters": [1.0,0.5,null,-3e-05]}
    ], "total_params": 4}

The original system wrote this with a list of layers, each with one shape and one flat list of f32.  A layer here has
several tensors, and a shape is only that of a tensor: so there is one entry per tensor, `name` is the tensor's,
`layer_type` that of its layer.  A number is the shortest decimal that reads back as the same f32; NaN, which JSON does
not have, is `null`, as that system's writer (serde_json) made it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmsplit.errors import RequestError

#: Text per number is made in pieces of so many numbers.
PIECE_NUMBERS: Final = 1 << 16
#: Layer types are few and their names short; shapes have few dimensions.
ENTRY_BYTES: Final = 128


class ExportedLayer(NamedTuple):
    """One entry: its numbers in one flat array, which `shape` gives their places."""

    name: str
    layer_type: str
    shape: tuple[int, ...]
    parameters: NDArray[np.float32]


class ExportedPartition(NamedTuple):
    """A partition in the original system's terms.  `total_params` is the number of all parameters."""

    part_id: int
    layers: tuple[ExportedLayer, ...]
    total_params: int


def parameters_name(part_id: int) -> str:
    """Return the file name of a partition's parameters; it is none that a partition set has."""
    return f"parameters_of_partition_{part_id}.json"


def format_beginning(part_id: int) -> str:
    """Return the text before the first entry."""
    return f'{{"part_id": {part_id}, "layers": ['


def format_entry(name: str, layer_type: str, shape: Sequence[int], *, first: bool) -> str:
    """Return the text of an entry up to its first number."""
    head = json.dumps({"name": name, "layer_type": layer_type, "shape": list(shape)})
    return f'{"" if first else ","}\n{head[:-1]}, "parameters": ['


ENTRY_END: Final = "]}"


def format_end(total_params: int) -> str:
    """Return the text after the last entry."""
    return f'\n], "total_params": {total_params}}}\n'


def format_numbers(numbers: NDArray[np.float32], tensor: str, *, repeating: bool) -> str:
    """Return numbers as text with commas between.  Raises `RequestError` for an infinite one.

    Of `repeating` numbers, those that were 16 bits wide or less, each is put into text once.
    """
    if np.isinf(numbers).any():
        raise RequestError(
            "tensor has an infinite number, which JSON cannot hold, or one beyond float32",
            tensor=tensor,
            hint="Export to safetensors instead.",
        )
    if repeating:
        bits, places = np.unique(numbers.view(np.uint32), return_inverse=True)
        texts = list(map(str, bits.view(np.float32)))
        text = ",".join(map(texts.__getitem__, places.tolist()))
    else:
        text = ",".join(map(str, numbers))
    return text.replace("nan", "null") if np.isnan(numbers).any() else text
