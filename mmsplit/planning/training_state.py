"""What training keeps beside the weights.  Pure.

Bytes per trained parameter, after the weight itself (which is counted as it loads):

| method | weight in 16 bits | weight in F32 |
|---|---|---|
| adamw | gradient 2, master weight 4, two moments 4 + 4 = 14 | gradient 4, two moments 4 + 4 = 12 |
| sgd | gradient 2, master weight 4, momentum 4 = 10 | gradient 4, momentum 4 = 8 |

With the weight that makes 16 for AdamW either way.  Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward
Training Trillion Parameter Models" (2020), section 3.1: 2 + 2 + K with K = 12 for mixed-precision Adam; SGD with
momentum by the same account.

lora: the weights are frozen.  Each linear module W (out x in) of a block, experts included, gets adapters of
rank x (out + in) parameters in F32, trained with AdamW: weight 4, gradient 4, moments 4 + 4 = 16 bytes each.  Source:
Hu et al., "LoRA" (2021), and PEFT, which keeps adapters in F32 (`autocast_adapter_dtype`).

Activations depend on the engine.  What cannot be avoided is counted: with full recomputation a block keeps its input,
batch x context x hidden size, in the model's dtype (Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models", 2022: 2sbh).  All else is for the reserve.
"""

from __future__ import annotations

from typing import Final, Literal

from mmsplit.checkpoint import TensorInfo
from mmsplit.checkpoint.gguf_types import GGML_TYPES
from mmsplit.dtypes import DTYPES

TrainingMethod = Literal["adamw", "sgd", "lora"]

_MASTER_BYTES: Final = 4
_OPTIMIZER_BYTES: Final = {"adamw": 8, "sgd": 4}
_ADAPTER_BYTES: Final = 16
#: Dtypes in which weights are trained.  Others are quantised weights, indices or masks.
_TRAINED: Final = frozenset({"F16", "BF16", "F32", "F64"})
#: Dtypes whose shape is that of the matrix, so that the size of an adapter is known.
_WHOLE_MATRICES: Final = (
    _TRAINED
    | {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8"}
    | {kind.name for kind in GGML_TYPES.values() if kind.block_elements > 1}
)


def is_trained(tensor: TensorInfo) -> bool:
    """Return whether full training changes this tensor."""
    return tensor.dtype in _TRAINED


def training_bytes(tensor: TensorInfo, method: TrainingMethod, rank: int, *, in_block: bool) -> int:
    """Return the bytes that training a tensor adds to the tensor itself."""
    if method == "lora":
        return _ADAPTER_BYTES * _adapter_params(tensor, rank) if in_block else 0
    if not is_trained(tensor):
        return 0
    width = DTYPES[tensor.dtype].bits // 8
    master = _MASTER_BYTES if width < _MASTER_BYTES else 0
    return tensor.params * (width + master + _OPTIMIZER_BYTES[method])


def _adapter_params(tensor: TensorInfo, rank: int) -> int:
    if tensor.dtype not in _WHOLE_MATRICES or not tensor.name.endswith((".weight", "_proj", "experts")):
        return 0
    if len(tensor.shape) == 2 and min(tensor.shape) > 1:
        return rank * sum(tensor.shape)
    is_packed_experts = "expert" in tensor.name or "_exps." in tensor.name
    if len(tensor.shape) == 3 and is_packed_experts:  # a pair of adapters for each
        return tensor.shape[0] * rank * sum(tensor.shape[1:])
    return 0
