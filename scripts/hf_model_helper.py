#!/usr/bin/env python3
"""Download a model of the Hub and split it, in one go.

    python scripts/hf_model_helper.py --model-id meta-llama/Llama-3.2-1B --cache-dir ./models --num-parts 2

leaves `models/meta-llama/Llama-3.2-1B/` with config, tokenizer, `partition_0.json`, `partition_0.bin`, … and
`partition_set.json`.  The model is split while it is downloaded, so that its shards need no space; with --keep-source
they are downloaded to the Hub cache and stay there.  Stopped in whatever way, the same command goes on.

mmsplit must be installed: pip install .
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmsplit import HubModel, MmsplitError, Plan, SplitResult
from mmsplit.cli.progress import ProgressDisplay
from mmsplit.cli.render import clean, contents, count, percent, size, table

INTERRUPTED = 130


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-id", required=True, metavar="ORG/NAME", help="the model on the Hub")
    parser.add_argument("--cache-dir", type=Path, default=Path("models"), help="where to put it (default ./models)")
    parser.add_argument("--num-parts", "-n", type=int, default=2, help="partitions (default 2)")
    parser.add_argument("--revision", help="branch, tag or commit (default main)")
    parser.add_argument("--token", help="access token; better put into HF_TOKEN, where no process list shows it")
    parser.add_argument("--keep-source", action="store_true", help="keep the shards in the Hub cache")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    try:
        run(options)
    except KeyboardInterrupt:
        print("interrupted. The same command goes on.", file=sys.stderr)
        return INTERRUPTED
    except MmsplitError as error:
        print(clean(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    return 0


def run(options: argparse.Namespace) -> None:
    model = HubModel(options.model_id, options.revision, token=options.token)
    print(f"{clean(model.repo_id)}, commit {model.commit}")
    show_plan(model.plan(options.num_parts))
    with ProgressDisplay(quiet=False) as progress:
        result = model.split(
            options.cache_dir / model.repo_id,
            options.num_parts,
            existing="resume",
            keep_source=options.keep_source,
            progress=progress,
        )
    show_result(result)


def show_plan(plan: Plan) -> None:
    """Print the statistics of the partitions that are going to be."""
    rows = [
        (
            str(part.part_id),
            contents(part),
            str(len(part.layers)),
            count(part.total_params),
            size(part.total_bytes),
        )
        for part in plan.partitions
    ]
    heads = ("partition", "layers", "count", "parameters", "size")
    print(table(heads, rows, (True, False, True, True, True)), flush=True)
    for note in plan.notes:
        print(f"note: {clean(note)}", file=sys.stderr)


def moved(result: SplitResult) -> str:
    """Say where the weights came from."""
    if result.moved_bytes is None:
        return "read from the Hub cache"
    return f"{size(result.moved_bytes)} moved over the network"


def show_result(result: SplitResult) -> None:
    """Print what was done, and what each partition takes on disk."""
    path = clean(str(result.path))
    if result.already_finished:
        print(f"\n{path} holds all of it already; nothing to do")
    else:
        there = f"{size(result.resumed_bytes)} were there already, " if result.resumed_bytes else ""
        print(f"\n{path}: {there}{moved(result)}")
    rows = [
        (
            entry.payload_file,
            size(entry.total_bytes),
            size(entry.stored_bytes),
            percent(entry.stored_bytes, entry.total_bytes),
        )
        for entry in result.partitions
    ]
    print(table(("file", "raw", "stored", "ratio"), rows, (False, True, True, True)))
    print(f"\nroot digest {result.root_digest}")


if __name__ == "__main__":
    sys.exit(main())
