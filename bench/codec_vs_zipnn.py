"""How much smaller, how fast, from memory to memory?

mmsplit's codec against ZipNN, and against zstd level 1 and Blosc2, on the same bytes with the same number of threads.

    mmsplit   `ChunkEncoder` and `ChunkDecoder` on chunks of 4 MiB, one of each per thread, as the package uses them:
              encoding includes xxh3 of the raw and of the stored bytes, decoding that of the raw bytes
    ZipNN     `ZipNN(input_format="byte", bytearray_dtype=…, threads=…)`, as its README says; it regroups the bytes
              and the sign bit for the dtype by itself.  No checksums.
    zstd-1    python-zstandard, level 1, the same chunks and threads.  No checksums.
    Blosc2    zstd level 1 with shuffle on the dtype's item size, always split.  No checksums.

Counted: wall and CPU seconds of the call, in this process.  mmsplit encodes into memory that is there already (as
its split does) and decodes into fresh memory (as its load does); the others return fresh memory both ways.  Every
encoded form is decoded and compared with the original outside the clock.  ZipNN rearranges its input in place, so it
gets a fresh copy before each encoding, outside the clock.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

import harness
import inputs
import numpy as np
import xxhash
import zstandard
from harness import BenchError, Comparison, Result, Run, Side, Target, Work

_CHUNK_BYTES: Final = 4 << 20
_THREADS: Final = (1, 2)
#: Of each kind: four times the largest cache that is common, and the whole set takes minutes.
_FULL_BYTES: Final = 128 << 20
_SMALL_BYTES: Final = 32 << 20
#: ZipNN may be smaller by this share of its own size; nothing may be larger than raw by more than this.
_MAX_EXCESS: Final = 0.003
_MAX_ABOVE_RAW: Final = 0.001
#: How many times as fast as ZipNN at least.
_LEAST: Final = (("encode", 2.0), ("decode", 1.2))


class Sample(NamedTuple):
    """Bytes of one kind: safetensors' name of the dtype, and what ZipNN and Blosc2 are told."""

    name: str
    dtype: str
    zipnn_dtype: str
    item_bytes: int
    make: Callable[[Work, int], bytes]


class Codec(Protocol):
    """One side: `encode` keeps its result, `decode` returns the bytes of what was encoded last."""

    label: str

    def prepare(self) -> None: ...
    def encode(self) -> None: ...
    def decode(self) -> Any: ...
    def stored_bytes(self) -> int: ...
    def close(self) -> None: ...


# --- the sides -------------------------------------------------------------------------------------------------------


class MmsplitCodec:
    """Chunks on a pool of threads, each with an encoder and a decoder of its own."""

    label = "mmsplit"

    def __init__(self, data: bytes, sample: Sample, threads: int) -> None:
        from mmsplit.codec import ChunkDecoder, ChunkEncoder

        self._data = memoryview(data)
        self._dtype = sample.dtype
        self._starts = range(0, len(data), _CHUNK_BYTES)
        self._room = memoryview(np.ones(len(data), np.uint8))  # ones: pages that are there
        self._encoders = [ChunkEncoder("planes", _CHUNK_BYTES) for _ in range(threads)]
        self._decoders = [ChunkDecoder() for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)
        self._encoded: dict[int, Any] = {}
        self._checksums: dict[int, tuple[int, int]] = {}

    def prepare(self) -> None:
        """Nothing: what is encoded into is there already."""

    def encode(self) -> None:
        self._on_all_threads(self._encoders, self._encode_chunk)

    def decode(self) -> Any:
        out = memoryview(np.empty(len(self._data), np.uint8))
        self._on_all_threads(self._decoders, partial(self._decode_chunk, out))
        return out

    def stored_bytes(self) -> int:
        return sum(encoded.stored_bytes for encoded in self._encoded.values())

    def close(self) -> None:
        self._pool.shutdown()

    def _on_all_threads(self, workers: list[Any], work: Callable[[Any, int], None]) -> None:
        starts = iter(self._starts)  # next() of it is atomic

        def run(worker: Any) -> None:
            for start in starts:
                work(worker, start)

        for future in [self._pool.submit(run, worker) for worker in workers]:
            future.result()

    def _encode_chunk(self, encoder: Any, start: int) -> None:
        raw = self._data[start : start + _CHUNK_BYTES]
        room = self._room[start : start + _CHUNK_BYTES]
        raw_xxh3 = xxhash.xxh3_64_intdigest(raw)
        encoded = encoder.encode(raw, self._dtype, room)
        self._encoded[start] = encoded
        self._checksums[start] = (raw_xxh3, xxhash.xxh3_64_intdigest(room[: encoded.stored_bytes]))

    def _decode_chunk(self, out: memoryview, decoder: Any, start: int) -> None:
        encoded = self._encoded[start]
        target = out[start : start + _CHUNK_BYTES]
        decoder.decode(self._room[start : start + encoded.stored_bytes], encoded, target)
        if xxhash.xxh3_64_intdigest(target) != self._checksums[start][0]:
            raise BenchError("mmsplit decoded other bytes")


class ZipnnCodec:
    """ZipNN on the whole buffer."""

    label = "ZipNN"

    def __init__(self, data: bytes, sample: Sample, threads: int) -> None:
        import zipnn

        self._data = data
        self._make = partial(zipnn.ZipNN, input_format="byte", bytearray_dtype=sample.zipnn_dtype, threads=threads)
        self._input = b""
        self._encoded = b""

    def prepare(self) -> None:
        self._input = bytes(memoryview(self._data))  # bytes(bytes) would be the same object

    def encode(self) -> None:
        self._encoded = self._make().compress(self._input)

    def decode(self) -> Any:
        return self._make().decompress(self._encoded)

    def stored_bytes(self) -> int:
        return len(self._encoded)

    def close(self) -> None:
        self._input = self._encoded = b""


class _ChunkedCodec:
    """A codec that is called with one chunk after the other, on a pool of threads."""

    label = ""

    def __init__(self, data: bytes, threads: int) -> None:
        view = memoryview(data)
        self._chunks = [view[start : start + _CHUNK_BYTES] for start in range(0, len(data), _CHUNK_BYTES)]
        self._pool = ThreadPoolExecutor(threads)
        self._encoded: list[bytes] = []

    def prepare(self) -> None:
        self._encoded = []

    def encode(self) -> None:
        self._encoded = list(self._pool.map(self._encode_chunk, self._chunks))

    def decode(self) -> Any:
        out = memoryview(np.empty(sum(map(len, self._chunks)), np.uint8))

        def run(number: int) -> None:
            start = number * _CHUNK_BYTES
            self._decode_chunk(self._encoded[number], out[start : start + len(self._chunks[number])])

        list(self._pool.map(run, range(len(self._encoded))))
        return out

    def stored_bytes(self) -> int:
        return sum(map(len, self._encoded))

    def close(self) -> None:
        self._pool.shutdown()

    def _encode_chunk(self, raw: memoryview) -> bytes:
        raise NotImplementedError

    def _decode_chunk(self, encoded: bytes, out: memoryview) -> None:
        raise NotImplementedError


class ZstdCodec(_ChunkedCodec):
    """Plain zstd, level 1; one context of each kind per thread."""

    label = "zstd-1"

    def __init__(self, data: bytes, sample: Sample, threads: int) -> None:  # noqa: ARG002 - one signature for all
        super().__init__(data, threads)
        self._contexts = threading.local()

    def _encode_chunk(self, raw: memoryview) -> bytes:
        context = getattr(self._contexts, "encoder", None)
        if context is None:
            context = self._contexts.encoder = zstandard.ZstdCompressor(level=1)
        encoded: bytes = context.compress(raw)
        return encoded

    def _decode_chunk(self, encoded: bytes, out: memoryview) -> None:
        context = getattr(self._contexts, "decoder", None)
        if context is None:
            context = self._contexts.decoder = zstandard.ZstdDecompressor()
        with context.stream_reader(encoded) as reader:
            if reader.readinto(out) != len(out):
                raise BenchError("zstd decoded too little")


class BloscCodec(_ChunkedCodec):
    """Blosc2 with its own threads: zstd level 1, shuffled."""

    label = "Blosc2"

    def __init__(self, data: bytes, sample: Sample, threads: int) -> None:
        import blosc2

        super().__init__(data, 1)
        blosc2.set_nthreads(threads)
        self._parameters = {
            "codec": blosc2.Codec.ZSTD,
            "clevel": 1,
            "typesize": sample.item_bytes,
            "filters": [blosc2.Filter.SHUFFLE],
            "filters_meta": [0],
            "splitmode": blosc2.SplitMode.ALWAYS_SPLIT,
            "nthreads": threads,
        }

    def _encode_chunk(self, raw: memoryview) -> bytes:
        import blosc2

        encoded: bytes = blosc2.compress2(raw, **self._parameters)
        return encoded

    def _decode_chunk(self, encoded: bytes, out: memoryview) -> None:
        import blosc2

        blosc2.decompress2(encoded, dst=out, nthreads=self._parameters["nthreads"])


_PEERS: Final = {"ZipNN": ("zipnn", ZipnnCodec), "zstd-1": ("zstandard", ZstdCodec), "Blosc2": ("blosc2", BloscCodec)}


# --- the bytes -------------------------------------------------------------------------------------------------------


def _normal(count: int) -> Any:
    """Gaussian weights, standard deviation 0.02, the same at every call."""
    values = np.random.Generator(np.random.SFC64(1)).standard_normal(count, np.float32)
    values *= np.float32(0.02)
    return values


def _cast(name: str, item_bytes: int, _work: Work, size: int) -> bytes:
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, name, name))
    values = _normal(size // item_bytes)
    if item_bytes == 1:
        values *= np.float32(448 / np.abs(values).max())  # a quantiser uses the whole range of the dtype
    return values.astype(dtype).tobytes()


def _bf16_in_fp32(_work: Work, size: int) -> bytes:
    import ml_dtypes

    return _normal(size // 4).astype(ml_dtypes.bfloat16).astype(np.float32).tobytes()


def _int4(_work: Work, size: int) -> bytes:
    """Weights in groups of 128, each over the whole range of 4 bits, two to a byte."""
    groups = _normal(2 * size).reshape(-1, 128)
    low = groups.min(axis=1, keepdims=True)
    groups -= low
    groups *= 15 / groups.max(axis=1, keepdims=True)
    codes = np.rint(groups).astype(np.uint8).reshape(-1)
    return (codes[0::2] | codes[1::2] << 4).tobytes()


def _noise(_work: Work, size: int) -> bytes:
    return np.random.Generator(np.random.SFC64(2)).bytes(size)


def _model(work: Work, size: int) -> bytes:
    """The middle of the small synthetic checkpoint, at a multiple of 4 KiB."""
    shard = inputs.shard_of(inputs.llama(work.inputs, small=True))
    start = (shard.stat().st_size - size) // 2 // 4096 * 4096
    with shard.open("rb") as file:
        file.seek(start)
        return file.read(size)


_SAMPLES: Final = (
    Sample("BF16", "BF16", "bfloat16", 2, partial(_cast, "bfloat16", 2)),
    Sample("BF16 of the synthetic model", "BF16", "bfloat16", 2, _model),
    Sample("FP32", "F32", "float32", 4, partial(_cast, "float32", 4)),
    Sample("FP16", "F16", "float16", 2, partial(_cast, "float16", 2)),
    Sample("FP8 E4M3", "F8_E4M3", "float8_e4m3fn", 1, partial(_cast, "float8_e4m3fn", 1)),
    # ZipNN knows no integers; of its dtypes the one-byte float is the nearest.
    Sample("int4, packed", "U8", "float8_e4m3fn", 1, _int4),
    Sample("FP32 that holds BF16", "F32", "float32", 4, _bf16_in_fp32),
    Sample("noise", "U8", "float8_e4m3fn", 1, _noise),
)


# --- the comparison --------------------------------------------------------------------------------------------------


def bench(work: Work) -> Result:
    """Compare every peer on every kind of bytes with one and two threads."""
    size = _SMALL_BYTES if work.small else _FULL_BYTES
    work.need(inputs.llama_bytes(small=True))
    result = Result("codec_vs_zipnn", "How much smaller, how fast, from memory to memory?", f"{size >> 20} MiB each")
    result.notes += [
        "mmsplit's times include xxh3 checksums (raw and stored bytes when encoding, raw bytes when decoding);"
        " no peer's do.",
        "ZipNN rearranges its input in place (BF16, FP32); it is given a copy, outside the clock.",
        "ZipNN has no integer dtypes: packed int4 and noise are given to it as one-byte floats.",
    ]
    peers = _installed(result)
    sizes: dict[str, dict[str, float]] = {}
    for sample in _SAMPLES:
        data = sample.make(work, size)
        sizes[sample.name] = {}
        for threads in _THREADS:
            for peer in peers.values():
                result.comparisons += _compare(data, sample, threads, peer, work.pairs, sizes[sample.name])
        del data
        gc.collect()
    result.figures = {"stored_share_of_raw": sizes}
    result.targets = _targets(result.comparisons, sizes)
    return result


def _installed(result: Result) -> dict[str, type]:
    found: dict[str, type] = {}
    for label, (module, codec) in _PEERS.items():
        try:
            __import__(module)
        except ImportError as error:
            result.skip(label, f"cannot be imported: {error}")
        else:
            found[label] = codec
    return found


def _compare(
    data: bytes, sample: Sample, threads: int, peer: type, pairs: int, sizes: dict[str, float]
) -> list[Comparison]:
    """Encode with both in turn, then decode with both in turn."""
    codecs: list[Codec] = [MmsplitCodec(data, sample, threads), peer(data, sample, threads)]
    name = sample.name + _threads_suffix(threads)
    try:
        encoders = [_Encode(c, len(data)) for c in codecs]
        encode = [Side(e.codec.label, e.run, e.prepare, size=e.codec.stored_bytes) for e in encoders]
        encoded = harness.compare(f"encode {name}", len(data), encode[0], encode[1], pairs)
        decoders = [_Decode(c, data) for c in codecs]
        decode = [Side(d.codec.label, d.run, d.prepare, d.check) for d in decoders]
        decoded = harness.compare(f"decode {name}", len(data), decode[0], decode[1], pairs)
        for codec in codecs:
            sizes[codec.label] = round(codec.stored_bytes() / len(data), 5)
    finally:
        for codec in codecs:
            codec.close()
    return [encoded, decoded]


def _touch_memory(size: int) -> None:
    """Take memory and give it back, so that the next run finds it.

    A virtual machine may have returned free pages to its host: who takes them next waits ten times as long as for
    others, and that was always the side that ran first.
    """
    np.ones(size, np.uint8)


class _Encode:
    """Encodes under the clock, with input and memory made ready before it."""

    def __init__(self, codec: Codec, size: int) -> None:
        self.codec = codec
        self._size = size

    def prepare(self) -> None:
        self.codec.prepare()
        _touch_memory(self._size)

    def run(self) -> Run:
        return harness.run_call(self.codec.encode)


class _Decode:
    """Decodes under the clock, compares after it, and lets the memory go."""

    def __init__(self, codec: Codec, data: bytes) -> None:
        self.codec = codec
        self._original = np.frombuffer(data, np.uint8)
        self._decoded: Any = None

    def prepare(self) -> None:
        _touch_memory(len(self._original))

    def run(self) -> Run:
        return harness.run_call(self._decode)

    def check(self) -> None:
        decoded = np.frombuffer(self._decoded, np.uint8)
        # In pieces: the comparison of the whole would allocate as much again.
        pieces = (slice(start, start + _CHUNK_BYTES) for start in range(0, len(self._original), _CHUNK_BYTES))
        if len(decoded) != len(self._original) or not all(
            np.array_equal(decoded[piece], self._original[piece]) for piece in pieces
        ):
            raise BenchError(f"{self.codec.label} does not give the original back")
        self._decoded = None

    def _decode(self) -> None:
        self._decoded = self.codec.decode()


def _targets(comparisons: list[Comparison], sizes: dict[str, dict[str, float]]) -> list[Target]:
    targets = [_speed_target(comparisons, way, least, threads) for way, least in _LEAST for threads in _THREADS]
    targets += [_size_target(name, shares) for name, shares in sizes.items()]
    return [target for target in targets if target is not None]


def _speed_target(comparisons: list[Comparison], way: str, least: float, threads: int) -> Target | None:
    """One row for all kinds of numbers: that of BF16, and the range of all; noise is no number."""
    suffix = _threads_suffix(threads)
    ratios = {
        comparison.name.removeprefix(f"{way} ").removesuffix(suffix): comparison.ratio
        for comparison in comparisons
        if comparison.b.label == "ZipNN" and comparison.name.startswith(f"{way} ")
        if comparison.name.endswith(suffix)
    }
    ratios.pop("noise", None)
    if not ratios:
        return None
    worst, best = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    measured = f"BF16 {ratios['BF16']:.2f}x; {ratios[worst]:.2f}x ({worst}) to {ratios[best]:.2f}x ({best})"
    met = ratios[worst] >= least
    return Target(f"{way} from memory to memory{suffix}", "ZipNN", f"at least {least:g}x", measured, met)


def _threads_suffix(threads: int) -> str:
    return f", {threads} thread{'s' if threads > 1 else ''}"


def _size_target(name: str, shares: dict[str, float]) -> Target:
    mine, peer = shares["mmsplit"], shares.get("ZipNN")
    met = mine <= 1 + _MAX_ABOVE_RAW and (peer is None or mine <= peer * (1 + _MAX_EXCESS))
    against = f"ZipNN {peer:.4f}" if peer is not None else "raw"
    target = f"at most {100 * _MAX_EXCESS:g} % larger, {100 * _MAX_ABOVE_RAW:g} % above raw"
    if name == "BF16":
        met, target = mine <= 0.664, "at most 0.664"
    return Target(f"size, {name}", against, target, f"{mine:.4f}", met)


if __name__ == "__main__":
    harness.main(bench, harness.parser(__doc__).parse_args())
