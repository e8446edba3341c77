"""What a split does: equal tensors, partitions on their way, the stream of slots, the digests of the shards."""

from mmsplit.splitting.equal_tensors import fold_equal_tensors
from mmsplit.splitting.split_run import SplitOptions, SplitResult, SplitRun

__all__ = ["SplitOptions", "SplitResult", "SplitRun", "fold_equal_tensors"]
