"""PyTorch files through the whole engine: the same tensors as torch.load gave, and the same file again."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mmsplit
from mmsplit.errors import TorchFileError

FIXTURES = Path(__file__).parent.parent / "checkpoint" / "torch_fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())


def expected_tensors(name: str) -> dict[str, str]:
    """SHA-256 of each tensor's elements in row-major order, by name, as torch.load gave them."""
    records = EXPECTED["read"][name]["tensors"]
    paths = [record["path"] for record in records]
    common = 0
    while len({tuple(path[: common + 1]) for path in paths}) == 1 and all(len(path) > common + 1 for path in paths):
        common += 1
    opened = mmsplit.open_checkpoint(FIXTURES / name, allow_unknown_dtypes=True)
    names = {*opened.tensors, *opened.views}
    for cut in range(common + 1):
        found = {".".join(path[cut:]): record["sha256"] for path, record in zip(paths, records, strict=True)}
        if set(found) <= names:
            return found
    raise AssertionError(names)


@pytest.mark.parametrize("tied", ["duplicate", "reference", "colocate"])
@pytest.mark.parametrize("name", EXPECTED["read"])
def test_what_torch_loads_comes_back(tmp_path: Path, name: str, tied: str) -> None:
    """Split, verified against the source, read by every name of the state dict, merged to the same bytes."""
    source = tmp_path / "source" / name
    source.parent.mkdir()
    shutil.copy(FIXTURES / name, source)
    parts = min(2, len(mmsplit.plan(source, 1, allow_unknown_dtypes=True).partitions[0].layers))
    mmsplit.split(source, tmp_path / "set", parts, tied=tied, allow_unknown_dtypes=True)
    result = mmsplit.verify(
        tmp_path / "set", level="full", against=mmsplit.open_checkpoint(source, allow_unknown_dtypes=True)
    )
    assert result.ok, result.problems
    with mmsplit.open_set(tmp_path / "set") as partitions:
        for tensor, sha256 in expected_tensors(name).items():
            data = np.ascontiguousarray(partitions[tensor]).tobytes()
            assert hashlib.sha256(data).hexdigest() == sha256, tensor
    mmsplit.merge(tmp_path / "set", tmp_path / "merged")
    assert (tmp_path / "merged" / name).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("cut", ["type", "rule"])
@pytest.mark.parametrize("tied", ["duplicate", "reference", "colocate"])
@pytest.mark.parametrize("name", EXPECTED["read"])
def test_other_cuts_come_back(tmp_path: Path, name: str, tied: str, cut: str) -> None:
    """Names that see other tensors' bytes, several ties, bytes that no name sees: whatever the cut."""
    source = mmsplit.open_checkpoint(FIXTURES / name, allow_unknown_dtypes=True)
    order = {tensor: number % 2 for number, tensor in enumerate(source.tensors)}
    options = {"split_by": "type"} if cut == "type" else {"rule": lambda tensor: order.get(tensor.name, 1)}
    mmsplit.split(source, tmp_path / "set", tied=tied, **options)
    assert mmsplit.verify(tmp_path / "set", level="full", against=source).problems == ()
    with mmsplit.open_set(tmp_path / "set") as partitions:
        for tensor, sha256 in expected_tensors(name).items():
            data = np.ascontiguousarray(partitions[tensor]).tobytes()
            assert hashlib.sha256(data).hexdigest() == sha256, tensor
    mmsplit.merge(tmp_path / "set", tmp_path / "merged")
    assert (tmp_path / "merged" / name).read_bytes() == (FIXTURES / name).read_bytes()


@pytest.mark.parametrize("name", EXPECTED["refused"])
def test_what_is_refused_is_refused_by_every_verb(tmp_path: Path, name: str) -> None:
    """The one clear error, and nothing left behind."""
    with pytest.raises(TorchFileError):
        mmsplit.split(FIXTURES / name, tmp_path / "set", 1)
    assert not (tmp_path / "set").exists()


def test_file_is_read_for_what_it_is(tmp_path: Path) -> None:
    """The form is found out from the bytes: safetensors called .bin, a PyTorch file without any ending."""
    shutil.copy(FIXTURES / "module.zip.bin", tmp_path / "blob")
    assert "embed.weight" in mmsplit.open_checkpoint(tmp_path / "blob").tensors
    header = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "pytorch_model.bin").write_bytes(len(header).to_bytes(8, "little") + header + b"xy")
    opened = mmsplit.open_checkpoint(tmp_path / "pytorch_model.bin")
    assert (list(opened.tensors), opened.shards[0].form) == (["a"], "safetensors")
