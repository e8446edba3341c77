"""Tied weights: where the model uses, under another name, a weight that is stored once.  Pure.

Evidence first: a checkpoint without any head whose model needs one has a tied head.  config.json only
cross-checks; where it disagrees that is a note.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

from mmsplit.layers import Layer, LayerMap

#: How the note begins on a head that is stored although config.json says that it is tied.
STORED_THOUGH_TIED: Final = "config.json says the head is tied, but"
#: Spellings of the token embedding, by the end of the name; the decoder's own comes first, since it feeds the head.
_TOKEN_EMBEDDINGS: Final = (
    "decoder.embed_tokens.weight",
    "shared.weight",
    "embed_tokens.weight",
    "wte.weight",
    "tok_embeddings.weight",
    "token_embd.weight",
    "embed_in.weight",
    "word_embeddings.weight",
)
#: Ends of class names that produce logits over the vocabulary, so that a head must be somewhere.
_WITH_HEAD: Final = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class _Names(NamedTuple):
    """What a way of naming calls the head's weight, the stack that decodes, and the embedding of its own."""

    head_weight: str
    decoder: str
    decoder_embedding: str


_HUB_NAMES: Final = _Names("lm_head.weight", "decoder", "decoder.embed_tokens.weight")
#: GGUF has no name for a decoder's own embedding: this one is made like its others.
_GGUF_NAMES: Final = _Names("output.weight", "dec", "dec.token_embd.weight")
_GGUF_EMBEDDING: Final = "token_embd.weight"


class Tie(NamedTuple):
    """`layer` uses the stored tensor `tensor` as if it were called `alias`; it runs before layer `position`.

    `position` indexes `LayerMap.layers`; one past the end means it runs last.
    """

    layer: Layer
    alias: str
    tensor: str
    position: int


def find_ties(
    layer_map: LayerMap, config: Mapping[str, object] | None, views: Collection[str] = ()
) -> tuple[tuple[Tie, ...], tuple[str, ...]]:
    """Return the ties of a checkpoint that no name speaks of, in forward order, and notes.

    `views` are names that are not stored: they see the bytes of another tensor.
    """
    layers = layer_map.layers
    names = {name for layer in layers for name in layer.tensors}
    embedding = _token_embedding(layers)
    # A head of nothing but a bias (BART's final_logits_bias) has its weight elsewhere.
    has_head = any(layer.layer_type == "head" and not all(map(_is_bias, layer.tensors)) for layer in layers)
    declared = declares_tie(config)
    if embedding is None or not _needs_head(config, has_blocks=any(layer.stack for layer in layers)):
        return (), ()
    ties = []
    called = _GGUF_NAMES if embedding == _GGUF_EMBEDDING else _HUB_NAMES
    decoder_start = _first_block(layers, called.decoder)
    if (
        decoder_start is not None
        and embedding.endswith(("shared.weight", _GGUF_EMBEDDING))
        and not any(name.endswith(called.decoder_embedding) for name in names)
    ):
        ties.append(_tie(layers, "embedding", called.decoder_embedding, embedding, decoder_start))
    notes: tuple[str, ...] = ()
    if not has_head:
        ties.append(_tie(layers, "head", called.head_weight, embedding, len(layers)))
        if declared is False:
            notes = (
                f"config.json says tie_word_embeddings is false, but no header has a head; {embedding} is taken"
                " to be tied to it",
            )
    elif declared is True and called.head_weight in names and called.head_weight not in views:
        notes = (f"{STORED_THOUGH_TIED} {called.head_weight} is stored, too",)
    return tuple(ties), notes


def _is_bias(name: str) -> bool:
    return name.endswith("bias")


def _tie(layers: Sequence[Layer], layer_type: str, alias: str, tensor: str, position: int) -> Tie:
    layer_name = alias.removesuffix(".weight")
    if any(layer.name == layer_name for layer in layers):
        layer_name = alias  # names of layers are unique: the module's own layer has what else it has, say a bias
    return Tie(Layer(layer_name, layer_type, None, None, (tensor,)), alias, tensor, position)


def _token_embedding(layers: Sequence[Layer]) -> str | None:
    candidates = [name for layer in layers if layer.layer_type == "embedding" for name in layer.tensors]
    for ending in _TOKEN_EMBEDDINGS:
        for name in candidates:
            if name == ending or name.endswith(f".{ending}"):
                return name
    return None


def _needs_head(config: Mapping[str, object] | None, *, has_blocks: bool) -> bool:
    """Whether the model turns hidden states into tokens; without a config, anything with blocks may."""
    if config is None:
        return has_blocks
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        return any(isinstance(name, str) and name.endswith(_WITH_HEAD) for name in architectures)
    return has_blocks and declares_tie(config) is True


def declares_tie(config: Mapping[str, object] | None) -> bool | None:
    """Return tie_word_embeddings as config.json has it, at its top or in the text model's part."""
    if config is None:
        return None
    for part in (config, config.get("text_config"), config.get("llm_config"), config.get("language_config")):
        if isinstance(part, Mapping):
            value = part.get("tie_word_embeddings")
            if isinstance(value, bool):
                return value
    return None


def _first_block(layers: Sequence[Layer], stack_part: str) -> int | None:
    for position, layer in enumerate(layers):
        if layer.stack is not None and stack_part in layer.stack.split("."):
            return position
    return None
