"""Files from spans of bytes and stored chunks: what is decoded in which order, and the threads that do it."""
