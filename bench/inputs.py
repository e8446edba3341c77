"""The checkpoints that are measured, made once and used by all sides.

    llama        the tensors of Llama-3.2-1B, 2.47 GB of BF16 noise that compresses as trained weights do
    repeated     the same tensors ten times over, as ten shards of one model of 160 layers: 25 GB
    deepseek_v3  the headers of DeepSeek-V3, 163 shards and 91,991 tensors, in sparse files that take a few megabytes

Sparse files have their true size, and zeros where the weights would be.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

LLAMA_BYTES: Final = 2_471_645_608
LLAMA_SMALL_BYTES: Final = 260_000_000
LLAMA_LAYERS: Final = 16
REPEATS: Final = 10
DEEPSEEK_TENSORS: Final = 91_991
DEEPSEEK_SHARDS: Final = 163
DEEPSEEK_BYTES: Final = 688_574_839_360

_ITEM_BYTES: Final = {"F32": 4, "BF16": 2, "F8_E4M3": 1}


class Tensor(NamedTuple):
    """A tensor of a checkpoint that is made here."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def llama(inputs: Path, *, small: bool) -> Path:
    """Return the directory of the Llama-3.2-1B replica; makes it if it is not there in full."""
    from mmsplit.synthetic import write_synthetic_checkpoint

    directory = inputs / ("llama-small" if small else "llama")
    if not _marker(directory).exists():
        print(f"making {directory.name} …", flush=True)
        shutil.rmtree(directory, ignore_errors=True)
        write_synthetic_checkpoint(directory, full=not small)
        _marker(directory).touch()
    return directory


def _marker(directory: Path) -> Path:
    """Return the file that says that a checkpoint is complete; it lies beside it, not in it."""
    return directory.with_name(f"{directory.name}.complete")


def llama_bytes(*, small: bool) -> int:
    """Return about how many bytes `llama` takes on the disk."""
    return LLAMA_SMALL_BYTES if small else LLAMA_BYTES


def shard_of(checkpoint: Path) -> Path:
    """Return the only shard of a checkpoint."""
    return checkpoint / "model.safetensors"


def repeated(inputs: Path, original: Path, *, real: bool) -> Path:
    """Return a checkpoint that holds the layers of `original` ten times, one shard each time.

    With `real`, every shard has the bytes of the original, else zeros in a sparse file.
    """
    directory = inputs / f"{original.name}-repeated"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    config = json.loads((original / "config.json").read_text())
    config["num_hidden_layers"] = LLAMA_LAYERS * REPEATS
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    header, body_start = _read_header(shard_of(original))
    shards: dict[str, Sequence[str]] = {}
    for repeat in range(REPEATS):
        renamed = {_renamed(name, repeat): entry for name, entry in header.items() if name != "__metadata__"}
        shard = _shard_name(repeat, REPEATS)
        shards[shard] = list(renamed)
        size = shard_of(original).stat().st_size - body_start
        with (directory / shard).open("wb") as file:
            start = _write_header(file, renamed)
            if real:
                with shard_of(original).open("rb") as body:
                    body.seek(body_start)
                    shutil.copyfileobj(body, file, 8 << 20)
            else:
                file.truncate(start + size)
    _write_index(directory, shards)
    return directory


def _renamed(name: str, repeat: int) -> str:
    """Move a layer's number on; what is no layer keeps its name the first time, and is a block's extra later."""
    found = re.match(r"(model\.layers\.)(\d+)(\..*)", name)
    if found:
        return f"{found[1]}{int(found[2]) + LLAMA_LAYERS * repeat}{found[3]}"
    return name if repeat == 0 else f"model.layers.{LLAMA_LAYERS * repeat}.extra.{name}"


def deepseek_v3(inputs: Path) -> Path:
    """Return the sparse replica of DeepSeek-V3: names, shapes and dtypes follow from its published config."""
    directory = inputs / "deepseek-v3"
    if _marker(directory).exists():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(_DEEPSEEK_CONFIG, indent=2) + "\n")
    groups = list(_shards(deepseek_tensors(), _DEEPSEEK_SHARD_BYTES))
    shards: dict[str, Sequence[str]] = {}
    for number, tensors in enumerate(groups):
        shard = _shard_name(number, len(groups))
        shards[shard] = [tensor.name for tensor in tensors]
        _write_sparse(directory / shard, tensors)
    _write_index(directory, shards)
    _marker(directory).touch()
    return directory


def deepseek_tensors() -> Iterator[Tensor]:
    """Yield every tensor in the order of the published shards: embedding, layers 0 to 60, MTP layer 61, norm, head."""
    config = _DEEPSEEK_CONFIG
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield Tensor("model.embed_tokens.weight", "BF16", (vocabulary, hidden))
    last = config["num_hidden_layers"]
    for layer in range(last + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}"
        if layer == last:
            yield Tensor(f"{prefix}.embed_tokens.weight", "BF16", (vocabulary, hidden))
            yield Tensor(f"{prefix}.enorm.weight", "BF16", (hidden,))
            yield Tensor(f"{prefix}.hnorm.weight", "BF16", (hidden,))
            yield Tensor(f"{prefix}.eh_proj.weight", "BF16", (hidden, 2 * hidden))
        yield from _deepseek_attention(prefix)
        yield from _deepseek_mlp(prefix, dense=layer < config["first_k_dense_replace"])
        if layer == last:
            yield Tensor(f"{prefix}.shared_head.norm.weight", "BF16", (hidden,))
            yield Tensor(f"{prefix}.shared_head.head.weight", "BF16", (vocabulary, hidden))
    yield Tensor("model.norm.weight", "BF16", (hidden,))
    yield Tensor("lm_head.weight", "BF16", (vocabulary, hidden))


def _deepseek_attention(prefix: str) -> Iterator[Tensor]:
    config = _DEEPSEEK_CONFIG
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query_rank, key_value_rank = config["q_lora_rank"], config["kv_lora_rank"]
    rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    attention = f"{prefix}.self_attn"
    yield Tensor(f"{prefix}.input_layernorm.weight", "BF16", (hidden,))
    yield from _quantised(f"{attention}.q_a_proj", query_rank, hidden)
    yield Tensor(f"{attention}.q_a_layernorm.weight", "BF16", (query_rank,))
    yield from _quantised(f"{attention}.q_b_proj", heads * (nope + rope), query_rank)
    yield from _quantised(f"{attention}.kv_a_proj_with_mqa", key_value_rank + rope, hidden)
    yield Tensor(f"{attention}.kv_a_layernorm.weight", "BF16", (key_value_rank,))
    yield from _quantised(f"{attention}.kv_b_proj", heads * (nope + value), key_value_rank)
    yield from _quantised(f"{attention}.o_proj", hidden, heads * value)
    yield Tensor(f"{prefix}.post_attention_layernorm.weight", "BF16", (hidden,))


def _deepseek_mlp(prefix: str, *, dense: bool) -> Iterator[Tensor]:
    config = _DEEPSEEK_CONFIG
    hidden, expert = config["hidden_size"], config["moe_intermediate_size"]
    if dense:
        yield from _gated(f"{prefix}.mlp", config["intermediate_size"], hidden)
        return
    experts = config["n_routed_experts"]
    yield Tensor(f"{prefix}.mlp.gate.weight", "BF16", (experts, hidden))
    yield Tensor(f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (experts,))
    yield from _gated(f"{prefix}.mlp.shared_experts", expert * config["n_shared_experts"], hidden)
    for number in range(experts):
        yield from _gated(f"{prefix}.mlp.experts.{number}", expert, hidden)


def _gated(prefix: str, intermediate: int, hidden: int) -> Iterator[Tensor]:
    yield from _quantised(f"{prefix}.gate_proj", intermediate, hidden)
    yield from _quantised(f"{prefix}.up_proj", intermediate, hidden)
    yield from _quantised(f"{prefix}.down_proj", hidden, intermediate)


def _quantised(name: str, rows: int, columns: int) -> Iterator[Tensor]:
    """An FP8 matrix and the scales of its blocks of 128 x 128."""
    yield Tensor(f"{name}.weight", "F8_E4M3", (rows, columns))
    yield Tensor(f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128)))


def _shards(tensors: Iterable[Tensor], limit_bytes: int) -> Iterator[list[Tensor]]:
    """Fill shards in order, each up to the limit."""
    shard: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.size_bytes > limit_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.size_bytes
    yield shard


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:06d}.safetensors"


def _write_sparse(path: Path, tensors: Iterable[Tensor]) -> None:
    header: dict[str, object] = {}
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: (-_ITEM_BYTES[tensor.dtype], tensor.name)):
        stop = position + tensor.size_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, stop]}
        position = stop
    with path.open("wb") as file:
        start = _write_header(file, header)
        file.truncate(start + position)


def _write_header(file: BinaryIO, header: dict[str, object]) -> int:
    """Write a safetensors header; return where the data begin."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    file.flush()
    return 8 + len(text)


def _read_header(shard: Path) -> tuple[dict[str, object], int]:
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _write_index(directory: Path, shards: dict[str, Sequence[str]]) -> None:
    total = 0
    for shard in shards:
        _, start = _read_header(directory / shard)
        total += (directory / shard).stat().st_size - start
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")


#: With this limit, filling shards in order gives the published 163 files.
_DEEPSEEK_SHARD_BYTES: Final = 4_243_538_144

#: The fields of deepseek-ai/DeepSeek-V3's config.json that names and shapes follow from.
_DEEPSEEK_CONFIG: Final[dict[str, Any]] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
