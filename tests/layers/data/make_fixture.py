#!/usr/bin/env python3
"""Make corpus.json.gz, the compact form of a corpus of real architectures that the score test reads.

    make_fixture.py CORPUS_DIR

Of every entry only what the test asks for is kept: tensor names, the true block of each, block names, the
order in which blocks ran, and the depths in the config.  Names are front-coded ("17 bias": the first 17
characters of the name before, then "bias"), blocks are run lengths.  The same corpus gives the same bytes.
"""

from __future__ import annotations

import gzip
import json
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from itertools import groupby, takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent


def load_checker() -> ModuleType:
    """Import scripts/check_layers, which has no suffix."""
    path = HERE.parents[2] / "scripts" / "check_layers"
    spec = spec_from_loader("check_layers", SourceFileLoader("check_layers", str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def front_code(names: list[str]) -> list[str]:
    """Replace what a name shares with the one before by its length."""
    coded = []
    before = ""
    for name in names:
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, name, strict=False)))
        coded.append(f"{shared} {name[shared:]}")
        before = name
    return coded


def depths_of(config: dict[str, Any]) -> dict[str, Any]:
    """Keep the integers of a config that speak of layers, and the sub-configs that have some."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            inner = depths_of(value)
            if inner:
                kept[key] = inner
        elif isinstance(value, int) and "layer" in key:
            kept[key] = value
    return kept


def main(corpus: Path) -> None:
    """Write the fixture beside this file."""
    checker = load_checker()
    entries = []
    for path in sorted(corpus.rglob("*.json.gz")):
        entry = checker.read_entry(path, "disk", "no_split")
        entries.append(
            {
                "name": entry.name,
                "folder": path.parent.name,
                "config": depths_of(entry.config),
                "names": front_code(list(entry.block_of)),
                "blocks": [[block, len(list(run))] for block, run in groupby(entry.block_of.values())],
                "block_names": front_code(entry.block_names),
                "calls": entry.calls,
            }
        )
    raw = json.dumps(entries, separators=(",", ":")).encode()
    (HERE / "corpus.json.gz").write_bytes(gzip.compress(raw, 9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
