"""The synthetic checkpoint is what it says: Llama's tensors, the same bytes each time, weights like trained ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import mmsplit
from mmsplit import synthetic


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small variant."""
    directory = tmp_path_factory.mktemp("synthetic")
    assert synthetic.write_synthetic_checkpoint(directory) == 253_002_752
    return directory


def test_full_has_the_published_tensors() -> None:
    """The full variant has the 146 tensors and 2,471,628,800 bytes of meta-llama/Llama-3.2-1B."""
    tensors = dict(synthetic._tensors(synthetic._FULL))
    assert len(tensors) == 146
    sizes = {name: shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in tensors.items()}
    assert 2 * sum(sizes.values()) == 2_471_628_800
    assert tensors["model.embed_tokens.weight"] == [128_256, 2048]
    assert tensors["model.layers.15.self_attn.k_proj.weight"] == [512, 2048]


def test_small_is_a_whole_checkpoint_with_a_tied_head(small: Path) -> None:
    """It opens without notes, and its head is found to be tied."""
    checkpoint = mmsplit.open_checkpoint(small)
    assert len(checkpoint.tensors) == 146
    plan = mmsplit.plan(checkpoint, 2)
    assert [layer.alias for layer in plan.partitions[1].layers if layer.alias] == ["lm_head.weight"]


def test_the_same_seed_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    """Two runs write one and the same file."""
    synthetic.write_synthetic_checkpoint(tmp_path)

    def digest(directory: Path) -> str:
        return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()

    assert digest(tmp_path) == digest(small)


def test_weights_compress_like_trained_ones(small: Path, tmp_path: Path) -> None:
    """The codec stores them in about two thirds, as it does trained BF16 weights."""
    result = mmsplit.split(small, tmp_path / "set", 2)
    assert 0.655 < result.manifest.stored_bytes / result.manifest.total_bytes < 0.67
