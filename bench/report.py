"""Write the figures of results/*.json into README.md, between its markers.

python bench/report.py            write
python bench/report.py --check    only say whether the README has the figures of the results
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import harness
import run_all

_README: Final = harness.BENCH / "README.md"
_MARKERS: Final = ("<!-- figures: written by report.py -->", "<!-- end of figures -->")
#: Others may keep this much of the processors busy without showing in the figures.
_QUIET_CORES: Final = 0.1
_FEWEST_PAIRS: Final = 5
_CODEC: Final = "codec_vs_zipnn"
_CODEC_COLUMNS: Final = ("encode, 1 thread", "encode, 2 threads", "decode, 1 thread", "decode, 2 threads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if figures are out of date")
    check = parser.parse_args().check
    old = _README.read_text()
    if any(old.count(marker) != 1 for marker in _MARKERS):
        sys.exit(f"bench: {_README.name} must have each of the markers once: {', '.join(_MARKERS)}")
    before, _, rest = old.partition(_MARKERS[0])
    _, _, after = rest.partition(_MARKERS[1])
    new = f"{before}{_MARKERS[0]}\n\n{_figures(read_results())}\n{_MARKERS[1]}{after}"
    if check and new != old:
        sys.exit("bench: README.md does not have the figures of results/; run python bench/report.py")
    if not check:
        _README.write_text(new)


def read_results() -> dict[str, dict[str, Any]]:
    """Return the results that are there, in the order of `run_all`."""
    paths = {name: harness.RESULTS / f"{name}.json" for name in run_all.NAMES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def _figures(results: dict[str, dict[str, Any]]) -> str:
    missing = [name for name in run_all.NAMES if name not in results]
    lines = [*_warnings(results), *_targets(results)]
    if missing:
        lines += ["", f"Not measured: {', '.join(missing)}."]
    if _CODEC in results:
        lines += ["", "### Codec against ZipNN, by kind of number", "", *_codec_table(results[_CODEC])]
    lines += ["", "### Where a peer wins", "", *_losses(results)]
    lines += ["", "### What was measured", "", *_inputs(results)]
    lines += ["", "### On what", "", *_machines(results)]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _targets(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    rows = [
        (target["what"], target["against"], target["target"], target["measured"], _verdict(target))
        for result in results.values()
        for target in result["targets"]
    ]
    return _table(("what", "against", "target", "measured", "met"), rows)


def _warnings(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Say which figures are not worth much, and why."""
    trials = [name for name, result in results.items() if result["trial"]]
    busy = [name for name, result in results.items() if result["machine"].get("busy_cores_before", 1) > _QUIET_CORES]
    few = [name for name, result in results.items() if result["pairs"] < _FEWEST_PAIRS]
    for names, why in (
        (trials, "made with --small: a trial, not figures"),
        (busy, "the machine was at other work when it began"),
        (few, f"fewer than {_FEWEST_PAIRS} pairs"),
    ):
        if names:
            yield f"> **Not to be relied on**, {why}: {', '.join(names)}."
            yield ""


def _verdict(target: dict[str, Any]) -> str:
    if target["target"] == "—":
        return ""
    return "yes" if target["met"] else "**no**"


def _codec_table(result: dict[str, Any]) -> Iterator[str]:
    by_name = {item["name"]: item for item in result["comparisons"] if item["b"]["label"] == "ZipNN"}
    rows = []
    for kind, sizes in result["figures"]["stored_share_of_raw"].items():
        cells = []
        for column in _CODEC_COLUMNS:
            way, _, threads = column.partition(", ")
            item = by_name.get(f"{way} {kind}, {threads}")
            cells.append("—" if item is None else f"{_ratio(item):.2f}x, {_speed(item):.2f} GB/s")
        rows.append(
            (kind, *(f"{sizes[label]:.4f}" if label in sizes else "—" for label in ("mmsplit", "ZipNN")), *cells)
        )
    return _table(("kind", "mmsplit's size", "ZipNN's size", *_CODEC_COLUMNS), rows)


def _losses(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Every comparison, and every size, in which the peer did better."""
    lines = []
    for name, result in results.items():
        for item in result["comparisons"]:
            if item["moved_bytes"] and _ratio(item) < 1:
                peer = item["b"]["label"]
                times = 1 / _ratio(item)
                lines.append(f"- {item['name'].replace(f' against {peer}', '')}: {peer} is {times:.2f}x as fast")
        if name == _CODEC:
            for kind, sizes in result["figures"]["stored_share_of_raw"].items():
                lines += [
                    f"- size, {kind}: {peer} {share:.4f}, mmsplit {sizes['mmsplit']:.4f}"
                    for peer, share in sizes.items()
                    if share < sizes["mmsplit"]
                ]
    yield from lines or ["Nowhere in these runs."]


def _inputs(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, result in results.items():
        yield f"- [`{name}.py`]({name}.py), {result['pairs']} pairs: {result['input']}."
        for note in result["notes"]:
            yield f"  - {note}"
        for peer, why in result["skipped"].items():
            yield f"  - Skipped: {peer}: {why}."


def _machines(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    for machine, names in _grouped(results, _machine):
        yield f"- {machine} ({', '.join(names)})"
    for versions, names in _grouped(results, _versions):
        yield f"- {versions} ({', '.join(names)})"


def _grouped(results: dict[str, dict[str, Any]], key: Any) -> Iterator[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for name, result in results.items():
        groups.setdefault(key(result), []).append(name)
    for text, names in groups.items():
        yield text, (names if len(names) < len(results) else ["all"])


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    memory = machine["memory_bytes"] / (1 << 30)
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {memory:.0f} GiB, Linux {machine['kernel']},"
        f" {machine['file_system']}, {result['date']}"
    )


def _versions(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def _ratio(item: dict[str, Any]) -> float:
    ratio: float = item["speed_of_a_relative_to_b"]["median"]
    return ratio


def _speed(item: dict[str, Any]) -> float:
    speed: float = item["moved_bytes"] / item["a"]["seconds"]["median"] / 1e9
    return speed


if __name__ == "__main__":
    main()
