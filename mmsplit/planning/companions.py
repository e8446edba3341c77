"""Tensors that only mean something together: a quantised weight, its scales, zero points, codebooks.  Pure.

A companion is known by its name.  It stands beside the weight in the same module (`q_proj.qweight`, `q_proj.scales`),
below it as if the weight were a module (`q_proj.weight.absmax`), or is called after it (`q_proj.weight_scale_inv`,
`gate_up_proj_blocks`).  All of one weight make a *group*, named by where the weight is or would be: `q_proj.weight`.
Nothing is decided by the format that config.json states; it only says what to expect.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Final, TypeAlias

from mmsplit.checkpoint import Checkpoint, TensorInfo, TensorRows
from mmsplit.errors import PlanError
from mmsplit.planning.plan import PlannedPartition

#: Last components of tensors that belong to the weight of their own module.
_BESIDE: Final = re.compile(
    r"qweight|qzeros|scales|biases|g_idx|zeros"  # GPTQ, AWQ, AutoRound; MLX has scales and biases
    r"|q_weight|q_scale|q_scale_max|q_groups|q_group_map|q_perm|q_invperm"  # EXL2
    r"|SCB|weight_format"  # bitsandbytes, 8 bits
    r"|blocks"  # MXFP4 with scales
    r"|W_q|scale|zero|nbits|axis|group_size|packing|channel_wise|quant_scale|quant_zero|zero_scale|stores_quant_config"
    r"|view_as_float|unpack_view_dtype|compute_dtype|encoded_state_dict|offload_meta|shape|optimize|round_zero"  # HQQ
    r"|codes|codebooks"  # AQLM with scales
    r"|dense_weights|row_offsets|col_vals|col_ptrs|in_perm"  # SpQR
    r"|indices|outlier_indices|perm"  # VPTQ
    r"|dqweight|tables|tables2",  # FP-Quant, HIGGS
    re.ASCII,
)
#: Last components of tensors that stand below their weight: bitsandbytes with 4 bits, quanto.
_BELOW: Final = re.compile(r"absmax|quant_map|nested_absmax|nested_quant_map|_data|_scale|_shift|_zeropoint", re.ASCII)
#: The same one module deeper: `weight.quant_state.bitsandbytes__nf4`.
_BELOW_STATE: Final = re.compile(r"bitsandbytes__\w+", re.ASCII)
#: VPTQ keeps its codebooks in modules of their own: `centroids.weight`, `res_centroids.weight`.
_CODEBOOK: Final = "centroids.weight"
#: Names made of a weight's own and an ending: FP8, compressed-tensors, ModelOpt, MXFP4, EETQ, torchao.
_ENDING: Final = re.compile(
    r"_?(.+?)_(?:scale|scales|scale_inv|scale_2|scale_ub|scale_bounds|global_scale|zero_point|zero_points|zero|zeros"
    r"|packed|shape|g_idx|blocks|qdata|qvalue|amax|bitmask|compressed|row_offsets)",
    re.ASCII,
)
#: What such a name may begin with and still be about the module's one weight.
_OF_WEIGHT: Final = frozenset({"weight", "input", "output", "activation", "act", "qweight"})
#: Companions that stand for the weight itself, and what they cannot do without.
_NEEDS: Final = {
    "qweight": ("scales",),
    "weight_packed": ("weight_scale",),
    "blocks": ("scales",),
    "codes": ("codebooks", "scales"),
    "W_q": ("scale", "zero"),
    "weight.absmax": ("weight.quant_map",),
    "dense_weights": ("row_offsets", "col_vals"),
}
#: Companions that make no sense without a weight of that name beside them.
_NEED_WEIGHT: Final = frozenset({"weight_scale_inv", "weight.absmax", "weight.quant_map", "SCB"})
_NAMES_IN_NOTE: Final = 3
_LONGEST_WORD: Final = 64

#: Part of the rows of a tensor, from where to where, as fractions of all.
_Share: TypeAlias = tuple[Fraction, Fraction]
#: A partition, and which rows of a tensor it has; None for all.
_Piece: TypeAlias = tuple[int, _Share | None]
#: The tensors of each weight, itself first if it is there, by the name that it has, or would have.  A group of one
#: lacks the others.
Groups: TypeAlias = dict[str, tuple[str, ...]]


def checkpoint_companions(checkpoint: Checkpoint) -> Groups:
    """Return the group of every companion in a checkpoint; names without bytes of their own count."""
    return find_companions({**checkpoint.tensors, **checkpoint.views})


def find_companions(names: Collection[str]) -> Groups:
    """Return the group of every companion among these names."""
    known = names if isinstance(names, Mapping | set | frozenset) else frozenset(names)
    found: Groups = {}
    for name in known:
        weight = _weight_of(name)
        if weight is not None:
            found[weight] = (*found[weight], name) if weight in found else (name,)
    for weight, companions in found.items():
        members = companions if len(companions) == 1 else tuple(sorted(companions))
        found[weight] = (weight, *members) if weight in known else members
    return found


def companion_notes(
    groups: Groups, tensors: Mapping[str, TensorInfo], config: Mapping[str, object] | None
) -> tuple[str, ...]:
    """Return a sentence for each kind of companion that is missing though its siblings or config.json promise it."""
    alike: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)  # 100,000 groups are of a few sorts
    for weight, members in groups.items():
        start = weight.rfind(".") + 1
        alike[tuple([member[start:] for member in members])].append(weight)
    sorts = {frozenset(suffixes): weights for suffixes, weights in alike.items()}
    promised = _promised_by_siblings({suffixes: len(weights) for suffixes, weights in sorts.items()})
    missing: defaultdict[str, list[str]] = defaultdict(list)
    for suffixes, weights in sorts.items():
        needed = {companion for main, needs in _NEEDS.items() if main in suffixes for companion in needs}
        needed |= {"weight"} if suffixes & _NEED_WEIGHT else set()
        for companion in (needed | promised.get(_main_of(suffixes), frozenset())) - suffixes:
            missing[companion] += weights
    notes = [_note(f"a quantised weight has no {what!r} beside it", sorted(where)) for what, where in missing.items()]
    bare = _bare_weights(tensors, groups, config)
    return (*sorted(notes), *([_note("a weight of 8-bit floats has no scale beside it", bare)] if bare else []))


def require_kept_together(partitions: Sequence[PlannedPartition], groups: Groups) -> None:
    """Raise `PlanError` if a companion and its weight are not in the same partitions, or are sliced differently."""
    if not groups:
        return
    pieces: dict[str, frozenset[_Piece]] = {}
    for part in partitions:
        whole: frozenset[_Piece] = frozenset({(part.part_id, None)})
        for layer in part.layers:
            pieces |= dict.fromkeys((view.name for view in layer.views), whole)
            for tensor in layer.tensors if layer.alias is None else ():
                if tensor.rows is None:
                    pieces[tensor.name] = whole
                else:
                    pieces[tensor.name] = pieces.get(tensor.name, frozenset()) | {(part.part_id, _share(tensor.rows))}
    for members in groups.values():
        first = pieces[members[0]]
        for other in members[1:]:
            if pieces[other] != first:
                raise PlanError(
                    f"belongs to {members[0]!r}, but the plan cuts the two apart",
                    tensor=other,
                    expected=_show(first),
                    found=_show(pieces[other]),
                    hint="A quantised weight means nothing without them: put all tensors of its module together.",
                )


def _share(rows: TensorRows) -> _Share:
    """Return which rows of how many: a weight and its scales may count their rows differently."""
    return Fraction(rows.start, rows.shape[0]), Fraction(rows.stop, rows.shape[0])


def _show(pieces: Collection[_Piece]) -> str:
    places = sorted(
        f"partition {part_id}" + ("" if share is None else f", from {share[0]} to {share[1]} of its rows")
        for part_id, share in pieces
    )
    return "; ".join([*places[:3], "…"] if len(places) > 3 else places)


@lru_cache(maxsize=4096)
def _rule_of(last: str) -> str | None:
    """Return where the weight stands of which a tensor with this last component is a companion, None if it is none.

    That is relative to the tensor's module: `.weight` (a name in it), "" (itself), or "^" (the module around it).
    """
    if len(last) > _LONGEST_WORD:
        return None
    if _BESIDE.fullmatch(last):
        return ".weight"
    if _BELOW.fullmatch(last):
        return ""
    if _BELOW_STATE.fullmatch(last):
        return "^"
    match = _ENDING.fullmatch(last)
    if match is None:
        return None
    return ".weight" if match[1] in _OF_WEIGHT else f".{match[1]}"


def _weight_of(name: str) -> str | None:
    """Return the name that the weight has, or would have, to which `name` is a companion; None if it is none."""
    end = name.rfind(".")
    last = name[end + 1 :]
    rule = _rule_of(last)
    if rule is None:
        return f"{_around(name[:end])}.weight" if last == "weight" and name.endswith(_CODEBOOK) else None
    if end == -1:
        return rule[1:] or None
    return _around(name[:end]) if rule == "^" else name[:end] + rule


def _around(module: str) -> str:
    return module.rpartition(".")[0]


def _main_of(suffixes: Collection[str]) -> str:
    """Return what stands for the weight in a group: by that its siblings are known."""
    return next((main for main in _NEEDS if main in suffixes), "")


def _promised_by_siblings(sorts: Mapping[frozenset[str], int]) -> dict[str, frozenset[str]]:
    """Return the companions that at least nine in ten groups of a kind have, by what stands for the weight in them.

    Weights with companions called after them (`weight_scale`) are left out: models mix several schemes of those.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    totals: Counter[str] = Counter()
    for suffixes, number in sorts.items():
        main = _main_of(suffixes)
        totals[main] += number
        for suffix in suffixes:
            counts[main][suffix] += number
    return {
        main: frozenset(what for what, number in counts[main].items() if 10 * number >= 9 * totals[main])
        for main in totals
        if main
    }


def _bare_weights(tensors: Mapping[str, TensorInfo], groups: Groups, config: Mapping[str, object] | None) -> list[str]:
    """Return the matrices of 8-bit floats without any companion, if others have some or config.json says fp8."""
    bare = []
    some_have = False
    for tensor in tensors.values():
        if tensor.dtype == "F8_E4M3" and len(tensor.shape) > 1:
            if tensor.name in groups:
                some_have = True
            elif _weight_of(tensor.name) is None:
                bare.append(tensor.name)
    stated = None if config is None else config.get("quantization_config")
    is_stated = isinstance(stated, Mapping) and stated.get("quant_method") in ("fp8", "fbgemm_fp8", "modelopt")
    return bare if is_stated or some_have else []


def _note(what: str, where: Sequence[str]) -> str:
    shown = ", ".join(where[:_NAMES_IN_NOTE]) + (", …" if len(where) > _NAMES_IN_NOTE else "")
    return f"{what} ({len(where):,}): {shown}"
