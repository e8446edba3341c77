"""What a tensor does in a model, from its name: the kinds that `--split-by type` cuts by, and the words for them.

Outside blocks a layer's own type says it.  Inside a block the outermost word that says something decides: a norm
inside an attention is part of that attention, and runs where the attention runs.  Routed experts come first,
wherever they stand, and with them the router beside them: what picks the experts of a token belongs to whoever has
them, or every token would cross the network twice.  Shared experts see every token; they are an MLP like any other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from mmsplit.layers.experts import expert_place
from mmsplit.layers.layer import Layer
from mmsplit.layers.naming import MAX_COMPONENTS, is_index

#: Every kind, in the order in which partitions by kind are numbered: that in which a model first needs them.
#: "attention" is whatever mixes tokens with each other, so also state-space and recurrent layers in its place.
KINDS: Final = ("embedding", "norm", "attention", "mlp", "experts", "convolution", "projector", "head", "other")

#: (kind, spellings) of one component inside a block, in lower case.  The first row that matches wins.
_INSIDE_BLOCK: Final[tuple[tuple[str, str], ...]] = (
    # What scales or shifts channels one by one counts as a norm: AdaLN, layer scale.
    ("head", r"(?:.*_)?(?:lm_|shared_|logits_)?head|embed_out"),
    ("norm", r".*norm.*|ln(?:_.*|\d+)?|.*_ln|bn\d*|.*modulation.*|(?:.*_)?mod(?:_lin)?|ada_?ln.*|.*scale_shift.*"),
    ("norm", r"layer_?scale.*|.*_layer_?scale|layer_scalar|ls\d*|(?:.*_)?gamma(?:_.*)?|lambda_\d|gate_(?:msa|mlp)"),
    ("mlp", r".*mlp.*|(?:.*_)?ff(?:n|ns|c)?\d*(?:_.*)?|.*feed_?forward.*|.*densereludense.*|.*moe.*|channel_mix\w*"),
    ("mlp", r"shared_experts?|(?:gate|up|down|gate_up)_proj|intermediate\w*|output|w[123]|fc_?\d|fc|linear_?\d"),
    ("mlp", r"dense_h_to_4h|dense_4h_to_h|lin[12]|c_fc|final_layer|dense|pwconv\d*|channelwise_.*"),
    (
        "attention",
        r".*att(?:n|ention).*|(?:.*_)?att|mixer|.*mamba.*|.*ssm.*|.*rglru.*|.*retention.*|time_mix\w*|recurrent.*",
    ),
    ("attention", r"temporal_block|linear_attn|gated_?delta\w*|(?:.*_)?[qkvo]_proj.*|(?:.*_)?qkv.*|w[qkvo]"),
    ("attention", r"quer(?:y|ies).*|keys?(?:_.*)?|values?(?:_.*)?|to_(?:[qkv]|out|add_out).*|[qkv]|kv(?:_.*)?"),
    ("attention", r"rotary.*|rope.*|rel(?:ative)?_pos.*|short_?conv|lstm|gru|rnn|self"),
    ("convolution", r"(?:.*_)?conv\w*|dw_?\w*|depthwise\w*|pointwise\w*|.*shortcut.*|.*downsample.*|.*upsample.*"),
    ("embedding", r".*emb(?:ed\w*)?(?:_.*)?|.*position.*|.*_tokens?"),
    ("projector", r"proj_in|proj_out|proj|.*_projection|.*_proj|projector\d*|linear|proj\d+|.*_proj(?:ection|ect)?s"),
)

_WORDS: Final = tuple((kind, re.compile(spelling, re.ASCII)) for kind, spelling in _INSIDE_BLOCK)

#: A router: what stands beside the experts and says which of them a token goes to.
_ROUTER: Final = re.compile(
    r"gate|gating|wg|.*router.*|.*correction_bias|expert_bias|exp_probs_b|ffn_gate_inp|gate_(?:weight|bias)", re.ASCII
)
_LONGEST_WORD: Final = 64


def sort_by_kind(layer: Layer, dimensions: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Return the tensor names of a layer by what they do, in the layer's own order; every name once.

    `dimensions` has the number of dimensions of each tensor.
    """
    if layer.stack is None and layer.layer_type in KINDS and layer.layer_type != "other":
        return {layer.layer_type: layer.tensors}
    places = {name: expert_place(name, dimensions[name]) for name in layer.tensors}
    modules = {place.module for place in places.values() if place is not None}
    around_experts = modules | {module.rpartition(".")[0] for module in modules}
    kinds: dict[str, list[str]] = {}
    for name, place in places.items():
        is_routed = place is not None or (around_experts and _is_router(name, around_experts))
        kinds.setdefault("experts" if is_routed else _kind_in(layer, name), []).append(name)
    return {kind: tuple(names) for kind, names in kinds.items()}


def _is_router(name: str, around_experts: set[str]) -> bool:
    """Whether a tensor is the router of experts, which stands right below one of the modules that hold them."""
    module = name
    for _ in range(MAX_COMPONENTS):
        module, dot, word = module.rpartition(".")
        if module in around_experts:
            return len(word) <= _LONGEST_WORD and _ROUTER.fullmatch(word.lower()) is not None
        if not dot:
            break
    return False


def _kind_in(layer: Layer, name: str) -> str:
    """Return the kind that the first telling word gives: of those below a block, or else of the layer's own."""
    below = name.removeprefix(layer.name).split(".", MAX_COMPONENTS)[:MAX_COMPONENTS]
    own = layer.name.split(".")[-2:] if layer.stack is None else []
    words = [word for word in (*reversed(own), *below) if word and not is_index(word)]
    for word, following in zip(words, [*words, ""][1:], strict=True):
        kind = _kind_of_word(word)
        if word == "mixer" and _kind_of_word(following) == "mlp":
            return "mlp"  # hybrid models call the one thing that a block does its mixer, also where that is an MLP
        if kind is not None:
            return kind
    return "other"


@lru_cache(maxsize=4096)
def _kind_of_word(component: str) -> str | None:
    if len(component) > _LONGEST_WORD:
        return None
    word = component.lower()
    return next((kind for kind, pattern in _WORDS if pattern.fullmatch(word)), None)
