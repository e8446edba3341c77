"""Partitions back to shards: what is decoded in which order, and the threads that do it."""
