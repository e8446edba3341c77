"""Smaller, losslessly: chunk <-> encoded chunk.  Pure; releases the GIL."""

from mmsplit.codec.chunk_codec import (
    CODEC_NAMES,
    ENCODER,
    KNOWN_CODECS,
    PLANES,
    RAW,
    ZSTD,
    ChunkDecoder,
    ChunkEncoder,
    CodecName,
    Encoded,
)
from mmsplit.codec.extent import planes_end, zstd_end
from mmsplit.codec.word import LAYOUTS, layout_for

__all__ = [
    "CODEC_NAMES",
    "ENCODER",
    "KNOWN_CODECS",
    "LAYOUTS",
    "PLANES",
    "RAW",
    "ZSTD",
    "ChunkDecoder",
    "ChunkEncoder",
    "CodecName",
    "Encoded",
    "layout_for",
    "planes_end",
    "zstd_end",
]
