"""`bench` measures what it says, cleans up whatever happens, and says what is in its way."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import mmsplit
from mmsplit.benchmark import bench as bench_module
from mmsplit.benchmark import rates
from mmsplit.benchmark.sample import choose_tensors, write_sample
from mmsplit.cli import run
from mmsplit.cli.bench_command import _advice


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of 12 blocks of two dtypes, about 12 MB."""
    directory = tmp_path / "model"
    directory.mkdir()
    rng = np.random.default_rng(0)
    tensors = {f"model.layers.{i}.w.weight": rng.standard_normal(200_000, np.float32) for i in range(12)}
    tensors |= {f"model.layers.{i}.h.weight": rng.standard_normal(100_000).astype(np.float16) for i in range(12)}
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_bench_measures_every_part(checkpoint: Path, tmp_path: Path) -> None:
    """Every rate is positive, both dtypes and every thread count are there, and the work directory is gone."""
    out = tmp_path / "out"
    steps: list[str] = []
    result = mmsplit.bench(checkpoint, out, sample_bytes=6_000_000, threads=2, say=steps.append)
    assert [item.dtype for item in result.dtypes] == ["F16", "F32"]
    assert set(result.split_by_threads) == {1, 2}
    assert result.best_threads in (1, 2)
    assert result.bottleneck in ("disk", "processor", "memory")
    for name in ("copy", "checksum", "digest", "read", "write", "verify", "load"):
        assert getattr(result, name) > 0
    assert 0 < result.ratio <= 1.01
    assert 0 < result.sample_bytes <= 6_000_000
    assert set(result.seconds_for(10**9)) == {"split", "verify", "load"}
    assert steps
    assert not out.exists()
    json.dumps(result.as_json())


def test_bench_command_prints_json_and_tables(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints a result for people and for programs, with the estimate that was asked for."""
    words = ["bench", str(checkpoint), "--out", str(tmp_path), "--sample-gb", "0.01", "-t", "1", "--model-gb", "70"]
    assert run([*words, "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds_for_model"]["split"] > 0
    assert run(words) == 0
    output = capsys.readouterr()
    assert "a model of 70 GB" in output.out
    assert "limited by the" in output.out
    assert "splitting with 1 thread" in output.err


def test_the_advice_fits_the_figures(checkpoint: Path, tmp_path: Path) -> None:
    """Where more threads are a little faster than the advised number, the advice says so."""
    result = mmsplit.bench(checkpoint, tmp_path / "out", sample_bytes=6_000_000, threads=1)
    assert _advice(result._replace(split_by_threads={1: 100.0, 2: 104.0})) == (
        "use --threads 1: 2 threads are 4 % faster, which is within the noise of such a measurement"
    )
    assert _advice(result._replace(split_by_threads={1: 100.0, 2: 110.0})) == "use --threads 2"
    assert _advice(result._replace(split_by_threads={1: 100.0, 2: 90.0})) == "use --threads 1"


def test_bench_asks_before_it_writes_much(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --yes and with nobody to answer, a bench of many gigabytes does not start."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert run(["bench", str(checkpoint), "--out", str(tmp_path / "o"), "--sample-gb", "50"]) == 130
    assert not (tmp_path / "o").exists()
    assert "Go on?" in capsys.readouterr().err


def test_bench_without_space_says_so(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little free space is one error that says how much is needed; nothing stays behind."""
    monkeypatch.setattr(bench_module, "free_bytes", lambda _: 1000)
    with pytest.raises(mmsplit.NoSpaceError, match="bench") as caught:
        mmsplit.bench(checkpoint, tmp_path / "out", sample_bytes=6_000_000)
    assert caught.value.found == 1000
    assert not (tmp_path / "out").exists()


def test_bench_cleans_up_after_an_error(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error half-way leaves nothing behind."""

    def fail(*_: object, **__: object) -> None:
        raise mmsplit.OutputError("disk is gone")

    monkeypatch.setattr(bench_module, "split", fail)
    with pytest.raises(mmsplit.OutputError, match="disk is gone"):
        mmsplit.bench(checkpoint, tmp_path / "out", sample_bytes=6_000_000, threads=1)
    assert not (tmp_path / "out").exists()


def test_bench_out_must_be_a_directory(checkpoint: Path, tmp_path: Path) -> None:
    """A file in the way of --out is an OutputError that names it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(mmsplit.OutputError, match="file"):
        mmsplit.bench(checkpoint, tmp_path / "file")


def test_sample_is_whole_layers_with_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    """A sample is a checkpoint of its own whose tensors are those of the source."""
    source = mmsplit.open_checkpoint(checkpoint)
    tensors = choose_tensors(source, 4_000_000)
    assert 0 < sum(tensor.size_bytes for tensor in tensors) <= 4_000_000
    layers = {tensor.name.split(".")[2] for tensor in tensors}
    assert len(tensors) == 2 * len(layers)
    path = write_sample(source, tensors, tmp_path / "sample")
    sample = mmsplit.open_checkpoint(tmp_path / "sample")
    data, original = path.read_bytes(), (checkpoint / "model.safetensors").read_bytes()
    for tensor in tensors:
        mine = sample.tensors[tensor.name]
        assert data[mine.start_offset : mine.stop_offset] == original[tensor.start_offset : tensor.stop_offset]


@pytest.mark.parametrize(("most", "counts"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8])])
def test_thread_counts(most: int, counts: list[int]) -> None:
    """Thread counts double up to the number of processors, which is always among them."""
    assert list(rates.thread_counts(most)) == counts
