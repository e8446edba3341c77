"""Tensors out of partitions as numpy arrays: bytes become arrays, a partition and a set are mappings of them."""
