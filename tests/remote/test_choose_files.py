"""Which files of a repository are downloaded: one set of weights and what makes it usable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

from mmsplit.errors import CheckpointError, MissingShardError, RequestError
from mmsplit.remote.choose_files import choose_files, matches
from mmsplit.remote.hub_storage import HubStorage
from mmsplit.remote.repository import open_repository

INDEX = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
BIN_INDEX = INDEX.replace(b"model-", b"pytorch_model-").replace(b".safetensors", b".bin")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
#: name of a repository -> its files, and those that are chosen
REPOSITORIES: dict[str, tuple[dict[str, bytes], set[str]]] = {
    "shards": (
        {
            **dict.fromkeys(SHARDS, b"x"),
            "model.safetensors.index.json": INDEX,
            **dict.fromkeys(("config.json", "tokenizer.model", "README.md", "code/modeling.py"), b"x"),
            **dict.fromkeys(("pytorch_model-00001-of-00001.bin", "tf_model.h5", "flax_model.msgpack"), b"x"),
            **dict.fromkeys(
                ("onnx/model.onnx", "onnx/model.onnx_data", "model-Q4.gguf", "x.ot", "original/a.pth"), b"x"
            ),
            **dict.fromkeys(
                ("figures/loss.png", "demo.mp4", "paper.pdf", ".gitattributes", "fp8/model.safetensors"), b"x"
            ),
        },
        {*SHARDS, "model.safetensors.index.json", "config.json", "tokenizer.model", "README.md", "code/modeling.py"},
    ),
    "one": ({"model.safetensors": b"x", "consolidated.safetensors": b"x", "a.bin": b"x"}, {"model.safetensors"}),
    "bin": (
        {
            **dict.fromkeys(("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"), b"x"),
            "pytorch_model.bin.index.json": INDEX.replace(b"model-", b"pytorch_model-").replace(
                b".safetensors", b".bin"
            ),
            **dict.fromkeys(("config.json", "tf_model.h5", "optimizer.bin"), b"x"),
        },
        {
            *("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
            *("pytorch_model.bin.index.json", "config.json"),
        },
    ),
    "other-bin": ({"weights.bin": b"x", "more.bin": b"x", "a.h5": b"x"}, {"weights.bin", "more.bin"}),
    "pth": ({"consolidated.00.pth": b"x", "consolidated.01.pth": b"x", "params.json": b"x"},) * 2,  # type: ignore[dict-item]
}


@pytest.fixture
def zoo(tmp_path: Path) -> Iterator[LoopbackHub]:
    """All of them, and some without weights to choose."""
    others = {
        "gguf": {"m-Q4.gguf": b"x", "m-Q8.gguf": b"x"},
        "folders": {"unet/model.safetensors": b"x", "config.json": b"x"},
        "nothing": {"README.md": b"x"},
        "torn": {SHARDS[0]: b"x", "model.safetensors.index.json": INDEX},
    }
    for name, files in {**{name: files for name, (files, _) in REPOSITORIES.items()}, **others}.items():
        for relative, data in files.items():
            path = tmp_path / "hub" / "zoo" / name / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    with LoopbackHub(tmp_path / "hub") as hub:
        yield hub


def chosen(hub: LoopbackHub, name: str, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> set[str]:
    repository = open_repository(f"zoo/{name}", endpoint=hub.endpoint)
    files = choose_files(HubStorage(repository), [file.name for file in repository.files], include, exclude)
    assert len(set(files.names)) == len(files.names)
    return set(files.names)


@pytest.mark.parametrize("name", REPOSITORIES)
def test_one_set_of_weights_is_chosen_and_what_belongs_to_it(zoo: LoopbackHub, name: str) -> None:
    """Safetensors before others; no other framework's copy, no media, no hidden files."""
    assert chosen(zoo, name) == set(REPOSITORIES[name][1])


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (("*.gguf",), (), {"model-Q4.gguf"}),
        (("onnx/",), (), {"onnx/model.onnx", "onnx/model.onnx_data"}),
        (("onnx\\*",), ("*_data",), {"onnx/model.onnx"}),
        (("*.json", "*.md"), (), {"config.json", "model.safetensors.index.json", "README.md"}),
        (
            (),
            ("*.safetensors", "code/*"),
            {"model.safetensors.index.json", "config.json", "tokenizer.model", "README.md"},
        ),
        ((".git*",), (), {".gitattributes"}),
    ],
)
def test_patterns_choose_otherwise(
    zoo: LoopbackHub, include: tuple[str, ...], exclude: tuple[str, ...], expected: set[str]
) -> None:
    """--include replaces the choice, --exclude takes away from it."""
    assert chosen(zoo, "shards", include, exclude) == expected


def test_patterns_are_those_of_huggingface_hub() -> None:
    """Compared with its own filter."""
    from huggingface_hub.utils import filter_repo_objects

    names = ["a.json", "A.JSON", "x/a.json", "x/y/b.bin", "x[1].json", "onnx/model.onnx"]
    for pattern in ("*.json", "x/", "x/*", "*", "?.json", "x[1].json", "[!a]*", "onnx", "ONNX/*", "x\\*"):
        ours = [name for name in names if matches(name, [pattern])]
        assert ours == list(filter_repo_objects(names, allow_patterns=[pattern])), pattern


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("gguf", CheckpointError, "m-Q4.gguf, m-Q8.gguf"),
        ("folders", CheckpointError, "unet/model.safetensors"),
        ("nothing", CheckpointError, "no weights at all"),
        ("torn", MissingShardError, SHARDS[1]),
    ],
)
def test_a_repository_without_weights_to_choose_says_what_it_has(
    zoo: LoopbackHub, name: str, kind: type[CheckpointError], words: str
) -> None:
    """And that --include does choose."""
    with pytest.raises(kind) as caught:
        chosen(zoo, name)
    assert words in str(caught.value)
    assert kind is MissingShardError or "--include" in str(caught.value)


def test_no_file_at_all_is_a_request_that_cannot_be_meant(zoo: LoopbackHub) -> None:
    """The message shows the patterns and what there is."""
    with pytest.raises(RequestError, match=r"--include \*\.txt.*README\.md"):
        chosen(zoo, "nothing", ("*.txt",))
