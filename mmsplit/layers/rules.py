"""The one list of layer rules: what the words in a tensor name say about the module that bears them.

A rule speaks about one *component* of a name (`self_attn` in `model.layers.7.self_attn.q_proj.weight`),
never about a model.  There are four parts:

* numbered lists: which are stacks of blocks, which hold stages, and which belong together;
* the end of a module: from which component on a name speaks about a parameter;
* roles: where a component runs among its siblings, and the layer type it has when it holds no stack;
* parts of a block: the same inside a block, where a norm is not a final norm.

To teach a new spelling, add it to the row that already says what it means.  Rows are tried from the top and
the first match wins, so exceptions stand above the rule they are taken from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final, NamedTuple

# ------------------------------------------------------------------------------------------- numbered lists

#: Names of lists whose members are blocks: `layers`, `h`, `blk`, `encoder_layers`, `transformer_blocks`,
#: `layer1` (ResNet numbers its lists); but not `mlp`, `experts` or `projections`.
STACK_WORD: Final = re.compile(
    r"(?:.*_)?(?:layers?|blocks?|resblocks?|resnets|attentions|attn|h|blk|stages?|levels|groups|cells|units)\d*"
)

#: A child that makes a block of the members of any list, whatever the list is called.
ATTENTION: Final = re.compile(r"(?:.*_)?(?:attn|attention)(?:_.*)?")

#: Lists whose members are stages, i.e. hold the lists that are the real stacks.  They are opened if they do.
STAGE_WORDS: Final = frozenset(
    {"stage", "stages", "levels", "down", "up", "down_block", "up_block", "down_blocks", "up_blocks"}
)

#: (outer, inner) lists of which the outer is a list of stages although its name does not say so; "" stands
#: for an inner list without a name (`block.0.1`).  T5's (`block`, `layer`) is not one of them: there the
#: inner list holds the parts of one block.
STAGE_PAIRS: Final = frozenset(
    {
        ("layers", "blocks"),
        ("layer", "blocks"),
        ("blocks", "layers"),
        ("blocks", "blocks"),
        ("block", ""),
        ("blocks", ""),
        ("blk", ""),
        ("layers", ""),
        ("attentions", "transformer_blocks"),
        ("temp_attentions", "transformer_blocks"),
        ("motion_modules", "transformer_blocks"),
    }
)

#: (outer, inner) lists that count as such a pair only where every inner member is one convolution with its
#: norm: the authors of ResNet let a residual block be cut between convolutions, those of RegNet do not.
CONVOLUTION_PAIRS: Final = frozenset({("layers", "layer")})
CONVOLUTION_PARTS: Final = frozenset({"convolution", "normalization"})

#: Children that make the stages of a list units, which run as one block.  Swin and its kin hand on what came
#: out before and after the `downsample` at the end of a stage, a residual group adds its input behind `conv`.
#: The first stage has these; a mere transition at the start of a stage is one that the first does not need.
UNIT_BY_FIRST_STAGE: Final = frozenset({"downsample", "conv"})

#: The same for a child of any stage: ConvNeXt's transition is part of its stage by its authors' word.
UNIT_BY_ANY_STAGE: Final = frozenset({"downsampling_layer"})

#: (stage list, child): a stage with this child runs as a unit, the others do not.  The up path of a U-Net
#: takes one skip connection per step, and with attention in between nothing of it runs alone.
UNIT_STAGES: Final = frozenset({("up_blocks", "attentions")})

#: Words numbered with an underscore (`layers_0`).  All else that ends so is a plain name (`linear_1`).
UNDERSCORE_WORDS: Final = frozenset({"layer", "layers", "block", "blocks", "stage", "stages", "h", "blk"})

#: Sibling lists that together make one layer per index: XLM keeps `attentions.3`, `layer_norm1.3`, `ffns.3`
#: and `layer_norm2.3` side by side.  They do if there is one of each of the first two kinds.
PARALLEL_ATTENTION: Final = re.compile(r"(?:self_)?attentions?|attns")
PARALLEL_FEED_FORWARD: Final = re.compile(r"ffns?|mlps?|feed_forwards?")
PARALLEL_OTHER: Final = re.compile(r"(?:layer_)?norms?\d*|lns?\d*|encoder_attn|cross_attentions?")

#: Sibling lists that take turns: index 0 of each runs before index 1 of any.  The number is the turn.
TURNS: Final = {
    "patch_embeddings": 0,  # hierarchical vision encoders: embed, blocks, norm; then the next resolution
    "block": 1,
    "resnets": 1,
    "layer_norm": 2,
    "attn": 2,
    "attentions": 2,
    "temp_attentions": 3,
    "motion_modules": 4,
}

#: Lists that run from the last index to the first (latent-diffusion decoders prepend as they build).
DESCENDING_WORDS: Final = frozenset({"up"})

# ---------------------------------------------------------------------------------------- the end of a module

#: The first of these components ends the path of a module; from there on a name speaks about one parameter:
#: the parameter, its companions (GPTQ, AWQ, bitsandbytes, fp8), or what an adapter adds to it.
MODULE_END: Final = re.compile(
    r"weight(?:_.*)?|bias(?:_.*)?|gamma|beta|running_mean|running_var|num_batches_tracked|inv_freq"
    r"|qweight|qzeros|g_idx|scales?|zeros|absmax|quant_map|quant_state|nested_absmax|nested_quant_map"
    r"|SCB|input_scale|output_scale|packed|lora_.*|base_layer|modules_to_save|original_module|parametrizations"
)

# -------------------------------------------------------------------------------------------------- the roles

# Positions of siblings in the forward pass.  Only their order means something.
EMBEDDING: Final = 10
EMBEDDING_NORM: Final = 15
TOWER: Final = 25  # what reads another modality
PROJECTOR: Final = 30
ENCODER: Final = 35
QUANTIZER: Final = 45  # between encoder and decoder
CORE: Final = 50  # the main stack, and what no rule knows
SECOND: Final = 55
DECODER: Final = 60
TAIL: Final = 65  # behind the stacks, before the final norm
NORM: Final = 70
POOLER: Final = 75
MTP: Final = 80  # multi-token prediction starts from the hidden states of the finished main stack
GENERATOR: Final = 85  # turns what the model says into sound or pixels
HEAD: Final = 90


class Role(NamedTuple):
    """Where a component runs among its siblings, and the layer type it has where it holds no stack.

    `layer_type` is None for words that only ever hold other modules (`model`, `encoder`).
    """

    rank: int
    layer_type: str | None


_MODALITY = r"vision|visual|image|img|vit|video|pixel|audio|speech|sound|whisper|clip|siglip|eva|dino"

#: (rank, layer type, spellings).  Spellings are matched against the whole component, in lower case.
ROLES: Final[tuple[tuple[int, str | None, str], ...]] = (
    # Halves of a U-Net in its first spelling, before "input" and "output" mean the ends of a model.
    (ENCODER, None, r"input_blocks|cond_stage_model"),
    (DECODER, None, r"output_blocks"),
    # Heads named after what they embed or project, before "embed" and "proj" mean something else.
    (HEAD, "head", r"embed_out|(?:.*_)?(?:bbox|class|score|coord|mask|span)_embed|enc_out_.*"),
    (HEAD, "head", r"lm_head.*|heads?|.*_heads?|head_.*|fc|(?:.*_)?classifier(?:_.*)?|classification"),
    (HEAD, "head", r"score|qa_outputs|cls|(?:.*_)?predictions?|(?:.*_)?class_predictor|seq_relationship"),
    (HEAD, "head", r"(?:pred|output)_layer|.*_pred|(?:.*_)?logits?(?:_.*)?|answer_.*|output|output_proj.*"),
    (HEAD, "head", r"unembed|proj_out.*|.*_proj_out|conv_out|conv_post|final_(?:layer|conv|linear)"),
    (
        HEAD,
        "head",
        r"out|out_\w+|(?:.*_)?(?:out_proj|out_conv)|postprocess_.*|all_final_layer|tdnn|objective",
    ),
    (HEAD, "head", r"criterion|(?:.*_)?postnet"),
    # What makes sound or pixels at the very end.
    (GENERATOR, None, r"(?:audio|speech|acoustic|image|depth|wave\w*|mel)_decoder.*|vocoder|talker"),
    (GENERATOR, None, r"code2wav|token2wav|t2u.*|first_stage_model"),
    # Multi-token prediction.
    (MTP, None, r"mtp|mtp_.*|nextn.*|multi_token.*"),
    # What widens the embedding for all layers; norms of the input; then all other norms.
    (EMBEDDING_NORM, "embedding", r"altup_proj(?:ections)?|per_layer_.*proj.*"),
    (EMBEDDING_NORM, "norm", r"(?:.*_)?emb(?:e?d\w*)?_(?:layer_?)?norm|layernorm_embedding|layer_norm_emb"),
    (EMBEDDING_NORM, "norm", r"ln_pre|norm_pre|pre_ln|pre_layr?norm|pre_norm|pre_fc_norm.*"),
    (EMBEDDING_NORM, "norm", r"norm_in|norm_embd|ln_q|bn1"),
    (NORM, "norm", r"(?:.*_)?(?:(?:layer|rms|batch|group)_?norm|norms?|ln|bn|normalization)\d*(?:_.*)?"),
    # Projectors between modalities.
    (PROJECTOR, "projector", r"(?:.*_)?(?:projector|connector|resampler|merger|aligner)\d*(?:_.*)?"),
    (PROJECTOR, "projector", r"(?:.*_)?(?:adapter|bridge|perceiver)\d*(?:_.*)?|mlp1|mm|mm_.*|q_?former.*"),
    (PROJECTOR, "projector", r"embed_(?:vision|audio)|language_proj(?:ection)?"),
    (QUANTIZER, "projector", r"enc(?:oder)?_to_dec(?:oder)?_proj.*|encoder_proj(?:ection)?"),
    (PROJECTOR, "projector", rf"(?:{_MODALITY}|feature|caption|multi_?modal)\w*_proj(?:ection)?"),
    (POOLER, "projector", r"text_projection|projection|proj"),
    # Embeddings, stems of convolutional networks, and what is fed in beside the main input.
    (EMBEDDING, "embedding", r"(?:.*_)?(?:embed(?:s|dings?|ders?)?|embd|emb|embed_.*)\d*|embed\w*"),
    (EMBEDDING, "embedding", r".*_embed(?:der|ding)?s?_.*|wte|wpe|tte|w|shared|word_\w*|tok_\w*|token_types"),
    (EMBEDDING, "embedding", r"rope.*|rotary.*|(?:.*_)?(?:positional_encoding\w*|position\w*|time_proj)"),
    (EMBEDDING, "embedding", r".*_tokens?|\w+_newline|view_sep\w*|query\w*|queries|adaln\w*|patch_\w+"),
    (EMBEDDING, "embedding", r"stem|conv_stem|conv(?:2d)?[123]|conv[12]d|conv_in|conv_pre|convolution|subsampl\w+"),
    (
        EMBEDDING,
        "embedding",
        r"proj_in|proj_in_.*|.*_proj_in|\w{1,4}_in|input_.*|.*_input_proj|preprocess_.*",
    ),
    (EMBEDDING, "embedding", r"patchifier|pre_encode|(?:.*_)?(?:prenet|in_proj|feature_extractor|feature_encoder)"),
    # Parts of blocks that stand alone.  They are kept whole.
    (CORE, "other", r".*attn.*|(?:.*_)?attention.*|(?:.*_)?(?:mlp|ffn?)s?\d*(?:_.*)?|lstm|gru|rnn"),
    (NORM, "other", r"(?:.*_)?scale_shift_table|.*modulation.*"),
    # Containers.
    (TOWER, None, rf"(?:.*_)?(?:{_MODALITY})(?:_.*)?|v|a"),
    (ENCODER, None, r"(?:.*_)?(?:encoder|enc)(?:_.*)?|down|down_.*|noise_refiner|context_refiner"),
    (ENCODER, None, r"backbone|reassemble\w*|posnet"),
    (QUANTIZER, "other", r"(?:.*_)?quant(?:izer?|ize|_conv|_.*)?|bottleneck|codebook\w*|project_(?:hid|q)"),
    (QUANTIZER, "other", r"_?latents_(?:mean|std)"),
    (CORE, None, r"middle\w*|mid|mid_.*|(?:.*_)?(?:language_model|text_model|llm)"),
    (SECOND, None, r"single_.*|predictor"),
    (DECODER, None, r"(?:.*_)?(?:decoder|dec)(?:_.*)?|up|up_.*|neck|fusion\w*"),
    (POOLER, "other", r"(?:.*_)?pool(?:er|ing)?(?:_.*)?"),
    (TAIL, "other", r"downsampl.*|upsampl.*|upscale.*|ups|altup_unembe?d.*|snake\w*|shortcut"),
    (TAIL, "other", r"controlnet_.*"),
)

#: (nearest named component around, component) that means something else there than elsewhere.
ROLES_BELOW: Final = {
    # A U-Net's attention runs its norm first, then proj_in, its transformer blocks, proj_out.
    ("attentions", "norm"): Role(EMBEDDING, "norm"),
    ("temp_attentions", "norm"): Role(EMBEDDING, "norm"),
    ("motion_modules", "norm"): Role(EMBEDDING, "norm"),
    # Multi-token prediction first joins the next token's embedding with the hidden states.
    ("mtp", "fc"): Role(EMBEDDING_NORM + 1, "projector"),
}

# ------------------------------------------------------------------------------------------- parts of a block

#: (rank, spellings): the order of the parts of a block.  A norm is mostly named for what follows it.
INSIDE_BLOCK: Final[tuple[tuple[int, str], ...]] = (
    (10, r"input_.*norm.*|pre_attn.*|attn_norm.*|attention_norm|ln_1|norm1|ln1|pre_.*norm"),
    (20, r"(?:self_)?attn.*|(?:self_)?attention.*|selfattention|mixer|mamba|ssm.*|temporal_block"),
    (30, r"post_attention.*norm.*|ffn_norm|ln_cross_attn|post_attn.*"),
    (40, r"(?:cross|encoder|enc_?dec)_?att.*"),
    (50, r"pre_f.*norm.*|ln_2|norm2|ln2|ffn_.*norm.*"),
    (60, r"mlp.*|ffn?.*|feed_?forward.*|intermediate|fc1|block_sparse_moe|moe.*|experts?"),
    (70, r"output|fc2|post_.*norm.*|final_layer_?norm|layer_?norm2"),
)


def _compile(rows: Iterable[tuple[int, str | None, str]]) -> tuple[tuple[re.Pattern[str], Role], ...]:
    return tuple((re.compile(spelling, re.ASCII), Role(rank, kind)) for rank, kind, spelling in rows)


_ROLES: Final = _compile(ROLES)
_INSIDE_BLOCK: Final = _compile((rank, None, spelling) for rank, spelling in INSIDE_BLOCK)

#: Components longer than this are nobody's spelling; they are not matched, so that hostile names stay cheap.
_LONGEST_WORD: Final = 64


@lru_cache(maxsize=4096)
def role_of(component: str, around: str = "") -> Role | None:
    """Return the role of one component of a name, or None where no rule knows the word.

    `around` is the nearest component before it that is not an index, as far as that matters.
    """
    if len(component) > _LONGEST_WORD:
        return None
    if (around, component) in ROLES_BELOW:
        return ROLES_BELOW[around, component]
    word = component.lower()
    return next((role for pattern, role in _ROLES if pattern.fullmatch(word)), None)


@lru_cache(maxsize=4096)
def rank_inside_block(component: str) -> int:
    """Return the position of a component among the parts of a block (0-100)."""
    if len(component) > _LONGEST_WORD:
        return 100
    word = component.lower()
    return next((role.rank for pattern, role in _INSIDE_BLOCK if pattern.fullmatch(word)), 100)


@lru_cache(maxsize=4096)
def is_stack_word(word: str) -> bool:
    """Return whether a numbered list of this name is made of blocks."""
    return len(word) <= _LONGEST_WORD and STACK_WORD.fullmatch(word) is not None


@lru_cache(maxsize=4096)
def ends_module(component: str) -> bool:
    """Return whether this component names a parameter (or what belongs to one), not a module."""
    return len(component) <= _LONGEST_WORD and MODULE_END.fullmatch(component) is not None
