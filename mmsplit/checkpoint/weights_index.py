"""`*.safetensors.index.json`, `*.bin.index.json`: which tensor is in which shard.  Pure: bytes in, a weight map out."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Final, NoReturn

from mmsplit.errors import CheckpointError

#: What is a device on Windows, in every folder and with every ending.
_DEVICE: Final = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$) *(\.|$)", re.IGNORECASE)


def parse_weights_index(data: bytes, path: str, suffixes: Sequence[str]) -> dict[str, str]:
    """Return `weight_map`: tensor name -> shard file name, checked to be plain names of one directory.

    The names of shards must end in one of `suffixes`.  One with a separator, `..` or a drive could reach outside the
    checkpoint, so it is refused.
    """

    def fail(what: str, tensor: str | None = None, found: object = None) -> NoReturn:
        raise CheckpointError(what, path=path, tensor=tensor, found=found) from None

    try:
        # Strictly UTF-8: json.loads would also take UTF-16 and 32, which other readers do not.
        index = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        fail(f"weights index is not JSON: {error}")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        fail("weights index has no weight_map")
    checked: set[str] = set()
    for tensor, shard in weight_map.items():
        if type(shard) is not str:
            fail("weight_map does not name a shard", tensor, repr(shard)[:80])
        if shard not in checked:
            if not is_plain_name(shard):
                fail("weight_map names a shard that is not a plain file name", tensor, repr(shard[:80]))
            if not shard.endswith(tuple(suffixes)):
                # Any other file could be taken for a small file of the model, too, and have two fates.
                fail(f"weight_map names a shard that is not a {' or '.join(suffixes)} file", tensor, repr(shard[:80]))
            checked.add(shard)
    return weight_map


def folded_name(name: str) -> str:
    """Return what is the same for names that some file system takes for one: letter case and Unicode form are gone."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def is_plain_name(name: str) -> bool:
    """Whether `name` can only mean a file right inside the directory it is looked up in, whatever the system.

    Windows takes "x." and "x " for "x", and "nul.txt" for a device.
    """
    return (
        not name.endswith((".", " "))
        and name != ""
        and not any(char in "/\\:\0" or not char.isprintable() for char in name)
        and not _DEVICE.match(name)
    )
