"""Whether a source is still the one that an unfinished split read, by what its state recorded of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from mmsplit.checkpoint import Checkpoint
from mmsplit.errors import SourceChangedError
from mmsplit.sidecar.set_manifest import FileEntry


def require_same_shards(
    checkpoint: Checkpoint, state: Mapping[str, object], is_same_by_digest: Callable[[str], bool]
) -> None:
    """Raise `SourceChangedError` unless each shard is the very file, or one that the Hub publishes as the same.

    `is_same_by_digest` is asked about a shard that is neither.
    """
    fingerprints, published = state.get("fingerprints"), state.get("published")
    for shard in checkpoint.shards:
        before = fingerprints.get(shard.name) if isinstance(fingerprints, dict) else None
        digest = published.get(shard.name) if isinstance(published, dict) else None
        same_content = digest is not None and digest == checkpoint.published_sha256(shard.name)
        if before != list(shard.identity) and not same_content and not is_same_by_digest(shard.name):
            raise SourceChangedError(
                "shard is not the one the unfinished split read: it was changed, copied or moved since",
                path=shard.location,
                expected=f"size, time, inode, device {before}",
                found=f"{list(shard.identity)}",
                hint="What is finished cannot be trusted to be of this file; use --force to start again.",
            )


def require_same_small_files(
    checkpoint: Checkpoint, files: Sequence[FileEntry], recorded: Mapping[str, Collection[str]]
) -> None:
    """Raise `SourceChangedError` for a file of the model that has none of the SHA-256 that are recorded of it."""
    for entry in files:
        if entry.sha256 not in recorded.get(entry.name, (entry.sha256,)):
            raise SourceChangedError(
                "file of the model is not the one the unfinished split copied",
                path=checkpoint.location_of(entry.name),
                hint="Bring it back, or use --force to start again.",
            )
