"""Comparing the depth that config.json states with what the headers hold.  Headers win; it is a note."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

#: Keys that give a number of blocks.
_DEPTH_KEYS: Final = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
)

#: Keys that give how many blocks for multi-token prediction may follow those.
_EXTRA_KEYS: Final = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")

#: Sub-configs of the main stack: what they claim is asked of any stack, as if it stood at the top.
_MAIN_CONFIGS: Final = frozenset(
    {"text_config", "llm_config", "language_config", "thinker_config", "decoder", "decoder_config"}
)

#: Sub-configs of another modality, and the words that its stacks have in their names.  Nothing is asked when
#: the checkpoint has no such stack: a text-only checkpoint often keeps the config of the whole.
_OTHER_CONFIGS: Final = {
    "vision_config": re.compile(r"vision|visual|image|vit", re.ASCII),
    "audio_config": re.compile(r"audio|speech|sound", re.ASCII),
    "encoder": re.compile(r"encoder", re.ASCII),
}

#: Config files nest two or three deep; deeper is not meant for us.
_MAX_NESTING: Final = 4


class _Claim(NamedTuple):
    """A depth that config.json states: the path of its key, blocks, extra blocks, whose stacks."""

    key: str
    depth: int
    extra: int
    about: re.Pattern[str] | None


def depth_notes(config: Mapping[str, object], stacks: Mapping[str, int]) -> list[str]:
    """Return a sentence per stated depth that no stack has.

    `stacks` maps the path of a stack to its number of blocks.  A depth may be that of one stack, of the
    stacks of one network together (stages), or of all.
    """
    notes = []
    for claim in _claims(config, "", None, 0):
        held = {path: count for path, count in stacks.items() if claim.about is None or claim.about.search(path)}
        if held and not _depths(held) & {claim.depth, claim.depth + claim.extra}:
            counts = ", ".join(f"{path} {count}" for path, count in sorted(held.items())[:4])
            notes.append(f"config.json has {claim.key} = {claim.depth}, the headers hold {counts}: the headers count")
    return notes


def _depths(stacks: Mapping[str, int]) -> set[int]:
    """Return every block count that a depth in the config could mean."""
    networks: dict[str, int] = {}
    for path, count in stacks.items():
        for network in (re.split(r"\.[0-9]+\.", path, maxsplit=1)[0], path.rpartition(".")[0]):
            networks[network] = networks.get(network, 0) + count
    return {*stacks.values(), *networks.values(), sum(stacks.values())}


def _claims(config: Mapping[str, object], where: str, about: re.Pattern[str] | None, nesting: int) -> Iterator[_Claim]:
    extra = sum(_count(config, key) for key in _EXTRA_KEYS)
    for key in _DEPTH_KEYS:
        depth = _count(config, key)
        if depth:
            yield _Claim(where + key, depth, extra, about)
    if nesting == _MAX_NESTING:
        return
    for key in sorted(_MAIN_CONFIGS | _OTHER_CONFIGS.keys()):
        inner = config.get(key)
        if isinstance(inner, Mapping):
            yield from _claims(inner, f"{where}{key}.", _OTHER_CONFIGS.get(key, about), nesting + 1)


def _count(config: Mapping[str, object], key: str) -> int:
    """Return a positive integer of the config, 0 where there is none (True is not a number of layers)."""
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
