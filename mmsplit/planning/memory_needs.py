"""What each layer needs of a node's memory: weights as they load, KV cache, training state.  Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple, get_args

from mmsplit.checkpoint import TensorInfo
from mmsplit.dtypes import DTYPES
from mmsplit.errors import PlanError
from mmsplit.layers import Layer
from mmsplit.planning.kv_cache import BlockCache, block_caches
from mmsplit.planning.model_config import hidden_size, stated_dtype, text_config
from mmsplit.planning.training_state import TrainingMethod, is_trained, training_bytes

DEFAULT_LORA_RANK: Final = 16
#: What a KV cache may be kept in.
KV_DTYPES: Final = tuple(name for name in DTYPES if name not in ("BOOL", "C64"))
#: No machine holds more; sums of products of such numbers stay printable.
_MOST: Final = 10**9


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """What the model is to do on the nodes.

    `context` is in tokens per sequence, prompt and answer together; without it no KV cache is counted.  `kv_dtype` is
    a name such as "BF16" (by default the dtype in which the model computes).  With `training` there is no KV cache.
    Raises `PlanError`.
    """

    context: int | None = None
    batch: int = 1
    kv_dtype: str | None = None
    training: TrainingMethod | None = None
    lora_rank: int = DEFAULT_LORA_RANK

    def __post_init__(self) -> None:
        for field, value in (("context", self.context), ("batch", self.batch), ("lora_rank", self.lora_rank)):
            if value is not None and (type(value) is not int or not 1 <= value <= _MOST):
                raise PlanError(
                    f"{field} is not possible", expected=f"an integer from 1 to {_MOST:,}", found=repr(value)
                )
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            expected = f"one of {', '.join(KV_DTYPES)}"
            raise PlanError("kv_dtype is not possible", expected=expected, found=repr(self.kv_dtype))
        if self.training is not None and self.training not in get_args(TrainingMethod):
            expected = f"one of {', '.join(get_args(TrainingMethod))}"
            raise PlanError("training method is not known", expected=expected, found=repr(self.training))


class Needs(NamedTuple):
    """Bytes of memory.  `training_bytes` are gradients and optimiser state (adapters, too), without activations."""

    weights_bytes: int = 0
    cache_bytes: int = 0
    training_bytes: int = 0
    activation_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(self)

    def as_json(self) -> dict[str, int]:
        """Return the needs as `plan --json` shows them."""
        return {**self._asdict(), "total_bytes": self.total_bytes}


class ModelFacts:
    """What is known of a checkpoint whatever it is to do; worked out once, since finding out what fits asks often."""

    def __init__(
        self, layers: Sequence[Layer], tensors: Mapping[str, TensorInfo], config: Mapping[str, object] | None
    ) -> None:
        self.layers = layers
        self.tensors = tensors
        self.compute_dtype = _compute_dtype(tensors, config)
        self.hidden_size = hidden_size(text_config(config))
        self.weights_bytes = {layer.name: sum(tensors[name].size_bytes for name in layer.tensors) for layer in layers}
        self._config = config

    @cached_property
    def caches(self) -> tuple[dict[str, BlockCache], tuple[str, ...]]:
        """What each block caches, and notes."""
        return block_caches(self.layers, self.tensors, self._config)


class ModelNeeds:
    """The needs of a checkpoint's layers for one request.

    `notes` say what was assumed and what could not be told; `kv_dtype` is the dtype that was used.
    """

    def __init__(self, facts: ModelFacts, request: MemoryRequest) -> None:
        self.request = request
        self.kv_dtype = request.kv_dtype or facts.compute_dtype
        self._facts = facts
        self._caches: dict[str, BlockCache] = {}
        notes: tuple[str, ...] = ()
        if request.training is None and request.context is not None:
            self._caches, notes = facts.caches
        self.notes = (*notes, *self._remarks())

    def of_layer(self, layer: Layer) -> Needs:
        """Return what a node needs for a layer that it holds."""
        weights = self._facts.weights_bytes[layer.name]
        return Needs(weights, self._cache_bytes(layer), self._training_bytes(layer), self._activation_bytes(layer))

    def of_copy(self, tensor: TensorInfo) -> Needs:
        """Return what the copy of a tied weight needs."""
        method = self.request.training
        extra = 0 if method is None else training_bytes(tensor, method, self.request.lora_rank, in_block=False)
        return Needs(weights_bytes=tensor.size_bytes, training_bytes=extra)

    def _cache_bytes(self, layer: Layer) -> int:
        cache, context = self._caches.get(layer.name), self.request.context
        if cache is None or context is None:
            return 0
        return cache.size_bytes(context, self.request.batch, DTYPES[self.kv_dtype].bits)

    def _training_bytes(self, layer: Layer) -> int:
        method, rank = self.request.training, self.request.lora_rank
        if method is None:
            return 0
        tensors = [self._facts.tensors[name] for name in layer.tensors]
        return sum(training_bytes(tensor, method, rank, in_block=layer.stack is not None) for tensor in tensors)

    def _activation_bytes(self, layer: Layer) -> int:
        context, hidden = self.request.context, self._facts.hidden_size
        if self.request.training is None or context is None or hidden is None or layer.stack is None:
            return 0
        return self.request.batch * context * hidden * DTYPES[self._facts.compute_dtype].bits // 8

    def _remarks(self) -> list[str]:
        request, tensors = self.request, self._facts.tensors.values()
        if request.training is None:
            return [] if request.context is not None else ["no KV cache is counted: give the context, in tokens"]
        remarks = []
        if request.context is None:
            remarks.append("no activations are counted: give the context, in tokens")
        else:
            remarks.append("of activations only the input of each block is counted, the least there is")
        frozen = [tensor for tensor in tensors if not is_trained(tensor)]
        if request.training != "lora" and frozen:
            self._require_mostly_trained(frozen)
            remarks.append(f"{len(frozen)} tensor(s) of other dtypes than floats are counted without training state")
        return remarks

    def _require_mostly_trained(self, frozen: Sequence[TensorInfo]) -> None:
        largest = max(frozen, key=lambda tensor: tensor.size_bytes)
        total_bytes = sum(tensor.size_bytes for tensor in self._facts.tensors.values())
        if 2 * sum(tensor.size_bytes for tensor in frozen) > total_bytes:
            raise PlanError(
                f"{self.request.training} trains floats of 16 bits or more, and most of these weights are not",
                tensor=largest.name,
                expected="F16, BF16, F32 or F64",
                found=largest.dtype,
                hint="Plan for lora, or for the checkpoint as it was before it was quantised.",
            )


def _compute_dtype(tensors: Mapping[str, TensorInfo], config: Mapping[str, object] | None) -> str:
    """Return the dtype in which the model computes: the headers' most frequent plain float, by bytes.

    Where the weights are quantised it is what config.json says.
    """
    sizes = Counter[str]()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.size_bytes
    common = next((dtype for dtype, _ in sizes.most_common(1)), None)
    if common in {"F16", "BF16", "F32"}:
        return common
    return stated_dtype(config) or "BF16"
