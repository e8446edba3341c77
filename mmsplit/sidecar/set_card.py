"""The page that tells people what a published partition set is, and how to use it.  Pure."""

from __future__ import annotations

from typing import Final

from mmsplit.remote.address import is_repo_id
from mmsplit.sidecar.set_manifest import SetManifest

#: By this line a later run knows that it may replace the page.
CARD_MARK: Final = "<!-- Written by mmsplit push. Remove this line to keep your own changes. -->"


def format_card(manifest: SetManifest, root_digest: str, place: str, *, is_readme: bool) -> bytes:
    """Return the page in Markdown; `place` is what `mmsplit pull` is given.

    As README of a repository it begins with the metadata that the Hub reads.
    """
    name = place.partition(":")[0].rpartition("/")[2]
    revision = f" at revision `{manifest.revision}`" if manifest.revision else ""
    count = len(manifest.partitions)
    ratio = 100 * manifest.stored_bytes / manifest.total_bytes if manifest.total_bytes else 100.0
    rows = [
        f"| {entry.part_id} | {entry.total_params:,} | {entry.total_bytes:,} | {entry.payload_bytes:,} |"
        for entry in manifest.partitions
    ]
    lines = [
        *(_metadata(manifest.model_id) if is_readme else ()),
        CARD_MARK,
        "",
        f"# {manifest.model_id} in {count} partition{'s' if count != 1 else ''}",
        "",
        f"`{manifest.model_id}`{revision}, split by layer with mmsplit. The partitions hold exactly the bytes of the"
        f" original weights, losslessly encoded ({ratio:.1f} % of their size), and merge back into the original files"
        " bit for bit. Licence and use are those of the original model.",
        "",
        "| partition | parameters | bytes in memory | bytes to download |",
        "|---:|---:|---:|---:|",
        *rows,
        "",
        "Get one partition, verified on arrival; interrupted, the same command goes on:",
        "",
        "```console",
        f"$ mmsplit pull {place} --only 0 -o {name} --root {root_digest}",
        "```",
        "",
        "Get all, check every byte, and merge them into the original checkpoint:",
        "",
        "```console",
        f"$ mmsplit pull {place} -o {name} --root {root_digest}",
        f"$ mmsplit verify {name} --level full",
        f"$ mmsplit merge {name} -o {name}-merged",
        "```",
        "",
        f"Root digest of this set: `{root_digest}`. It stands for every file of it: `--root` refuses any other set.",
        "",
    ]
    return "\n".join(lines).encode()


def _metadata(model_id: str) -> list[str]:
    base = [f"base_model: {model_id}"] if is_repo_id(model_id) else []
    return ["---", "library_name: mmsplit", *base, "tags:", "- mmsplit", "- partitioned", "---", ""]
