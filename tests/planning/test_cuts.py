"""Cuts by type, by expert and by rule: who gets what, what is refused, and that nothing is lost."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import CAUSAL, MakeShaped, Shapes, held, layers_of, moe, open_shapes

from mmsplit.checkpoint import TensorInfo
from mmsplit.errors import PlanError
from mmsplit.planning import PlanRequest, Rule, iter_stored, parse_rules, plan_checkpoint
from mmsplit.planning.rule_cut import MAX_RULES

# -------------------------------------------------------------------------------------------------------- by type


def test_by_type(shaped: MakeShaped) -> None:
    """A partition per kind, blocks divided into parts that are named after their modules, in forward order."""
    plan = plan_checkpoint(shaped(moe(head=True), CAUSAL), PlanRequest(split_by="type"))
    labels = [part.label for part in plan.partitions]
    assert labels == ["embedding", "norm", "attention", "mlp", "experts", "head"]
    assert layers_of(plan, 1) == [
        ("model.layers.0.input_layernorm", "norm"),
        ("model.layers.1.input_layernorm", "norm"),
        ("model.norm", "norm"),
    ]
    assert layers_of(plan, 2)[1] == ("model.layers.1.self_attn.q_proj", "attention")
    assert layers_of(plan, 3)[1] == ("model.layers.1.mlp.shared_expert.up_proj", "mlp")
    assert layers_of(plan, 4)[1] == ("model.layers.1.mlp", "experts")
    assert "model.layers.0.mlp.gate.weight" in held(plan)[4]
    block = plan.partitions[4].layers[1]
    assert (block.stack, block.block_index) == ("model.layers", 1)
    assert plan.as_json()["split_by"] == "type"
    assert plan_checkpoint(shaped(moe(head=True)), PlanRequest(split_by="type", num_parts=6)).num_parts == 6


def test_a_tied_head_by_type(shaped: MakeShaped) -> None:
    """With nothing else in the head it stays with the embedding; with a bias of its own it gets a copy or refers."""
    plan = plan_checkpoint(shaped(moe(), CAUSAL), PlanRequest(split_by="type"))
    assert [part.label for part in plan.partitions] == ["embedding", "norm", "attention", "mlp", "experts"]
    tied = plan.partitions[0].layers[-1]
    assert (tied.alias, tied.tied_to, tied.stored) == ("lm_head.weight", 0, False)
    with_bias = shaped({**moe(), "lm_head.bias": (16,)}, CAUSAL)
    for mode, (part_id, stored) in {"duplicate": (-1, True), "reference": (-1, False), "colocate": (0, False)}.items():
        plan = plan_checkpoint(with_bias, PlanRequest(split_by="type", tied=mode))  # type: ignore[arg-type]
        tied = next(layer for layer in plan.partitions[part_id].layers if layer.alias is not None)
        assert (tied.tied_to, tied.stored) == (0, stored)


# ------------------------------------------------------------------------------------------------------ by expert


def test_by_expert(shaped: MakeShaped) -> None:
    """Trunk first; each other partition has the same run of experts of every layer, nothing of the trunk."""
    plan = plan_checkpoint(shaped(moe(head=True), CAUSAL), PlanRequest(split_by="expert", num_parts=3))
    assert [part.label for part in plan.partitions] == ["trunk", "experts 0-1", "experts 2-3"]
    assert held(plan)[2] == {f"model.layers.{k}.mlp.experts.{e}.up_proj.weight" for k in (0, 1) for e in (2, 3)}
    assert layers_of(plan, 2) == [(f"model.layers.{k}.mlp.experts", "experts") for k in (0, 1)]
    assert ("model.layers.0", "block") in layers_of(plan, 0)
    assert not any(".experts." in name for name in held(plan)[0])
    assert (plan.balance.weights, plan.balance.excess) == ((0.0, 1.0, 1.0), 0.0)
    assert plan.balance.bottleneck in (1, 2)


@pytest.mark.parametrize(
    ("weights", "labels"),
    [
        (["3", "1"], ["experts 0-2", "expert 3"]),
        (["1", "1", "1", "1"], ["expert 0", "expert 1", "expert 2", "expert 3"]),
        (["1"], ["experts 0-3"]),
    ],
)
def test_weights_are_for_the_experts(shaped: MakeShaped, weights: list[str], labels: list[str]) -> None:
    plan = plan_checkpoint(shaped(moe()), PlanRequest(split_by="expert", weights=weights))
    assert [part.label for part in plan.partitions] == ["trunk", *labels]


#: Packed experts of one layer, what config.json says, experts, and rows per expert by tensor.
PACKED = {
    "one tensor": ({"experts.gate_up_proj": (4, 8, 6), "experts.down_proj": (4, 3, 8)}, None, {}),
    "agrees with config": ({"experts.gate_up_proj": (4, 8, 6)}, {"text_config": {"num_local_experts": 4}}, {}),
    "biases": ({"experts.up_proj": (4, 8, 6), "experts.up_proj_bias": (4, 6), "experts.s": (4,)}, None, {}),
    "MXFP4": ({"experts.up_proj_blocks": (4, 8, 2, 16), "experts.up_proj_scales": (4, 8, 2)}, None, {}),
    "GGUF": ({"ffn_up_exps.weight": (4, 8, 6), "ffn_down_exps.weight": (4, 6, 8)}, None, {}),
    "Granite": ({"block_sparse_moe.input_linear.weight": (4, 8, 6)}, None, {}),
    "DBRX": (
        {"experts.mlp.w1": (12, 8), "experts.mlp.v1": (12, 8)},
        {"ffn_config": {"moe_num_experts": 4}},
        {"w1": 3, "v1": 3},
    ),
    "flat with scales": (
        {"experts.mlp.w1": (12, 8), "experts.mlp.w1_scale_inv": (12, 1)},
        {"num_experts": 4},
        {"w1": 3, "w1_scale_inv": 3},
    ),
}


@pytest.mark.parametrize(("shapes", "config", "rows"), PACKED.values(), ids=PACKED)
def test_packed_experts_are_sliced(shaped: MakeShaped, shapes: Shapes, config: object, rows: Mapping[str, int]) -> None:
    """Each partition has the rows of its experts, one after the other in the shard; together they are all."""
    names = {f"model.layers.0.mlp.{name}": shape for name, shape in shapes.items()}
    checkpoint = shaped(
        {"model.embed_tokens.weight": (4, 8), "model.layers.0.mlp.gate.weight": (4, 8), **names}, config
    )
    plan = plan_checkpoint(checkpoint, PlanRequest(split_by="expert", num_parts=4))
    assert [part.label for part in plan.partitions] == ["trunk", "expert 0", "expert 1", "experts 2-3"]
    for name, shape in names.items():
        each = rows.get(name.rpartition(".")[2], 1)
        slices = [t for part in plan.partitions for _, t in iter_stored(part) if t.name == name]
        assert [t.rows and (t.rows.start, t.rows.stop, t.rows.shape) for t in slices] == [
            (start * each, stop * each, shape) for start, stop in ((0, 1), (1, 2), (2, 4))
        ]
        whole = checkpoint.tensors[name]
        assert [t.start_offset for t in slices] == [whole.start_offset + whole.size_bytes * k // 4 for k in (0, 1, 2)]
        assert slices[-1].stop_offset == whole.stop_offset
        assert sum(t.params for t in slices) == whole.params
        assert slices[2].shape == (2 * each, *shape[1:])
    assert plan.digest != plan_checkpoint(checkpoint, PlanRequest(split_by="expert", weights=[1, 2, 1])).digest


def test_what_all_experts_share_stays_in_the_trunk(shaped: MakeShaped) -> None:
    """A norm, a router's bias or a scalar below `experts` is no expert's, whatever its length."""
    common = {"experts.post_expert_norm.weight": (8,), "experts.e_score_correction_bias": (4,), "experts.scalar": ()}
    names = {f"l.layers.0.mlp.{k}": v for k, v in {**common, "experts.up_proj": (4, 2, 2)}.items()}
    plan = plan_checkpoint(shaped(names), PlanRequest(split_by="expert", num_parts=2))
    assert held(plan)[0] == {f"l.layers.0.mlp.{name}" for name in common}


def test_layers_with_fewer_experts(shaped: MakeShaped) -> None:
    """The layer with fewer experts is in fewer partitions; what counts is what each weighs."""
    shapes = {"e.layers.0.mlp.experts.up_proj": (2, 2, 4), "e.layers.1.mlp.experts.up_proj": (6, 2, 4)}
    shapes["e.layers.0.mlp.gate.weight"] = (2, 4)
    plan = plan_checkpoint(shaped(shapes), PlanRequest(split_by="expert", num_parts=3))
    assert [part.label for part in plan.partitions] == ["trunk", "experts 0-1", "experts 2-5"]
    assert [len(part.layers) for part in plan.partitions] == [1, 2, 1]
    assert plan.partitions[1].layers[0].tensors[0].rows is None  # all experts of that layer: it is whole
    crossing = plan_checkpoint(shaped(shapes), PlanRequest(split_by="expert", weights=[1, 30]))
    assert [part.label for part in crossing.partitions] == ["trunk", "expert 0", "experts 1-5"]
    assert [layer.tensors[0].shape[0] for layer in crossing.partitions[2].layers] == [1, 5]


def test_numbered_experts_overrule_config(shaped: MakeShaped) -> None:
    """A pruned model has fewer experts than its config says: a note, since the names leave no doubt."""
    plan = plan_checkpoint(shaped(moe(3), {"num_experts": 8}), PlanRequest(split_by="expert", num_parts=2))
    assert any("config.json has 8 experts, the headers 3" in note for note in plan.notes)


def test_companions_of_an_expert_go_with_it(shaped: MakeShaped) -> None:
    """By their number, like everything of the expert."""
    shapes = {f"{name}_scale_inv": (1, 1) for name in moe() if ".experts." in name}
    plan = plan_checkpoint(shaped(moe() | shapes), PlanRequest(split_by="expert", num_parts=3))
    assert sum("scale_inv" in name for name in held(plan)[1]) == 4


# -------------------------------------------------------------------------------------------------------- by rule


def test_by_rule(shaped: MakeShaped) -> None:
    """A function of the tensor; blocks may be divided, their parts keep name and type."""

    def rule(tensor: TensorInfo) -> int:
        return int(".mlp." in tensor.name) + int(".experts." in tensor.name)

    plan = plan_checkpoint(shaped(moe(), CAUSAL), PlanRequest(rule=rule))
    assert plan.num_parts == 3
    assert layers_of(plan, 2) == [("model.layers.0", "block"), ("model.layers.1", "block")]
    assert plan.as_json()["split_by"] == "rule"
    assert plan.partitions[0].layers[-1].alias == "lm_head.weight"


@pytest.mark.parametrize(
    ("tied", "head", "user", "stored"),
    [
        ("duplicate", 1, 1, True),
        ("reference", 1, 1, False),
        ("colocate", 1, 0, False),
        ("duplicate", None, 0, False),
        ("duplicate", 7, 0, False),
    ],
)
def test_a_rule_is_asked_about_the_tied_name(
    shaped: MakeShaped, tied: str, head: int | None, user: int, stored: bool
) -> None:
    """Where the head is used it has a copy or a reference; without an answer it stays with the weight."""

    def rule(tensor: TensorInfo) -> int | None:
        return head if tensor.name == "lm_head.weight" else int("layers" in tensor.name)

    plan = plan_checkpoint(shaped(moe(), CAUSAL), PlanRequest(rule=rule, tied=tied))  # type: ignore[arg-type]
    found = next(layer for layer in plan.partitions[user].layers if layer.alias)
    assert (found.tied_to, found.stored) == (0, stored)


RULES = """
default = 0
[[rule]]
match = "*.experts.[01].*"
partition = 1
[[rule]]
regex = 'layers\\.\\d+\\.mlp\\.'
partition = 2
"""


def test_rules_of_a_file(shaped: MakeShaped) -> None:
    """The first that matches wins; a pattern is over the whole name, a regular expression anywhere in it."""
    plan = plan_checkpoint(shaped(moe()), PlanRequest(rule=parse_rules(RULES, "r")))
    parts = held(plan)
    assert parts[1] == {f"model.layers.{k}.mlp.experts.{e}.up_proj.weight" for k in (0, 1) for e in (0, 1)}
    assert len(parts[2]) == 2 * (2 + 1 + 1)
    inner = parse_rules('[[rule]]\nmatch="experts"\npartition=0', "r")  # not the whole name
    with pytest.raises(PlanError, match="no partition for"):
        plan_checkpoint(shaped(moe()), PlanRequest(rule=inner))


def test_a_rule_must_not_part_companions(shaped: MakeShaped) -> None:
    """The error names the weight and its scales."""
    shapes = {"l.layers.0.up.qweight": (4, 4), "l.layers.0.up.scales": (4, 1), "l.layers.0.up.bias": (4,)}
    with pytest.raises(PlanError, match=r"up.scales.*belongs to 'l.layers.0.up.qweight'"):
        plan_checkpoint(shaped(shapes), PlanRequest(rule=lambda tensor: int("scales" in tensor.name)))
    plan_checkpoint(shaped(shapes), PlanRequest(rule=lambda tensor: int("bias" in tensor.name)))


@pytest.mark.parametrize("answer", [True, -1, 0.0, "0", 65_535, 10**30, [0]])
def test_an_answer_that_is_none(shaped: MakeShaped, answer: object) -> None:
    """It names the tensor, and shows what came without flooding the terminal."""
    rule: Rule = lambda _: answer  # type: ignore[assignment,return-value]  # noqa: E731
    with pytest.raises(PlanError, match="the rule's answer is no partition") as error:
        plan_checkpoint(shaped({"a.weight": (2,)}), PlanRequest(rule=rule))
    assert error.value.tensor == "a.weight"
    assert len(str(error.value)) < 300


#: A rules file, and words that its error must have.
BAD_RULES = {
    "not TOML": ("[[rule", ["not TOML"]),
    "deep": ("a = " + "[" * 5000, ["not TOML"]),
    "empty": ("", ["'rule'", "found none"]),
    "unknown key": ("defualt = 1", ["the file", "unknown field", "Did you mean default?"]),
    "one table": ("[rule]\nmatch='a'", ["'rule'", "a table of 1"]),
    "no tables": ("rule = [1]", ["'rule'", "a list of 1"]),
    "unknown field": ("[[rule]]\nmatch='a'\npart=1", ["rule 1", "unknown field", "Did you mean partition?"]),
    "second rule": ("[[rule]]\nmatch='a'\npartition=1\n[[rule]]\nmatch='a'", ["rule 2", "'partition'", "found none"]),
    "neither": ("[[rule]]\npartition=1", ["rule 1", "'match'", "either match or regex", "found none"]),
    "both": ("[[rule]]\nmatch='a'\nregex='a'\npartition=1", ["either match or regex", "both"]),
    "no text": ("[[rule]]\nmatch=3\npartition=1", ["'match'", "found 3"]),
    "empty text": ("[[rule]]\nregex=''\npartition=1", ["'regex'", "found ''"]),
    "long": (f"[[rule]]\nregex='{'a' * 1001}'\npartition=1", ["'regex'", "1000 characters"]),
    "bad regex": ("[[rule]]\nregex='('\npartition=1", ["rule 1", "'regex'", "no regular expression"]),
    "endless regex": ("[[rule]]\nregex='(a+)+$'\npartition=1", ["'regex'", "repeats"]),
    "huge repeat": ("[[rule]]\nregex='a{9999999999}'\npartition=1", ["'regex'", "no regular expression"]),
    "negative": ("[[rule]]\nmatch='a'\npartition=-1", ["'partition'", "found -1"]),
    "bool": ("[[rule]]\nmatch='a'\npartition=true", ["'partition'", "found True"]),
    "float": ("default = 1.5", ["the file", "'default'", "found 1.5"]),
    "too many": ("[[rule]]\nmatch='a'\npartition=0\n" * (MAX_RULES + 1), [f"at most {MAX_RULES}"]),
}


@pytest.mark.parametrize(("text", "words"), BAD_RULES.values(), ids=BAD_RULES)
def test_bad_rules(text: str, words: list[str]) -> None:
    """One error, which names the file, the rule and the field."""
    with pytest.raises(PlanError) as error:
        parse_rules(text, "my.toml")
    assert all(word in str(error.value) for word in ["my.toml", *words]), error.value
    assert len(str(error.value)) < 500


# -------------------------------------------------------------------------------------------- what is not possible

EXPERT = {"split_by": "expert"}
TWO = {**EXPERT, "num_parts": 2}
TYPE = {"split_by": "type"}


@pytest.mark.parametrize(
    ("shapes", "config", "request_", "match"),
    [
        (moe(), None, EXPERT, "into how many partitions is not said.*1 to 4 partitions of experts"),
        (moe(), None, {**EXPERT, "num_parts": 1}, "a trunk and experts are two"),
        (moe(), None, {**EXPERT, "num_parts": 6}, "6 is no possible number.*4 experts.*Possible are 2 to 5"),
        (
            moe(),
            None,
            {**EXPERT, "num_parts": 3, "weights": [1, 1, 1]},
            "behind the trunk.*expected 2 of them, found 3",
        ),
        (moe(), None, {**EXPERT, "weights": [0]}, "not a positive number"),
        (moe(), None, {**EXPERT, "boundaries": ["x"]}, "--boundaries and --split-by expert both say"),
        ({"a.weight": (2,)}, None, {**EXPERT, "num_parts": 2}, "no tensor is of a routed expert"),
        ({}, None, TYPE, "no tensors"),
        (
            moe(),
            None,
            {**TYPE, "num_parts": 2},
            "--num-parts .num_parts. says 2, there are 5 kinds: embedding, norm, attention, mlp",
        ),
        (moe(), None, {**TYPE, "weights": [1]}, "--weights have no meaning with --split-by type"),
        (moe(), None, {"split_by": "magic"}, "split_by cannot be 'magic'.*layer, type, expert"),
        (moe(), None, {**TYPE, "by": "magic"}, "by cannot be"),
        (moe(), None, {**TYPE, "tied": "magic"}, "tied cannot be"),
        (moe(), None, {**TYPE, "rule": lambda _: 0}, "--rule and --split-by .split_by. both"),
        (moe(), None, {"rule": lambda _: 0, "num_parts": 2}, "--num-parts .num_parts. says 2, the rule makes 1"),
        (moe(), None, {"rule": lambda _: 1}, "gives nothing to partition 0"),
        (moe(), None, {"rule": lambda _: None}, "no partition for 18 tensors: model.embed_tokens.weight, .*15 more"),
        ({"l.layers.0.experts.up": (4, 2, 2), "l.layers.0.experts.down": (3, 2, 2)}, None, TWO, "disagree.*4 by.*"),
        ({"l.layers.0.experts.up": (4, 2, 2), "l.layers.0.experts.b": (3, 2)}, None, TWO, "disagree.*dimension 3"),
        ({"l.layers.0.experts.0.up": (2, 2), "l.layers.0.experts.down": (3, 2, 2)}, None, TWO, "disagree"),
        ({"l.layers.0.experts.up": (8, 2)}, None, TWO, "cannot be told.*config.json has none"),
        ({"l.layers.0.experts.up": (8, 2)}, {"num_experts": 3}, TWO, "cannot be told.*has 3"),
        ({"l.layers.0.experts.up": (8, 2), "l.layers.0.experts.down": (2, 8)}, None, TWO, "disagree"),
        ({"l.layers.0.experts.up": (8, 4, 2)}, {"num_experts": 4}, TWO, "first dimension is not the number"),
        ({"l.layers.0.experts.up": (70_000, 1, 1)}, None, TWO, "too many experts"),
        ({"l.layers.0.experts.up": (4, 2, 2)}, None, TWO, "partition 0 would be empty"),
    ],
)
def test_impossible_plans(
    shaped: MakeShaped, shapes: Shapes, config: object, request_: dict[str, object], match: str
) -> None:
    """Each says what was found, and what is possible."""
    with pytest.raises(PlanError, match=match):
        plan_checkpoint(shaped(shapes, config), PlanRequest(**request_))  # type: ignore[arg-type]


def test_rows_that_are_no_whole_bytes(shaped: MakeShaped) -> None:
    """Four bits a number and an odd number of them in a row: no byte range is an expert's."""
    shapes = {"a.weight": (2,), "l.layers.0.mlp.experts.up": (4, 3, 1)}
    with pytest.raises(PlanError, match="no whole number of bytes") as error:
        plan_checkpoint(shaped(shapes, dtype="F4"), PlanRequest(split_by="expert", num_parts=3))
    assert error.value.tensor == "l.layers.0.mlp.experts.up"


# ----------------------------------------------------------------------------------------------------------- laws

_BLOCK_NAMES = [
    "self_attn.q_proj.weight",
    "input_layernorm.weight",
    "mlp.gate.weight",
    "mlp.up_proj.weight",
    "mlp.experts.0.up_proj.weight",
    "mlp.experts.1.up_proj.weight",
    "mlp.experts.2.up_proj.weight",
    "mlp.experts.down_proj",
    "mlp.experts.down_proj_bias",
    "odd",
]


@given(
    names=st.sets(st.tuples(st.integers(0, 3), st.sampled_from(_BLOCK_NAMES)), min_size=1, max_size=20),
    loose=st.sets(st.sampled_from(["model.embed_tokens.weight", "model.norm.weight", "lm_head.bias", "strange"])),
    how=st.sampled_from(["type", "expert", "rule"]),
    num_parts=st.integers(2, 4),
    tied=st.sampled_from(["duplicate", "reference", "colocate"]),
    answers=st.lists(st.integers(0, 2), min_size=7, max_size=7),
)
@settings(max_examples=150, deadline=None, database=None)
def test_every_row_has_one_place(
    tmp_path_factory: pytest.TempPathFactory,
    names: set[tuple[int, str]],
    loose: set[str],
    how: str,
    num_parts: int,
    tied: str,
    answers: list[int],
) -> None:
    """Whatever the cut: each byte once but for copies of tied weights, layer names unique, every use has its weight."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(sorted(loose), (8, 2))
    for layer, name in sorted(names):
        shape = {"mlp.experts.down_proj": (3, 4, 2), "mlp.experts.down_proj_bias": (3, 4)}.get(name, (2, 2))
        shapes[f"model.layers.{layer}.{name}"] = shape
    checkpoint = open_shapes(tmp_path_factory.mktemp("c"), shapes, {**CAUSAL, "num_experts": 3})
    order = {name: answers[k % 7] for k, name in enumerate(shapes)}
    request = {
        "type": PlanRequest(split_by="type", tied=tied),  # type: ignore[arg-type]
        "expert": PlanRequest(split_by="expert", num_parts=num_parts, tied=tied),  # type: ignore[arg-type]
        "rule": PlanRequest(rule=lambda tensor: order.get(tensor.name), tied=tied),  # type: ignore[arg-type]
    }[how]
    try:
        plan = plan_checkpoint(checkpoint, request)
    except PlanError as error:
        broken_law = "in two" in str(error) or "stored nowhere" in str(error) or "no place in the plan" in str(error)
        if how == "type" or broken_law:
            raise
        return
    ranges = sorted(
        (tensor.start_offset, tensor.stop_offset)
        for part in plan.partitions
        for layer in part.layers
        for tensor in layer.tensors
        if layer.alias is None
    )
    position = checkpoint.shards[0].size_bytes - checkpoint.total_bytes
    for start, stop in ranges:
        assert start == position
        position = stop
    assert position == checkpoint.shards[0].size_bytes
    for part in plan.partitions:
        found = [layer.name for layer in part.layers]
        assert found
        assert len(found) == len(set(found))
        for layer in part.layers:
            if layer.alias is not None:
                home = plan.partitions[layer.tied_to or 0]
                assert any(layer.tensors[0] in other.tensors for other in home.layers if other.alias is None)
