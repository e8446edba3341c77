"""The JSON form: numbers as the shortest text that reads back, and a reader that takes nothing it should not."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsplit.errors import FormatError, RequestError
from mmsplit.exporting import parameters_reader
from mmsplit.exporting.parameters_json import format_numbers
from mmsplit.exporting.parameters_reader import load_partition_json

_FLOATS = st.integers(0, 2**32 - 1).map(lambda bits: struct.unpack("<f", struct.pack("<I", bits))[0])


def _bits(values: object) -> list[int]:
    return np.asarray(values, np.float32).view(np.uint32).tolist()


@given(st.lists(_FLOATS.filter(lambda value: not math.isinf(value)), min_size=1, max_size=50), st.booleans())
def test_numbers_read_back_and_are_short(values: list[float], repeating: bool) -> None:
    """Any float32 comes back bit for bit, NaN as NaN; no text is longer than numpy's shortest."""
    numbers = np.array(values, np.float32)
    texts = format_numbers(numbers, "w", repeating=repeating).split(",")
    for text, number in zip(texts, numbers, strict=True):
        if np.isnan(number):
            assert text == "null"
        else:
            assert _bits(json.loads(text)) == _bits(number)
            digits = np.format_float_scientific(number, unique=True, trim="-").partition("e")[0].strip("-")
            assert len(text.partition("e")[0].replace(".", "").replace("-", "").strip("0")) <= len(digits)


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinity_is_refused(value: float) -> None:
    """Null would read back as NaN, so that it would be lost without a word."""
    with pytest.raises(RequestError, match="infinite") as raised:
        format_numbers(np.array([1, value], np.float32), "mask", repeating=True)
    assert raised.value.tensor == "mask"


#: As a program in Rust writes it (serde_json), in one line; and with other fields, in another order, spread out.
ORIGINAL = (
    '{"part_id":2,"layers":[{"name":"h.0","layer_type":"attention","shape":[2,3],'
    '"parameters":[0.1,-0.0,1e-7,null,3.4028235e38,1]},'
    '{"name":"scale","layer_type":"norm","shape":[],"parameters":[2.5]},'
    '{"name":"empty","layer_type":"norm","shape":[0,4],"parameters":[]}],"total_params":7}'
)
SPREAD = """ {
  "made_by": {"a": [1, {"b": null}], "text": "] } \\" \\u00e9 é"}, "total_params": 7, "layers": [
    { "parameters": [ 0.1 , -0.0 , 1E-7 ,
       null, 3.4028235e38, 1 ], "shape": [ 2, 3 ], "x": -12.5, "layer_type": "attention", "name": "h.0" },
    { "shape": [], "parameters": [ 2.5 ], "layer_type": "norm", "name": "scale", "y": 7 },
    { "name": "empty", "layer_type": "norm", "shape": [0, 4], "parameters": [ ] } ] ,
  "part_id": 2 }
"""


@pytest.mark.parametrize("text", [ORIGINAL, SPREAD])
@pytest.mark.parametrize("block_bytes", [1, 2, 7, 1 << 20])
def test_the_original_form_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, block_bytes: int
) -> None:
    """Whatever the spelling, and wherever the blocks end that it is read in."""
    monkeypatch.setattr(parameters_reader, "_BLOCK_BYTES", block_bytes)
    path = tmp_path / "p.json"
    path.write_text(text)
    found = load_partition_json(path)
    assert (found.part_id, found.total_params) == (2, 7)
    assert [layer[:3] for layer in found.layers] == [
        ("h.0", "attention", (2, 3)),
        ("scale", "norm", ()),
        ("empty", "norm", (0, 4)),
    ]
    assert _bits(found.layers[0].parameters) == _bits([0.1, -0.0, 1e-7, np.nan, 3.4028235e38, 1])
    assert [layer.parameters.dtype for layer in found.layers] == [np.float32] * 3


def _with(**changes: object) -> str:
    layer: dict[str, object] = {"name": "a", "layer_type": "block", "shape": [2], "parameters": [1.0, 2.0]}
    whole: dict[str, object] = {"part_id": 0, "layers": [layer], "total_params": 2}
    for key, value in changes.items():
        target = whole if key in whole else layer
        if value is None:
            del target[key]
        else:
            target[key] = value
    return json.dumps(whole)


HOSTILE = {
    "nothing": "",
    "not an object": "[]",
    "an empty object": "{}",
    "a sidecar": '{"format": "mmsplit-partition", "part_id": 0}',
    "not JSON": "PK\x03\x04",
    "no part_id": _with(part_id=None),
    "part_id is true": _with(part_id=True),
    "part_id is negative": _with(part_id=-1),
    "part_id is a fraction": _with(part_id=0.0),
    "part_id is endless": '{"part_id": ' + "9" * 5000 + "}",
    "no layers": _with(layers=None),
    "layers are an object": _with(layers={}),
    "a layer is a number": _with(layers=[1]),
    "no total_params": _with(total_params=None),
    "total_params is wrong": _with(total_params=3),
    "name is missing": _with(name=None),
    "name is a number": _with(name=1),
    "layer_type is missing": _with(layer_type=None),
    "shape is missing": _with(shape=None),
    "shape is text": _with(shape="2"),
    "a size is negative": _with(shape=[-1, -2]),
    "a size is true": _with(shape=[True, 2]),
    "shape does not fit": _with(shape=[3]),
    "shape is huge": _with(shape=[2**63] * 1000),
    "parameters are missing": _with(parameters=None),
    "parameters are nested": _with(parameters=[[1.0, 2.0]]),
    "parameters are text": _with(parameters="12"),
    "a parameter is text": _with(parameters=["1", "2"]),
    "a parameter is true": _with(parameters=[True, 1.0]),
    "a parameter is beyond float32": _with(parameters=[1e39, 1.0]),
    "a parameter is an endless integer": _with(parameters=[10**400, 1]),
    "a parameter is 1e999": _with().replace("1.0", "1e999"),
    "NaN": _with().replace("1.0", "NaN"),
    "Infinity": _with().replace("1.0", "-Infinity"),
    "a comma too many": _with().replace("2.0]", "2.0,]"),
    "a comma before all": _with().replace("[1.0", "[,1.0"),
    "two commas": _with().replace("1.0, 2.0", "1.0,,2.0"),
    "a comma is missing": _with().replace("1.0, 2.0", "1.0 2.0"),
    "the list is not closed": _with().partition("2.0")[0] + "2.0",
    "text ends": _with()[:-1],
    "text goes on": _with() + "{}",
    "two layers of a name": _with(
        layers=[{"name": "a", "layer_type": "b", "shape": [1], "parameters": [1]}] * 2, total_params=2
    ),
    "a key occurs twice": '{"part_id": 0, "part_id": 1}',
    "a key is no text": "{1: 2}",
    "a key is endless": '{"' + "x" * (3 << 20) + '": 1}',
    "a value is endless": '{"x": "' + "x" * (3 << 20) + '", "part_id": 0}',
    "deep": '{"x": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "another encoding": _with().encode("utf-16").decode("latin-1"),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("block_bytes", [3, 1 << 20])
def test_hostile_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, block_bytes: int) -> None:
    """Each has its one error, which names the file."""
    if block_bytes == 3 and len(HOSTILE[what]) > 10_000:
        pytest.skip("as slow as it is long")
    monkeypatch.setattr(parameters_reader, "_BLOCK_BYTES", block_bytes)
    path = tmp_path / "p.json"
    path.write_text(HOSTILE[what], "latin-1")
    with pytest.raises(FormatError) as raised:
        load_partition_json(path)
    assert raised.value.path == str(path)
    assert len(str(raised.value)) < 1000


def test_what_is_not_there_or_not_utf8(tmp_path: Path) -> None:
    """The operating system's refusal, and bytes that are no text."""
    with pytest.raises(FormatError, match="cannot read"):
        load_partition_json(tmp_path / "none.json")
    with pytest.raises(FormatError, match="cannot read"):
        load_partition_json(tmp_path)
    (tmp_path / "p.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(FormatError, match="not UTF-8"):
        load_partition_json(tmp_path / "p.json")
