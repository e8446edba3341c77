"""Against the real thing: what torch.save wrote and torch.load reads, mmsplit splits, reads and merges the same.

`scripts/test --torch`, and so the gate, installs PyTorch and fails without it; elsewhere these tests are left out where
there is none.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mmsplit
from mmsplit.errors import PlanError

if os.environ.get("MMSPLIT_TEST_TORCH"):
    import torch
else:
    torch = pytest.importorskip("torch", reason="needs PyTorch: scripts/test --torch")

from torch import nn

FORMS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}
MODES = ("duplicate", "reference", "colocate")
#: what the legacy form can load again, and what is newer
DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
)
NEW_DTYPES = (
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
)


def random_bits(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bits at all, NaNs with payloads among them; of bool only those that are one."""
    size = count * torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    """Bytes of the elements in row-major order."""
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def require_the_same(root: Path, num_parts: int, **options: Any) -> None:
    """Every name is bit for bit what torch.load gives, in each partition set and after a merge."""
    source = root / "source"
    expected: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.bin")):
        expected |= torch.load(path, weights_only=True)
    opened = mmsplit.open_checkpoint(source)
    assert {*opened.views, *(name for name, info in opened.tensors.items() if not info.hidden)} == set(expected)
    try:
        result = mmsplit.split(opened, root / "set", num_parts, **options)
    except PlanError:
        assert num_parts > 1  # more than there are layers
        result = mmsplit.split(opened, root / "set", 1, **options)
    assert mmsplit.verify(root / "set", level="full", against=source).ok
    with mmsplit.open_set(root / "set") as partitions:
        for name, tensor in expected.items():
            array = partitions[name]
            assert array.shape == tuple(tensor.shape), name
            assert np.ascontiguousarray(array).tobytes() == bits(tensor), name
        if result.plan.tied != "reference":
            loaded = partitions.load()
            assert {
                name: np.ascontiguousarray(array).tobytes() for name, array in loaded.items() if name in expected
            } == {name: bits(tensor) for name, tensor in expected.items()}
    mmsplit.merge(root / "set", root / "merged")
    for path in source.iterdir():
        assert (root / "merged" / path.name).read_bytes() == path.read_bytes()


def save(root: Path, state: Mapping[str, object], form: str, **files: bytes) -> None:
    (root / "source").mkdir()
    torch.save(state, root / "source" / "pytorch_model.bin", **FORMS[form])
    for name, data in files.items():
        (root / "source" / name).write_bytes(data)


@pytest.mark.parametrize("form", FORMS)
def test_every_dtype(tmp_path: Path, form: str) -> None:
    dtypes = DTYPES if form == "legacy" else (*DTYPES, *NEW_DTYPES)
    save(tmp_path, {f"{dtype}"[6:]: random_bits(15, dtype).view(3, 5) for dtype in dtypes}, form)
    require_the_same(tmp_path, 2)


@st.composite
def _views(draw: st.DrawFn, storage: torch.Tensor) -> torch.Tensor:
    """A tensor that sees a flat storage, whole or in part, in any order."""
    start = draw(st.integers(0, len(storage) - 1))
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(1, 5))
    step = draw(st.integers(1, 3))
    part = storage[start::step]
    whole = (len(part) // columns) * columns
    match draw(st.sampled_from(["whole", "part", "scalar", "matrix", "transposed", "expanded", "strided", "empty"])):
        case "whole":
            return storage
        case "scalar":
            return storage[start]
        case "matrix":
            return part[:whole].unflatten(0, (-1, columns)) if whole else part
        case "transposed":
            return part[:whole].unflatten(0, (-1, columns)).t() if whole else part
        case "expanded":
            return part.unsqueeze(0).expand(rows, -1)
        case "strided":
            reach = min(rows, len(part))
            return part.as_strided((reach, min(columns, len(part) - reach)), (1, 1)) if reach < len(part) else part
        case "empty":
            return storage[start:start]
    return part


@st.composite
def _states(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> dict[str, torch.Tensor]:
    stems = ["embed_tokens", "lm_head", "norm", "odd", *(f"layers.{k}.{m}" for k in range(3) for m in ("up", "down"))]
    storages = [
        random_bits(draw(st.integers(1, 60)), draw(st.sampled_from(dtypes)), seed)
        for seed in range(draw(st.integers(1, 5)))
    ]
    if draw(st.booleans()):
        storages.append(storages[0].clone())  # the same bytes in a storage of their own
    names = draw(st.lists(st.sampled_from(stems), min_size=1, max_size=10, unique=True))
    return {f"{name}.weight": draw(_views(draw(st.sampled_from(storages)))) for name in names}


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_state_dict(data: st.DataObject) -> None:
    """Slices, steps, transposes, expanded and overlapping tensors, shared storages and equal ones."""
    form = data.draw(st.sampled_from(sorted(FORMS)))
    state = data.draw(_states(DTYPES if form == "legacy" else (*DTYPES, *NEW_DTYPES)))
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), state, form)
        require_the_same(Path(folder), data.draw(st.integers(1, 3)), tied=data.draw(st.sampled_from(MODES)))


class _Attention(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.register_buffer("bias", torch.tril(torch.ones(context, context, dtype=torch.uint8))[None, None])
        self.register_buffer("masked_bias", torch.tensor(-1e4))


class _Block(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = _Attention(width, context)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})


class GPT2(nn.Module):
    """As DialoGPT is saved: mask buffers in each block, and a head that is the embedding once more."""

    def __init__(self, *, layers: int, width: int, vocabulary: int, context: int) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(context, width),
                "h": nn.ModuleList(_Block(width, context) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)


GPT2_CONFIG = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 3}


@pytest.mark.parametrize("head", ["a tensor of its own", "a storage of its own", "the same bytes"])
@pytest.mark.parametrize("tied", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_a_small_dialogpt(tmp_path: Path, form: str, tied: str, head: str) -> None:
    """Whichever way its head is tied, it is stored once."""
    torch.manual_seed(0)
    model = GPT2(layers=3, width=16, vocabulary=101, context=32)
    if head != "a tensor of its own":
        model.lm_head.weight = model.transformer["wte"].weight
    state = model.state_dict()
    if head == "the same bytes":
        state["lm_head.weight"] = state["lm_head.weight"].clone()
    save(tmp_path, state, form, **{"config.json": json.dumps(GPT2_CONFIG).encode()})
    require_the_same(tmp_path, 3, tied=tied)
    with mmsplit.open_set(tmp_path / "set") as partitions:
        own = {tensor.name for k in range(3) for layer in partitions.partition(k).layers for tensor in layer.tensors}
    assert ("lm_head.weight" in own) == (head == "a tensor of its own")


@pytest.mark.parametrize("form", FORMS)
def test_several_files_and_their_index(tmp_path: Path, form: str) -> None:
    """With a head in another file than the embedding whose bytes it has."""
    embedding = random_bits(24, torch.bfloat16).view(6, 4)
    blocks = {f"model.layers.{k}.up.weight": random_bits(40, torch.float32, k).view(5, 8).t() for k in range(4)}
    states = [
        {"model.embed_tokens.weight": embedding, **dict(list(blocks.items())[:2])},
        {**dict(list(blocks.items())[2:]), "lm_head.weight": embedding.clone()},
    ]
    (tmp_path / "source").mkdir()
    weight_map = {}
    for number, state in enumerate(states):
        name = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save(state, tmp_path / "source" / name, **FORMS[form])
        weight_map |= dict.fromkeys(state, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (tmp_path / "source" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    require_the_same(tmp_path, 2)
