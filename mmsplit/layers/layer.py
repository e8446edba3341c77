"""The records of this room: what a layer is, and the ordered map of them."""

from __future__ import annotations

from typing import Final, NamedTuple

#: Every value `Layer.layer_type` can take, in the order in which a model runs them.
LAYER_TYPES: Final = ("embedding", "block", "projector", "norm", "head", "other")


class Layer(NamedTuple):
    """A unit that is never cut: one repeated block, or an embedding, projector, norm, head … of its own.

    `name` is unique in its map and is the prefix its tensors share where they share one
    (`model.layers.7`, `model.embed_tokens`); a layer kept in parallel lists (`attentions.7`, `ffns.7`) is
    named after its attention.  `stack` and `block_index` (0 or more) are set for blocks only: `model.layers` and 7.
    `tensors` are tensor names in forward order as far as names tell.
    """

    name: str
    layer_type: str
    stack: str | None
    block_index: int | None
    tensors: tuple[str, ...]


class LayerMap(NamedTuple):
    """All layers of a checkpoint in forward order; every tensor name is in exactly one of them.

    `notes` are sentences for a person: names no rule knew, config.json disagreeing with the headers.
    """

    layers: tuple[Layer, ...]
    notes: tuple[str, ...]
