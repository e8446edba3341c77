"""What a split does: equal tensors, partitions on their way, the stream of slots, the digests of the shards."""

from mmsplit.splitting.consumer import Announce, Consumer
from mmsplit.splitting.equal_tensors import fold, fold_equal_tensors
from mmsplit.splitting.split_result import SplitOptions, SplitResult
from mmsplit.splitting.split_run import SplitRun

__all__ = ["Announce", "Consumer", "SplitOptions", "SplitResult", "SplitRun", "fold", "fold_equal_tensors"]
