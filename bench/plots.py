"""Draw results/*.json as plots/*.svg: one plot of the split, one of the codec.

The same results give the same bytes.  Colours and a transparent ground are chosen to be read on light and dark pages.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

import harness
import report

PLOTS: Final = harness.BENCH / "plots"
_INK: Final = "#7d858e"  # has about the same contrast to white and to a dark page
_OURS: Final = "#2f81f7"
_PEER: Final = "#8b949e"
_COLOURS: Final = {"mmsplit": _OURS, "ZipNN": "#d9822b", "zstd-1": "#2da44e", "Blosc2": "#a371f7"}
_STYLE: Final = {
    "svg.hashsalt": "mmsplit",
    "svg.fonttype": "path",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        import matplotlib as mpl
    except ImportError:
        sys.exit("bench: matplotlib is not installed: pip install -r bench/requirements.txt")
    mpl.use("svg")
    mpl.rcParams.update(_STYLE)
    results = report.read_results()
    PLOTS.mkdir(exist_ok=True)
    for name, result, draw in (
        ("split", "split_vs_copy", _draw_split),
        ("codec", "codec_vs_zipnn", _draw_codec),
    ):
        if result in results:
            _save(draw(results[result]), PLOTS / f"{name}.svg")
        else:
            print(f"no results/{result}.json: {name}.svg is not drawn")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    print(f"plots/{path.name}")


def _draw_split(result: dict[str, Any]) -> Any:
    """Two rows of bars: speed with its range, and the size of what was stored."""
    import matplotlib.pyplot as plt

    sides: dict[str, dict[str, Any]] = {}
    for item in result["comparisons"]:
        for side in (item["a"], item["b"]):
            sides.setdefault(side["label"], side)
    moved = result["comparisons"][0]["moved_bytes"]
    ordered = sorted(sides.values(), key=lambda side: (not side["label"].startswith("mmsplit"), side["label"]))[::-1]
    labels = [side["label"] for side in ordered]
    colours = [_OURS if label.startswith("mmsplit") else _PEER for label in labels]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True, width_ratios=(3, 2))
    speeds = [moved / side["seconds"]["median"] / 1e9 for side in ordered]
    slow = [speed - moved / side["seconds"]["max"] / 1e9 for speed, side in zip(speeds, ordered, strict=True)]
    fast = [moved / side["seconds"]["min"] / 1e9 - speed for speed, side in zip(speeds, ordered, strict=True)]
    left.barh(labels, speeds, color=colours, xerr=[slow, fast], ecolor=_INK, capsize=2, height=0.62)
    left.set_title("GB of checkpoint per second, durable", loc="left")
    sizes = [side["stored_bytes"] / moved for side in ordered]
    bars = right.barh(labels, sizes, color=colours, height=0.62)
    right.bar_label(bars, [f" {100 * size:.0f} %" for size in sizes], color=_INK)
    right.set_xlim(0, 1.2 * max(sizes))
    right.set_xticks([])
    right.spines["bottom"].set_visible(False)
    right.set_title("stored, of the checkpoint's size", loc="left")
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
    figure.tight_layout()
    return figure


def _draw_codec(result: dict[str, Any]) -> Any:
    """Encoding and decoding BF16: size against speed; a hollow mark is one thread, a full one two."""
    import matplotlib.pyplot as plt

    sizes = result["figures"]["stored_share_of_raw"]["BF16"]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.0), sharey=True)
    for axes, way in zip(panels, ("encode", "decode"), strict=True):
        for label, speeds in _bf16_speeds(result, way).items():
            colour = _COLOURS[label]
            share = [sizes[label]] * len(speeds)
            axes.plot(speeds, share, color=colour, linewidth=1)
            axes.plot(speeds[:1], share[:1], "o", color=colour, markerfacecolor="none", markersize=7)
            axes.plot(speeds[1:], share[1:], "o", color=colour, markersize=7, label=label)
        axes.set_title(f"{way} BF16", loc="left")
        axes.set_xlabel("GB/s; hollow: 1 thread, full: 2 threads")
        axes.set_xlim(left=0)
    panels[0].set_ylabel("size, of raw (lower is smaller)")
    panels[1].legend(loc="best", labelcolor=_INK)
    figure.tight_layout()
    return figure


def _bf16_speeds(result: dict[str, Any], way: str) -> dict[str, list[float]]:
    """Speed in GB/s of each codec, by number of threads."""
    speeds: dict[str, list[float]] = {}
    for threads in ("1 thread", "2 threads"):
        seen = {}
        for item in result["comparisons"]:
            if item["name"] == f"{way} BF16, {threads}":
                for side in (item["a"], item["b"]):
                    seen.setdefault(side["label"], item["moved_bytes"] / side["seconds"]["median"] / 1e9)
        for label, speed in seen.items():
            speeds.setdefault(label, []).append(speed)
    return speeds


if __name__ == "__main__":
    main()
