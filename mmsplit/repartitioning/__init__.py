"""A partition set as a source: its encoded chunks as they are, and the checkpoint that it stands for."""

from mmsplit.repartitioning.set_chunks import StoredSource
from mmsplit.repartitioning.set_storage import SetStorage, read_set_checkpoint
from mmsplit.repartitioning.stored_set import StoredSet, open_stored_set

__all__ = ["SetStorage", "StoredSet", "StoredSource", "open_stored_set", "read_set_checkpoint"]
