"""The nodes file: what it may say, and one clear error for everything else."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsplit.errors import PlanError
from mmsplit.planning.nodes import MAX_NODES, Node, NodeList, binary_size, parse_nodes, parse_reserve

GIB = 1 << 30


def test_all_fields() -> None:
    """Binary and decimal units, numbers as they are written, the node's own reserve before the file's."""
    text = """
    order = "any"
    reserve = 0.25
    [[node]]
    name = "desk"
    memory = "24 GiB"
    disk = "100 GB"
    speed = 0.3
    share = 2
    [[node]]
    name = "lap"
    memory = 17179869184
    reserve = "1.5GiB"
    """
    desk = Node("desk", 24 * GIB, 6 * GIB, 100 * 10**9, Fraction(3, 10), Fraction(2))
    lap = Node("lap", 16 * GIB, 3 * GIB // 2)
    assert parse_nodes(text, "nodes.toml") == NodeList((desk, lap), "any")
    assert lap.usable_bytes == 29 * GIB // 2


def test_what_is_not_said() -> None:
    """Order as in the file, a tenth in reserve; the caller's reserve replaces the file's default only."""
    text = '[[node]]\nname="a"\nmemory=1000\n[[node]]\nname="b"\nmemory=1000\nreserve=0'
    assert [node.reserve_bytes for node in parse_nodes(text, "f").nodes] == [100, 0]
    assert [node.reserve_bytes for node in parse_nodes(text, "f", 0.5).nodes] == [500, 0]
    assert [node.reserve_bytes for node in parse_nodes(text, "f", "7 B").nodes] == [7, 0]
    assert parse_nodes(text, "f").order == "file"
    assert (parse_reserve("0.2"), parse_reserve("2 GiB"), parse_reserve("nan")) == (0.2, "2 GiB", "nan")


def node(**fields: str) -> str:
    """A nodes file of one node, fields as TOML text."""
    lines = {"name": '"a"', "memory": '"8 GiB"'} | fields
    return "[[node]]\n" + "\n".join(f"{key} = {value}" for key, value in lines.items() if value)


#: Text, and words that its error must have: who, which field, what was found.
BAD = {
    "not TOML": ("[[node", ["not TOML"]),
    "deep": ("a = " + "[" * 5000, ["not TOML"]),
    "no node": ("", ["the file", "'node'", "found none"]),
    "one table": ('[node]\nname = "a"\nmemory = 1', ["'node'", "a table of 2"]),
    "list of numbers": ("node = [1, 2]", ["'node'", "a list of 2"]),
    "empty list": ("node = []", ["'node'", "a list of 0"]),
    "unknown in file": (f"orders = 1\n{node()}", ["the file has an unknown field", "'orders'", "Did you mean order?"]),
    "unknown in node": (node(memmory="1"), ["node 'a' has an unknown field", "'memmory'", "Did you mean memory?"]),
    "order": (f'order = "best"\n{node()}', ["'order'", "'best'"]),
    "order of no kind": (f"order = []\n{node()}", ["'order'", "a list of 0"]),
    "no name": (node(name=""), ["node 1", "'name'", "found none"]),
    "name a number": (node(name="5"), ["node 1", "'name'", "found 5"]),
    "name of blanks": (node(name='"  "'), ["node 1", "'name'"]),
    "name that clears the screen": (node(name='"\\u001b[2J"'), ["node 1", "'name'"]),
    "long name": (node(name=f'"{"x" * 5000}"'), ["node 1", "'name'", "…"]),
    "same name": (f"{node()}\n{node()}", ["node 'a'", "'name'", "a name of its own"]),
    "no memory": (node(memory=""), ["node 'a'", "'memory'", "found none"]),
    "memory zero": (node(memory="0"), ["'memory'", "found 0"]),
    "memory below zero": (node(memory="-1"), ["'memory'", "found -1"]),
    "memory true": (node(memory="true"), ["'memory'", "found True"]),
    "memory a float": (node(memory="8.0"), ["'memory'", "found 8.0"]),
    "memory without unit": (node(memory='"24"'), ["'memory'", "found '24'"]),
    "half a unit": (node(memory='"24 G"'), ["'memory'", "found '24 G'"]),
    "other digits": (node(memory='"\uff12\uff14 GiB"'), ["'memory'"]),
    "too much": (node(memory='"9999999999 PiB"'), ["'memory'", "up to 1024 PiB"]),
    "long integer": (node(memory="1" + "0" * 4000), ["'memory'", "more than 20 digits"]),
    "longer integer": (node(memory="1" + "0" * 5000), ["not TOML"]),
    "disk": (node(disk='"much"'), ["node 'a'", "'disk'", "found 'much'"]),
    "speed zero": (node(speed="0"), ["'speed'", "found 0"]),
    "speed nan": (node(speed="nan"), ["'speed'", "found nan"]),
    "speed inf": (node(speed="inf"), ["'speed'", "found inf"]),
    "speed text": (node(speed='"fast"'), ["'speed'", "found 'fast'"]),
    "speed a date": (node(speed="2024-01-01"), ["'speed'"]),
    "share below zero": (node(share="-1"), ["'share'", "found -1"]),
    "reserve all": (node(reserve="1"), ["'reserve'", "found 1"]),
    "reserve nan": (node(reserve="nan"), ["'reserve'", "found nan"]),
    "reserve below zero": (node(reserve="-0.1"), ["'reserve'", "found -0.1"]),
    "reserve as large as the memory": (node(reserve='"8 GiB"'), ["'reserve'", "found '8 GiB'"]),
    "reserve of the file": (f"reserve = 2\n{node()}", ["node 'a'", "'reserve'", "found 2"]),
    "too many": (
        "\n".join(node(name=f'"{i}"') for i in range(MAX_NODES + 1)),
        ["'node'", f"at most {MAX_NODES}", "found 1025"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_have_one_clear_error(case: str) -> None:
    """It names the file, the node, the field, what was expected and what was found, in a line or two."""
    text, words = BAD[case]
    with pytest.raises(PlanError) as caught:
        parse_nodes(text, "nodes.toml")
    message = str(caught.value)
    assert message.startswith("nodes.toml: ")
    assert [word for word in words if word not in message] == []
    assert caught.value.hint
    assert len(message) < 500
    assert message.isprintable()


@given(st.text(max_size=40) | st.from_regex(r"\[\[node\]\]\nname='a'\nmemory=[0-9a-zA-Z.'\[\{ -]{0,20}\n?"))
@settings(max_examples=300, deadline=None, database=None)
def test_any_text_is_nodes_or_an_error(text: str) -> None:
    """Nothing else is ever raised."""
    try:
        nodes = parse_nodes(text, "nodes.toml").nodes
    except PlanError:
        return
    assert all(0 <= node.usable_bytes <= node.memory_bytes for node in nodes)


@pytest.mark.parametrize(
    ("count_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1024**2 - 1, "1.00 MiB"),
        (GIB * 132 // 10, "13.2 GiB"),
        (GIB * 643, "643 GiB"),
        (1 << 60, "1024 PiB"),
    ],
)
def test_sizes_as_memory_is_sold(count_bytes: int, text: str) -> None:
    """Three digits and a binary unit."""
    assert binary_size(count_bytes) == text
