"""Tensors are laid into files as the libraries that save models do, and so that loaders can map them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsplit.checkpoint.header import LENGTH_BYTES, parse_header
from mmsplit.dtypes import DTYPES
from mmsplit.errors import RequestError
from mmsplit.exporting.tensor import ExportPartition, ExportTensor, notes_on_ties, state_dict_of
from mmsplit.exporting.weight_files import format_weights_index, lay_out_files


def tensor(name: str, dtype: str = "F32", count: int = 4, *, part_id: int = 0, is_copy: bool = False) -> ExportTensor:
    """A tensor of one dimension."""
    return ExportTensor(part_id, name, dtype, (count,), count, count * DTYPES[dtype].bits // 8, "block", is_copy)


_DTYPES = st.sampled_from(["F64", "F32", "BF16", "U8", "BOOL", "C64", "I64"])


@given(st.lists(st.tuples(_DTYPES, st.integers(0, 9)), max_size=12), st.integers(1, 100))
def test_laws(parts: list[tuple[str, int]], limit: int) -> None:
    """Each tensor once, files in layer order and within the limit, every tensor on a multiple of its width."""
    tensors = [tensor(str(number), dtype, count) for number, (dtype, count) in enumerate(parts)]
    files = lay_out_files(tensors, {}, limit)
    assert sorted(int(t.name) for file in files for t in file.tensors) == list(range(len(tensors)))
    assert [min(int(t.name) for t in file.tensors) for file in files if file.tensors] == sorted(
        min(int(t.name) for t in file.tensors) for file in files if file.tensors
    )
    for file in files:
        assert len(file.tensors) == 1 or sum(t.size_bytes for t in file.tensors) <= limit
        header = parse_header(file.header[LENGTH_BYTES:], file.size_bytes, file.name, file.name)
        assert header.metadata == {"format": "pt"}
        assert {t.name: (t.dtype, t.shape) for t in header.tensors} == {
            t.name: (t.dtype, t.shape) for t in file.tensors
        }
        for found in header.tensors:
            assert found.start_offset % (DTYPES[found.dtype].bits // 8) == 0


def test_names_and_index() -> None:
    """One file has the plain name; several are numbered, and the index has what the libraries write."""
    tensors = [tensor("b"), tensor("a"), tensor("c", "BF16")]
    assert [file.name for file in lay_out_files(tensors, {})] == ["model.safetensors"]
    files = lay_out_files(tensors, {}, 32)
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert json.loads(format_weights_index(files)) == {
        "metadata": {"total_parameters": 12, "total_size": 40},
        "weight_map": {"a": files[0].name, "b": files[0].name, "c": files[1].name},
    }


def test_other_names_are_said_where_the_tensor_is() -> None:
    """`__metadata__` of the file that has the tensor has its other names, and still says pt."""
    one, two = lay_out_files([tensor("wte"), tensor("x")], {"head": "wte", "format": "x", "gone": "elsewhere"}, 16)
    assert json.loads(one.header[8:])["__metadata__"] == {"head": "wte", "format": "pt"}
    assert json.loads(two.header[8:])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize(
    ("made", "limit", "match"),
    [
        (tensor("q")._replace(dtype="Q4_K"), 10, "safetensors has no such dtype"),
        (tensor("__metadata__"), 10, "keeps this name"),
        (tensor("a"), 0, "no such size"),
        (tensor("a"), True, "no such size"),
    ],
)
def test_what_safetensors_cannot_hold(made: ExportTensor, limit: int, match: str) -> None:
    """The error names the tensor, and nothing else is said."""
    with pytest.raises(RequestError, match=match) as raised:
        lay_out_files([made], {}, limit)
    assert raised.value.tensor in (made.name, None)


def chosen(*partitions: ExportPartition) -> list[tuple[str, int]]:
    """Names of what is written, and which partition gives the bytes."""
    tensors, _ = state_dict_of(partitions, ties_restored=False)
    return [(tensor.name, tensor.part_id) for tensor in tensors]


def test_originals_are_taken_rather_than_copies() -> None:
    """A tied weight is written once; its copy only where the original is not."""
    first = ExportPartition(0, (tensor("wte"), tensor("h0")), {})
    last = ExportPartition(1, (tensor("h1", part_id=1), tensor("wte", part_id=1, is_copy=True)), {"head": "wte"})
    assert chosen(last, first) == [("h1", 1), ("wte", 0), ("h0", 0)]
    assert chosen(last) == [("h1", 1), ("wte", 1)]
    assert notes_on_ties([last]) == ()
    referring = last._replace(tensors=last.tensors[:1])
    assert notes_on_ties([first, referring]) == ()
    assert "head is wte of a partition that is not exported" in notes_on_ties([referring])[0]


def test_slices_of_several_partitions_are_refused() -> None:
    """No file can have two tensors of one name."""
    parts = [ExportPartition(k, (tensor("experts", part_id=k),), {}) for k in range(2)]
    with pytest.raises(RequestError, match="slices in several") as raised:
        chosen(*parts)
    assert raised.value.tensor == "experts"
    assert chosen(parts[1]) == [("experts", 1)]
