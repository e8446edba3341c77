"""What a split does: partitions on their way, the stream of slots, the digests of the shards."""

from mmsplit.splitting.split_run import SplitOptions, SplitResult, SplitRun

__all__ = ["SplitOptions", "SplitResult", "SplitRun"]
