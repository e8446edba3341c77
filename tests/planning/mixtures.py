"""Checkpoints from names and shapes alone, and what the tests of cuts ask of a plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from mmsplit.checkpoint import Checkpoint, open_checkpoint
from mmsplit.dtypes import DTYPES
from mmsplit.planning import Plan, iter_stored

Shapes = Mapping[str, tuple[int, ...]]
MakeShaped = Callable[..., Checkpoint]


def open_shapes(directory: Path, shapes: Shapes, config: object = None, dtype: str = "BF16") -> Checkpoint:
    """Write a checkpoint of one shard without any weight, name -> shape, and a config.json; open it."""
    header, position = {}, 0
    for name, shape in shapes.items():
        size = DTYPES[dtype].bits
        for count in shape:
            size *= count
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size // 8]}
        position += size // 8
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return open_checkpoint(directory)


def moe(experts: int = 4, layers: int = 2, *, head: bool = False) -> dict[str, tuple[int, ...]]:
    """A mixture with a tensor per expert, a router and a shared expert."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,)}
    for k in range(layers):
        at = f"model.layers.{k}"
        shapes |= {f"{at}.input_layernorm.weight": (8,), f"{at}.self_attn.q_proj.weight": (8, 8)}
        shapes |= {f"{at}.mlp.gate.weight": (experts, 8), f"{at}.mlp.shared_expert.up_proj.weight": (4, 8)}
        shapes |= {f"{at}.mlp.experts.{e}.up_proj.weight": (4, 8) for e in range(experts)}
    if head:
        shapes["lm_head.weight"] = (16, 8)
    return shapes


CAUSAL = {"architectures": ["MoeForCausalLM"]}


def held(plan: Plan) -> list[set[str]]:
    """Names of the tensors that each partition stores."""
    return [{tensor.name for _, tensor in iter_stored(part)} for part in plan.partitions]


def layers_of(plan: Plan, part_id: int) -> list[tuple[str, str]]:
    return [(layer.name, layer.layer_type) for layer in plan.partitions[part_id].layers]
