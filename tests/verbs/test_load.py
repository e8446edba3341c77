"""`open_partition` and `open_set`: the true arrays, copied only where they must be, verified unless told otherwise."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import CAUSAL_CONFIG, MIB, Weight, flip, write_checkpoint
from safetensors import safe_open

import mmsplit
from mmsplit.checkpoint import open_checkpoint
from mmsplit.codec import RAW
from mmsplit.dtypes import DTYPES
from mmsplit.errors import IntegrityError, MissingPartitionError, RequestError
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.verbs.load import open_partition, open_set
from mmsplit.verbs.split import split

BIG = "model.layers.1.mlp.big.weight"


def _weights() -> list[Weight]:
    """Every dtype, empty, scalar and large tensors among them; layers enough for two partitions."""
    weights = [
        Weight(f"model.layers.{number % 2}.{dtype.lower()}.weight", dtype, (6, 8), 256 if number % 3 else 40)
        for number, dtype in enumerate(DTYPES)
    ]
    return [
        Weight("model.embed_tokens.weight", "BF16", (400, 32)),
        *weights,
        Weight("model.layers.0.scalar", "F64", ()),
        Weight("model.layers.0.empty", "F32", (3, 0, 2)),
        Weight(BIG, "BF16", (5, MIB), 60),
        Weight("model.norm.weight", "F32", (9,)),
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tied head, its weights at an odd offset."""
    root = tmp_path_factory.mktemp("model") / "model"
    return write_checkpoint(root, [_weights()], files={"config.json": CAUSAL_CONFIG}, pad=3)


@pytest.fixture(scope="module", params=["planes", "raw"])
def made(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set of it, encoded, and as it is."""
    out = tmp_path_factory.mktemp("made") / request.param
    split(source, out, 2, codec=request.param)
    return out


@pytest.fixture
def raw(source: Path, tmp_path: Path) -> Path:
    """A set stored raw, to be damaged."""
    split(source, tmp_path / "raw", 2, codec="raw")
    return tmp_path / "raw"


def _true_bytes(source: Path) -> dict[str, bytes]:
    data = (source / "model.safetensors").read_bytes()
    tensors = open_checkpoint(source).tensors
    return {name: data[tensor.start_offset : tensor.stop_offset] for name, tensor in tensors.items()}


def test_every_tensor_has_its_dtype_shape_and_bytes(made: Path, source: Path) -> None:
    """All 22 dtypes, as numpy's or ml_dtypes' own; packed ones as the bytes they are."""
    expected, infos = _true_bytes(source), open_checkpoint(source).tensors
    with open_set(made) as opened:
        assert set(opened) == set(expected)
        assert len(opened) == len(expected)
        for name, array in opened.items():
            known = DTYPES[infos[name].dtype].numpy_name
            assert array.tobytes() == expected[name], name
            assert array.dtype == (np.uint8 if known is None else np.dtype(getattr(ml_dtypes, known, known))), name
            assert array.shape == (infos[name].shape if known is not None else (len(expected[name]),)), name


def test_arrays_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    """The same values, dtype and shape that the reference implementation loads."""
    numpy_dtypes = ["BOOL", "U8", "I8", "I16", "U16", "F16", "I32", "U32", "F32", "F64", "I64", "U64", "BF16"]
    weights = [Weight(f"model.layers.{k}.mlp.weight", dtype, (4, 3)) for k, dtype in enumerate(numpy_dtypes)]
    weights[0] = weights[0]._replace(noise=0)
    source = write_checkpoint(tmp_path / "model", [weights])
    split(source, tmp_path / "set", 3)
    with open_set(tmp_path / "set") as ours, safe_open(source / "model.safetensors", "numpy") as theirs:
        for name in theirs.keys():  # noqa: SIM118 - it is no mapping
            array = theirs.get_tensor(name)
            assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape)
            assert ours[name].tobytes() == array.tobytes()


def test_a_raw_tensor_is_a_view_of_the_map(raw: Path) -> None:
    """No copy is made of it, large or small: it is read-only, aligned, and reading it again gives the same place."""
    with open_set(raw) as opened:
        for name in (BIG, "model.layers.1.f32.weight", "model.layers.0.scalar"):
            first, second = opened[name], opened[name]
            assert first.ctypes.data == second.ctypes.data
            assert first.ctypes.data % 64 == 0
            assert not first.flags.writeable
            assert not first.flags.owndata


def test_an_encoded_tensor_is_memory_of_its_own(made: Path) -> None:
    """What had to be decoded belongs to the caller, who may write to it."""
    with open_partition_files(made / "partition_1.json", "pread") as files:
        entry = next(tensor for tensor in files.tensors if tensor.name == BIG)
        encoded = bool((files.index[entry.first_chunk : entry.first_chunk + entry.chunk_count]["codec"] != RAW).all())
    with open_set(made) as opened:
        assert opened[BIG].flags.writeable == encoded
        assert encoded == (made.name == "planes")


def test_views_outlive_the_partition(raw: Path, source: Path) -> None:
    """A view that was handed out stays valid after close, and the files can be closed while it lives."""
    opened = open_partition(raw / "partition_1.json")
    view = opened[BIG]
    opened.close()
    opened.close()
    assert view.tobytes() == _true_bytes(source)[BIG]


def _buffers(size: int) -> dict[str, Any]:
    return {
        "bytearray": bytearray(size),
        "memoryview": memoryview(bytearray(size)),
        "array of bytes": np.zeros(size, np.uint8),
        "array of its dtype": np.zeros(size // 2, ml_dtypes.bfloat16).reshape(5, -1),
        "array of floats": np.zeros(size // 4, np.float32),
        "slice": np.zeros(size + 64, np.uint8)[64:],
    }


@pytest.mark.parametrize("kind", _buffers(20))
def test_read_into_a_buffer(made: Path, source: Path, kind: str) -> None:
    """Any writable buffer of the right size takes the tensor; what is returned lies in it."""
    expected = _true_bytes(source)[BIG]
    buffer = _buffers(len(expected))[kind]
    with open_set(made) as opened:
        array = next(p for k in range(2) if BIG in (p := opened.partition(k))).read_into(BIG, buffer)
    assert bytes(buffer.tobytes() if isinstance(buffer, np.ndarray) else buffer) == expected
    assert (array.dtype, array.shape) == (np.dtype(ml_dtypes.bfloat16), (5, MIB))
    array.view(np.uint8)[0, 0] ^= 0xFF
    assert bytes(buffer.tobytes() if isinstance(buffer, np.ndarray) else buffer)[0] == expected[0] ^ 0xFF


def test_read_into_scalars_and_empty_tensors(made: Path, source: Path) -> None:
    """Tensors without dimensions or without elements are read like any other."""
    expected = _true_bytes(source)
    with open_partition(made / "partition_0.json") as opened:
        scalar = np.zeros((), np.float64)
        assert opened.read_into("model.layers.0.scalar", scalar).shape == ()
        assert scalar.tobytes() == expected["model.layers.0.scalar"]
        assert opened.read_into("model.layers.0.empty", bytearray()).shape == (3, 0, 2)
        assert opened.read_into("model.layers.0.empty", np.zeros((3, 0, 2), np.float32)).shape == (3, 0, 2)


@pytest.mark.parametrize(
    ("buffer", "found"),
    [
        (bytearray(383), "383 bytes"),
        (bytearray(385), "385 bytes"),
        (bytes(384), "read-only"),
        (np.zeros((6, 16), np.float64)[:, ::2], "not in one piece"),
        (np.zeros((8, 6), np.float64).T, "not in one piece"),
        (memoryview(bytearray(768))[::2], "not in one piece"),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(made: Path, buffer: Any, found: str) -> None:
    """Wrong size, read-only or in pieces: the error says which, and what would do."""
    with open_set(made) as opened:
        partition = next(p for k in range(2) if "model.layers.1.f64.weight" in (p := opened.partition(k)))
        with pytest.raises(RequestError, match=f"expected 384 writable bytes in one piece.*{found}"):
            partition.read_into("model.layers.1.f64.weight", buffer)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_load_brings_what_reading_one_by_one_brings(made: Path, source: Path, threads: int) -> None:
    """Every tensor of a partition, empty and scalar ones too, with bytes, dtype, shape, in the mapping's order."""
    expected = _true_bytes(source)
    for part_id in range(2):
        with open_partition(made / f"partition_{part_id}.json", threads=threads) as partition:
            loaded = partition.load()
            assert list(loaded) == list(partition)
            for name, array in loaded.items():
                alone = partition[name]
                assert (array.dtype, array.shape) == (alone.dtype, alone.shape)
                assert array.flags.writeable == alone.flags.writeable
                assert array.tobytes() == expected[name], name


def test_load_of_a_set_has_all_partitions(made: Path, source: Path, tmp_path: Path) -> None:
    """Each tensor once; of a set that is not whole, what is here."""
    expected = _true_bytes(source)
    with open_set(made) as opened:
        assert {name: array.tobytes() for name, array in opened.load().items()} == expected
    part = Path(shutil.copytree(made, tmp_path / "part"))
    (part / "partition_1.bin").unlink()
    with open_set(part) as opened:
        assert set(opened.load()) == set(opened.partition(0))


def test_load_of_some_tensors(made: Path, source: Path) -> None:
    """In the order asked for, an alias under its own name; a name that is not here is a KeyError."""
    expected = _true_bytes(source)
    with open_partition(made / "partition_1.json") as partition:
        names = ["model.norm.weight", "lm_head.weight", BIG, "model.embed_tokens.weight"]
        loaded = partition.load(names)
        assert list(loaded) == names
        assert loaded[BIG].tobytes() == expected[BIG]
        assert loaded["lm_head.weight"].tobytes() == expected["model.embed_tokens.weight"]
        assert partition.load([]) == {}
        with pytest.raises(KeyError):
            partition.load(["nothing"])


def test_load_keeps_raw_tensors_as_views(raw: Path) -> None:
    """They are not copied, and outlive the partition."""
    with open_partition(raw / "partition_1.json") as partition:
        loaded, view = partition.load(), partition[BIG]
    assert loaded[BIG].ctypes.data == view.ctypes.data
    assert not loaded[BIG].flags.writeable
    assert loaded[BIG].tobytes() == view.tobytes()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", [BIG, "model.layers.1.f32.weight"])
def test_load_finds_a_flipped_byte(made: Path, tmp_path: Path, name: str, threads: int) -> None:
    """The error names tensor and offset, no thread is left, and without verification a view comes as it is."""
    damaged = Path(shutil.copytree(made, tmp_path / "damaged"))
    path, offset = _place(damaged, name)
    flip(path, offset + 60)
    with open_partition(path, threads=threads) as partition:
        with pytest.raises(IntegrityError) as raised:
            partition.load()
        assert (raised.value.path, raised.value.tensor, raised.value.offset) == (str(path), name, offset)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("mmsplit-")]
        others = [other for other in partition if other != name]
        assert list(partition.load(others)) == others
    if made.name == "raw":
        with open_partition(path, threads=threads, verify=False) as partition:
            assert partition.load().keys() == {name, *others}


def test_load_of_a_raw_payload_that_shrank_is_an_error(raw: Path) -> None:
    """Views are looked at before they are handed out: an error, where touching them would be a crash."""
    path, offset = _place(raw, BIG)
    with open_partition(path) as partition:
        with path.open("r+b") as file:
            file.truncate(offset)
        with pytest.raises(IntegrityError):
            partition.load()


def _place(root: Path, name: str) -> tuple[Path, int]:
    """Payload and stored offset of a tensor's first chunk."""
    for part_id in range(2):
        with open_partition_files(root / f"partition_{part_id}.json", "pread") as files:
            for tensor in files.tensors:
                if tensor.name == name:
                    return files.reader.path, int(files.index[tensor.first_chunk]["stored_offset"])
    raise AssertionError(name)


@pytest.mark.parametrize("name", [BIG, "model.layers.1.f32.weight"])
def test_a_flipped_byte_is_found_on_reading(made: Path, tmp_path: Path, name: str) -> None:
    """With verification the error names tensor and offset; other tensors are not affected."""
    damaged = Path(shutil.copytree(made, tmp_path / "damaged"))
    path, offset = _place(damaged, name)
    flip(path, offset + 60)
    with open_set(damaged) as opened:
        with pytest.raises(IntegrityError) as raised:
            opened[name]
        assert (raised.value.path, raised.value.tensor, raised.value.offset) == (str(path), name, offset)
        home = next(p for k in range(2) if name in (p := opened.partition(k)))
        with pytest.raises(IntegrityError):
            home.read_into(name, bytearray(home.entry(name).size_bytes))
        assert opened["model.layers.0.scalar"].shape == ()
        assert name in opened  # to ask for a name reads nothing


def test_a_raw_view_without_verification_reads_nothing(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With verify=False a view is an address and no more: no checksum is computed, damage comes through."""
    path, offset = _place(raw, BIG)
    flip(path, offset + 60)
    with open_set(raw, verify=False) as opened:
        assert BIG in opened  # opens the partitions
        monkeypatch.setattr("mmsplit.sidecar.chunk_loader.xxhash", None)
        assert opened[BIG].shape == (5, MIB)
        buffer = bytearray(10 * MIB)
        partition = opened.partition(1)
        partition.read_into(BIG, buffer)
        monkeypatch.undo()
        with pytest.raises(IntegrityError, match="bytes are not those that were split"):
            partition.read_into(BIG, buffer, verify=True)


def test_a_tied_weight_answers_to_its_alias(made: Path, source: Path) -> None:
    """The last partition has a copy of the embedding and knows it as the head does; iterating does not double it."""
    expected = _true_bytes(source)["model.embed_tokens.weight"]
    with open_set(made) as opened:
        assert "lm_head.weight" in opened
        assert opened["lm_head.weight"].tobytes() == expected
        assert "lm_head.weight" not in list(opened)
        last = opened.partition(1)
        assert last["lm_head.weight"].tobytes() == expected
        assert last.layer("lm_head").keys() == {"model.embed_tokens.weight"}


def test_a_tied_weight_is_read_from_the_copy_that_is_here(made: Path, source: Path, tmp_path: Path) -> None:
    """Also under its alias, while the partition that has the original is missing."""
    shutil.copytree(made, tmp_path / "set")
    for suffix in (".json", ".bin"):
        (tmp_path / "set" / f"partition_0{suffix}").unlink()
    with open_set(tmp_path / "set") as opened:
        assert opened["lm_head.weight"].tobytes() == _true_bytes(source)["model.embed_tokens.weight"]


def test_a_layer_that_is_only_referred_to(source: Path, tmp_path: Path) -> None:
    """In mode "reference" the error says where the weight is; in the partition that has it the layer can be read."""
    split(source, tmp_path / "set", 2, tied="reference")
    with open_partition(tmp_path / "set" / "partition_1.json") as partition:
        with pytest.raises(MissingPartitionError, match="its weight is in partition 0") as raised:
            partition.layer("lm_head")
        assert raised.value.tensor == "model.embed_tokens.weight"
        assert "lm_head" not in [layer.name for layer, _ in partition.iter_layers()]
    split(source, tmp_path / "one", 1, tied="reference")
    with open_partition(tmp_path / "one" / "partition_0.json") as partition:
        assert partition.layer("lm_head").keys() == {"model.embed_tokens.weight"}


def test_layers_have_what_the_original_system_had(made: Path, source: Path) -> None:
    """name, layer_type, shape and flat float32 parameters; a layer of several tensors is one flat array."""
    with open_set(made) as opened:
        for part_id in range(2):
            partition = opened.partition(part_id)
            assert partition.total_params == sum(layer.total_params for layer in partition.layers)
            for layer in partition.layers:
                if layer.layer_type == "block":  # has tensors of every dtype, some of which are no numbers
                    assert layer.shape == (sum(tensor.params for tensor in layer.tensors),)
                    with pytest.raises(RequestError, match="float32") as raised:
                        _ = layer.parameters
                    assert raised.value.tensor in {tensor.name for tensor in layer.tensors}
                    continue
                (tensor,) = layer.tensors
                assert (layer.shape, layer.total_params) == (tensor.shape, layer.parameters.size)
                assert layer.parameters.dtype == np.float32
                expected = partition[tensor.name].astype(np.float32).reshape(-1)
                assert np.array_equal(layer.parameters, expected, equal_nan=True)
        with pytest.raises(RequestError, match="float32"):
            opened.partition(0).exported()


def test_parameters_of_several_tensors_follow_each_other(tmp_path: Path) -> None:
    """In the order of `tensors`; a layer that only refers to another partition says where its weight is."""
    weights = [
        Weight("model.embed_tokens.weight", "F32", (4, 3), 0),
        Weight("model.layers.0.mlp.weight", "BF16", (2, 3), 0),
        Weight("model.layers.0.norm.bias", "I8", (5,), 0),
    ]
    root = write_checkpoint(tmp_path / "model", [weights], files={"config.json": CAUSAL_CONFIG})
    split(root, tmp_path / "set", 2, tied="reference", boundaries=["model.layers.0"])
    with open_partition(tmp_path / "set" / "partition_1.json") as partition:
        block, head = partition.layers
        arrays = partition.layer(block.name)
        flat = [float(value) for tensor in block.tensors for value in arrays[tensor.name].reshape(-1)]
        assert (block.shape, block.parameters.tolist()) == ((11,), flat)
        assert head.shape == (4, 3)
        with pytest.raises(MissingPartitionError, match="of partition 0"):
            _ = head.parameters
        assert [layer.name for layer in partition.exported().layers] == [tensor.name for tensor in block.tensors]


def test_layers_in_forward_order(made: Path) -> None:
    """Layer by layer is how a partition is meant to be used; names and totals are those of the plan."""
    with open_set(made) as opened:
        seen = []
        for part_id in range(opened.num_parts):
            partition = opened.partition(part_id)
            assert partition.part_id == part_id
            assert partition.num_parts == 2
            assert partition.model_id == "model"
            assert f"Partition {part_id} of 2" in repr(partition)
            for layer, tensors in partition.iter_layers():
                seen.append(layer.name)
                assert sum(array.nbytes for array in tensors.values()) == layer.total_bytes
            assert partition.total_bytes == sum(layer.total_bytes for layer in partition.layers)
            assert partition.total_params == sum(layer.total_params for layer in partition.layers)
    assert seen == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]


@pytest.mark.parametrize("of", ["set", "partition"])
def test_an_unknown_name_is_a_key_error(made: Path, of: str) -> None:
    """As in any mapping, where everything is there."""
    with open_set(made) as opened:
        mapping: Any = opened if of == "set" else opened.partition(0)
        assert "nothing" not in mapping
        assert 7 not in mapping
        assert mapping.get("nothing") is None
        with pytest.raises(KeyError):
            mapping["nothing"]
        with pytest.raises(KeyError):
            opened.partition(0).layer("nothing")


def test_a_set_with_a_partition_missing(made: Path, source: Path, tmp_path: Path) -> None:
    """What is here can be read; what is not here is said to be missing, not unknown."""
    part = Path(shutil.copytree(made, tmp_path / "part"))
    (part / "partition_1.bin").unlink()
    with open_set(part) as opened:
        assert (opened.missing, opened.num_parts) == ((1,), 2)
        assert opened["model.embed_tokens.weight"].tobytes() == _true_bytes(source)["model.embed_tokens.weight"]
        assert BIG not in opened
        with pytest.raises(MissingPartitionError, match="not here: 1"):
            opened[BIG]
        with pytest.raises(MissingPartitionError, match="partition 1 is not here"):
            opened.partition(1)
        with pytest.raises(RequestError, match=r"there is no partition 2.*expected 0 to 1"):
            opened.partition(2)


def test_a_partition_of_another_set_is_not_read(made: Path, source: Path, tmp_path: Path) -> None:
    """A set is held together by digests; a sound partition from elsewhere could hold other weights."""
    split(source, tmp_path / "other", 2, codec="zstd")
    mixed = Path(shutil.copytree(made, tmp_path / "mixed"))
    for name in ("partition_1.json", "partition_1.bin"):
        shutil.copyfile(tmp_path / "other" / name, mixed / name)
    with open_set(mixed) as opened, pytest.raises(IntegrityError, match="not the one the set was made with"):
        opened.partition(1)


def test_a_directory_is_no_partition(made: Path) -> None:
    """The error says what to give instead."""
    with pytest.raises(RequestError, match="name one partition of it, or use open_set"):
        open_partition(made)


def test_several_threads_read_at_once(made: Path, source: Path) -> None:
    """One set, one partition, many threads, encoded tensors and views: everyone gets the true bytes."""
    expected = _true_bytes(source)
    wrong: list[str] = []
    start = threading.Barrier(6)

    def read(opened: mmsplit.PartitionSet) -> None:
        start.wait()
        for name in (BIG, *expected):
            if opened[name].tobytes() != expected[name]:
                wrong.append(name)

    with open_set(made, threads=2) as opened:
        threads = [threading.Thread(target=read, args=(opened,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_payload_that_shrank_is_an_error(made: Path, tmp_path: Path) -> None:
    """A chunk that lies beyond the end of a payload that was truncated meanwhile is damage, not a crash."""
    if made.name == "raw":
        pytest.skip("a view of a map that shrinks is the caller's own risk, as with every loader")
    part = Path(shutil.copytree(made, tmp_path / "part"))
    path, offset = _place(part, BIG)
    with open_partition(path) as partition:
        with path.open("r+b") as file:
            file.truncate(offset)
        with pytest.raises(IntegrityError):
            partition[BIG]
