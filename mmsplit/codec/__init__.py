"""Smaller, losslessly: chunk <-> encoded chunk.  Pure; releases the GIL."""

from mmsplit.codec.chunk_codec import (
    CODEC_NAMES,
    KNOWN_CODECS,
    RAW,
    ChunkDecoder,
    ChunkEncoder,
    CodecName,
    Encoded,
)
from mmsplit.codec.word import LAYOUTS

__all__ = [
    "CODEC_NAMES",
    "KNOWN_CODECS",
    "LAYOUTS",
    "RAW",
    "ChunkDecoder",
    "ChunkEncoder",
    "CodecName",
    "Encoded",
]
