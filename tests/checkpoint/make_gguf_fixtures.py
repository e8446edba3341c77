"""Write the files in gguf_fixtures/, with the real gguf package, and what its reader makes of them into expected.json.

And the names that the package knows for the tensors of some architectures into ../layers/data/gguf_names.json.

    python make_gguf_fixtures.py

needs gguf and numpy, which mmsplit does not.  The bytes are the same each time; expected.json names the version.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    MODEL_TENSORS,
    TENSOR_NAMES,
    GGMLQuantizationType,
    GGUFEndian,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    quantize,
)
from gguf.gguf_reader import ReaderField

HERE = Path(__file__).parent / "gguf_fixtures"
NAMES = Path(__file__).parent.parent / "layers" / "data" / "gguf_names.json"
RANDOM = np.random.default_rng(7)
Q8_0, Q4_0, Q5_1 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q5_1
ARCHITECTURES = (
    *(
        "llama",
        "llama4",
        "qwen2",
        "qwen3moe",
        "qwen3next",
        "deepseek2",
        "glm-dsa",
        "gemma2",
        "gemma3",
        "gemma3n",
        "phi2",
    ),
    *("phi3", "gpt2", "gpt-oss", "falcon", "falcon-h1", "mamba", "mamba2", "jamba", "kimi-linear", "rwkv7", "lfm2"),
    *("t5", "t5encoder", "bert", "wavtokenizer-dec", "clip"),
)
#: numpy has these itself; all others are written as raw bytes.
NUMPY_TYPES = {"F32", "F16", "F64", "I8", "I16", "I32", "I64"}


def values(*shape: int) -> np.ndarray[Any, Any]:
    return RANDOM.standard_normal(shape).astype(np.float32)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_writer(name: str, architecture: str, **options: Any) -> GGUFWriter:
    return GGUFWriter(HERE / name, architecture, **options)


def add_quantised(writer: GGUFWriter, name: str, kind: GGMLQuantizationType, *shape: int) -> None:
    writer.add_tensor(name, quantize(values(*shape), kind), raw_dtype=kind)


def add_llama(writer: GGUFWriter, blocks: int, *, head: bool) -> None:
    """A Llama of width 32, with 2 heads of which 1 is for keys and values; matrices in Q8_0."""
    writer.add_block_count(blocks)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"tok{i}" for i in range(48)])
    writer.add_token_scores([float(-i) for i in range(48)])
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    add_quantised(writer, "token_embd.weight", Q8_0, 48, 32)
    writer.add_tensor("output_norm.weight", values(32))
    if head:
        add_quantised(writer, "output.weight", Q5_1, 48, 32)
    for i in range(blocks):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", values(32))
        for part, rows, columns in (
            ("attn_q", 32, 32),
            ("attn_k", 16, 32),
            ("attn_v", 16, 32),
            ("attn_output", 32, 32),
            ("ffn_gate", 64, 32),
            ("ffn_up", 64, 32),
            ("ffn_down", 32, 64),
        ):
            add_quantised(writer, f"blk.{i}.{part}.weight", Q8_0, rows, columns)
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", values(32))


def write_llama() -> None:
    writer = open_writer("llama_tied.gguf", "llama")
    add_llama(writer, 2, head=False)
    finish(writer)


def write_split() -> None:
    """The first of the files has no tensors, as the package writes it where asked to."""
    writer = open_writer("split.gguf", "llama", split_max_tensors=5, small_first_shard=True)
    add_llama(writer, 1, head=True)
    finish(writer)


def write_types() -> None:
    writer = open_writer("types.gguf", "llama")
    for kind in GGMLQuantizationType:
        elements, size = GGML_QUANT_SIZES[kind]
        raw = RANDOM.integers(0, 256, (3, 2 * size), dtype=np.uint8)
        if kind.name in NUMPY_TYPES:
            numpy_name = {"F": "float", "I": "int"}[kind.name[0]] + kind.name[1:]
            writer.add_tensor(f"t.{kind.name}", raw.view(numpy_name).reshape(3, 2))
        else:
            writer.add_tensor(f"t.{kind.name}", raw, raw_dtype=kind)
        assert elements >= 1
    finish(writer)


def write_shapes() -> None:
    writer = open_writer("shapes.gguf", "qwen3moe")
    writer.add_custom_alignment(64)
    writer.add_tensor("one", values(1))
    writer.add_tensor("vector", values(5))
    writer.add_tensor("matrix", values(3, 5))
    writer.add_tensor("four", values(2, 3, 4, 5).astype(np.float16))
    add_quantised(writer, "blk.0.ffn_gate_exps.weight", Q4_0, 4, 3, 32)
    writer.add_tensor("last", values(3))
    finish(writer)


def write_metadata() -> None:
    writer = open_writer("metadata.gguf", "test")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", -0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "grüße, 世界")
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, -0.25])
    writer.add_array("flags", [True, False, True])
    writer.add_array("texts", ["a", "", "ccc"])
    writer.add_key_value("bytes", b"\x00\x01\xff", GGUFValueType.ARRAY, GGUFValueType.UINT8)
    writer.add_array("nested", [["a", "bc"], ["d"]])
    writer.add_tensor("only", values(4))
    finish(writer)


def write_others() -> None:
    writer = open_writer("vocabulary_only.gguf", "llama")
    writer.add_token_list(["a", "b"])
    finish(writer)
    writer = open_writer("mmproj.gguf", "clip")
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_block_count(1)
    writer.add_tensor("mm.0.weight", values(4, 4))
    writer.add_tensor("v.blk.0.attn_q.weight", values(4, 4))
    writer.add_tensor("v.class_embd", values(4))
    finish(writer)
    writer = open_writer("big_endian.gguf", "llama", endianess=GGUFEndian.BIG)
    writer.add_tensor("only", values(4))
    finish(writer)


def content(field: ReaderField) -> Any:
    value = field.contents()
    return value.tolist() if isinstance(value, np.ndarray) else value


def describe(path: Path) -> dict[str, Any]:
    reader = GGUFReader(path)
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    return {
        "version": int(reader.fields["GGUF.version"].parts[0][0]),
        "alignment": int(reader.alignment),
        "metadata": {key: content(reader.fields[key]) for key in keys},
        "tensors": {
            tensor.name: {
                "type": tensor.tensor_type.name,
                "shape": [int(size) for size in reversed(tensor.shape)],
                "offset": int(tensor.data_offset),
                "bytes": int(tensor.n_bytes),
                "sha256": hashlib.sha256(tensor.data.tobytes()).hexdigest(),
            }
            for tensor in reader.tensors
        },
    }


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for old in HERE.glob("*.gguf"):
        old.unlink()
    write_llama()
    write_split()
    write_types()
    write_shapes()
    write_metadata()
    write_others()
    files = {path.name: describe(path) for path in sorted(HERE.glob("*.gguf")) if path.name != "big_endian.gguf"}
    sizes = {kind.name: list(GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    numbers = {kind.name: int(kind) for kind in GGMLQuantizationType}
    lines = [f' "gguf": {json.dumps(importlib.metadata.version("gguf"))}']
    lines += [f' "sizes": {json.dumps(sizes)}', f' "numbers": {json.dumps(numbers)}']
    described = ",\n".join(describe_lines(name, file) for name, file in files.items())
    lines += [f' "files": {{\n{described}\n }}']
    listed = ",\n".join(f" {json.dumps(name)}: {json.dumps(names)}" for name, names in names_of_architectures().items())
    NAMES.write_text(f"{{\n{listed}\n}}\n")
    (HERE / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def names_of_architectures() -> dict[str, list[str]]:
    """Names without their ".weight"; "{bid}" stands for the number of the block."""
    named = {
        MODEL_ARCH_NAMES[kind]: [TENSOR_NAMES[tensor] for tensor in found] for kind, found in MODEL_TENSORS.items()
    }
    return {name: sorted(set(named[name])) for name in ARCHITECTURES}


def describe_lines(name: str, file: dict[str, Any]) -> str:
    """JSON of a file's description, a line for each tensor."""
    head = {key: value for key, value in file.items() if key != "tensors"}
    tensors = [f"    {json.dumps(tensor)}: {json.dumps(values)}" for tensor, values in file["tensors"].items()]
    between = ",\n"
    return f'  {json.dumps(name)}: {json.dumps(head)[:-1]}, "tensors": {{\n{between.join(tensors)}\n  }}}}'


if __name__ == "__main__":
    main()
