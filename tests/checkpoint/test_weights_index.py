"""The weights index: what it may say, and names that would lead out of the checkpoint."""

import json

import pytest

from mmsplit.checkpoint.weights_index import is_plain_name, parse_weights_index
from mmsplit.errors import CheckpointError


def test_weight_map_is_returned_as_it_stands() -> None:
    """Metadata and other fields do not matter."""
    weight_map = {"b": "model-2.safetensors", "a": "model-1.safetensors"}
    data = json.dumps({"metadata": {"total_size": 1e400}, "weight_map": weight_map}).encode()
    assert parse_weights_index(data, "i", (".safetensors",)) == weight_map


NOT_AN_INDEX = {
    "empty": (b"", "not JSON"),
    "not UTF-8": (b'{"weight_map": "\xff"}', "not JSON"),
    "deep": (b"[" * 200_000, "not JSON"),
    "a list": (b"[]", "no weight_map"),
    "no map": (b"{}", "no weight_map"),
    "null map": (b'{"weight_map": null}', "no weight_map"),
    "list map": (b'{"weight_map": ["a"]}', "no weight_map"),
    "empty map": (b'{"weight_map": {}}', "no weight_map"),
    "UTF-16": ('{"weight_map": {"a": "x.safetensors"}}'.encode("utf-16-le"), "is not JSON"),
    "byte order mark": (b'\xef\xbb\xbf{"weight_map": {"a": "x.safetensors"}}', "is not JSON"),
    "shard a number": (b'{"weight_map": {"a": 1}}', "does not name a shard"),
    "shard null": (b'{"weight_map": {"a": null}}', "does not name a shard"),
    "shard a list": (b'{"weight_map": {"a": ["x.safetensors"]}}', "does not name a shard"),
    "pickle": (b'{"weight_map": {"a": "pytorch_model.bin"}}', "not a .safetensors file"),
    "small file": (b'{"weight_map": {"a": "config.json"}}', "not a .safetensors file"),
}


@pytest.mark.parametrize(("data", "words"), NOT_AN_INDEX.values(), ids=NOT_AN_INDEX)
def test_what_is_no_index_is_an_error_in_words(data: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        parse_weights_index(data, "i", (".safetensors",))
    assert caught.value.path == "i"


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "\\\\host\\x.safetensors",
        "..",
        ".",
        "",
        "x\0.safetensors",
        "x\n.safetensors",
        "\x1b[2J.safetensors",
        "x\u202e.safetensors",
        "x\udc80.safetensors",
        "x.safetensors.",
        "x.safetensors ",
        "NUL",
        "nul.safetensors",
        "Com1 .x.safetensors",
    ],
)
def test_name_that_could_lead_elsewhere_is_refused(name: str) -> None:
    """Path tricks, terminal tricks and names that are no text; the tensor that asks for it is named."""
    assert not is_plain_name(name)
    with pytest.raises(CheckpointError, match="not a plain file name") as caught:
        parse_weights_index(json.dumps({"weight_map": {"t": name}}).encode(), "i", (".safetensors",))
    assert caught.value.tensor == "t"


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "a b.safetensors", "模型.safetensors", "..x", "console.x", "com.x"]
)
def test_ordinary_name_is_plain(name: str) -> None:
    assert is_plain_name(name)
