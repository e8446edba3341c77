"""Chunks come back bit for bit, never grow, and hostile ones are an `IntegrityError` and nothing else."""

import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsplit.codec import CODEC_NAMES, LAYOUTS, RAW, ChunkDecoder, ChunkEncoder, CodecName, Encoded
from mmsplit.codec.chunk_codec import PLANES, ZSTD
from mmsplit.dtypes import DTYPES
from mmsplit.errors import IntegrityError

MAX = 1 << 16
#: Contexts are made to be reused; reuse is part of what is tested.
ENCODERS = {codec: ChunkEncoder(codec, MAX) for codec in CODEC_NAMES}
DECODER = ChunkDecoder()
ZSTD_BIT = 1 << 31


def encode(raw: bytes | np.ndarray, dtype: str, codec: CodecName = "planes", slack: int = 0) -> tuple[Encoded, bytes]:
    """Encode into a buffer whose rest must stay untouched."""
    view = memoryview(raw).cast("B") if len(raw) else memoryview(b"")
    out = bytearray(b"\xaa" * (len(view) + slack))
    encoded = ENCODERS[codec].encode(view, dtype, memoryview(out))
    assert encoded.stored_bytes <= len(view)
    assert bytes(out[len(view) :]) == b"\xaa" * slack
    return encoded, bytes(out[: encoded.stored_bytes])


def decode(stored: bytes, encoded: Encoded, raw_bytes: int, decoder: ChunkDecoder = DECODER) -> bytes:
    """Decode into the middle of a buffer whose ends must stay untouched."""
    out = bytearray(b"\xaa" * (raw_bytes + 32))
    try:
        decoder.decode(memoryview(stored), encoded, memoryview(out)[16 : 16 + raw_bytes])
    finally:
        assert out[:16] == out[16 + raw_bytes :] == b"\xaa" * 16
    return bytes(out[16 : 16 + raw_bytes])


def gaussian(dtype: str, count: int, seed: int = 0) -> bytes:
    """Weights as trained models have them, in a dtype of numpy or ml_dtypes."""
    values = np.random.default_rng(seed).standard_normal(count, np.float32) * np.float32(0.02)
    return values.astype(getattr(ml_dtypes, dtype, None) or dtype).tobytes()


def noise(count_bytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count_bytes)


_DATA = st.one_of(
    st.binary(max_size=700),
    st.builds(lambda unit, count: unit * count, st.binary(min_size=1, max_size=9), st.integers(0, 800)),
    st.builds(noise, st.integers(0, 3000), st.integers(0, 99)),
    st.builds(gaussian, st.sampled_from(["bfloat16", "float32", "float16", "float64"]), st.integers(0, 3000)),
    st.builds(lambda a, b: a + b, st.builds(noise, st.integers(0, 2000)), st.builds(bytes, st.integers(0, 4000))),
)


@given(_DATA, st.sampled_from([*DTYPES, "F2_TOMORROW"]), st.sampled_from(CODEC_NAMES), st.integers(0, 3))
@settings(max_examples=500, deadline=None, database=None)
def test_round_trip(data: bytes, dtype: str, codec: CodecName, shift: int) -> None:
    """Every dtype, any length, any address; never larger than raw; the same bytes from a fresh context."""
    raw = np.frombuffer(bytes(shift) + data, np.uint8)[shift:]
    encoded, stored = encode(raw, dtype, codec, slack=5)
    assert decode(stored, encoded, len(data)) == data
    if encoded.codec == RAW:
        assert stored == data
    fresh = bytearray(len(data))
    assert ChunkEncoder(codec, MAX).encode(memoryview(data), dtype, memoryview(fresh)) == encoded
    assert bytes(fresh[: encoded.stored_bytes]) == stored


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_of_large_chunks(dtype: str, codec: CodecName) -> None:
    """Larger than a zstd block and a pass of the splitter; weights, zeros, noise, and bytes over a whole word."""
    encoder, decoder = ChunkEncoder(codec, 1 << 19), ChunkDecoder()
    for data in (gaussian("bfloat16", 200_001), bytes(300_000), noise(300_007), bytes(150_000) + noise(150_000)):
        out, back = bytearray(len(data)), bytearray(len(data))
        encoded = encoder.encode(memoryview(data), dtype, memoryview(out))
        decoder.decode(memoryview(out)[: encoded.stored_bytes], encoded, memoryview(back))
        assert back == data


SPECIAL = {
    "BF16": ("<u2", [0x7FC1, 0xFFC1, 0x7F81, 0x8000, 0x0001, 0x8001, 0x7F80, 0xFF80, 0x007F]),
    "F16": ("<u2", [0x7E01, 0xFE01, 0x7D01, 0x8000, 0x0001, 0x8001, 0x7C00, 0xFC00]),
    "F32": ("<u4", [0x7FC00001, 0xFF800001, 0x7F800001, 0x80000000, 0x00000001, 0x807FFFFF, 0xFF800000]),
    "F64": ("<u8", [0x7FF0000000000001, 0xFFF8000000000001, 0x8000000000000000, 0x0000000000000001]),
}


@pytest.mark.parametrize(("dtype", "words"), SPECIAL.items())
def test_special_values_are_bit_exact(dtype: str, words: tuple[str, list[int]]) -> None:
    """Payloads of NaN, quiet and signalling, -0 and denormals, many enough to be compressed."""
    data = np.tile(np.array(words[1], words[0]), 200).tobytes()
    encoded, stored = encode(data, dtype)
    assert encoded.codec == PLANES
    assert decode(stored, encoded, len(data)) == data


def test_weights_shrink_to_what_was_measured() -> None:
    """BF16 weights to 0.664 of raw, F32 to less than 0.84."""
    for dtype, numpy_name, share in (("BF16", "bfloat16", 0.664), ("F32", "float32", 0.84)):
        data = gaussian(numpy_name, 1 << 20)
        out = bytearray(len(data))
        encoded = ChunkEncoder("planes", len(data)).encode(memoryview(data), dtype, memoryview(out))
        assert encoded.codec == PLANES
        assert encoded.stored_bytes <= share * len(data)


def test_values_of_a_narrower_type_shrink_to_their_own_size() -> None:
    """BF16 kept in F32: two of four planes are zeros."""
    data = (np.frombuffer(gaussian("bfloat16", 16_000), "<u2").astype("<u4") << 16).tobytes()
    encoded, _ = encode(data, "F32")
    assert encoded.stored_bytes < 0.35 * len(data)


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("dtype", ["U8", "BF16", "I64"])
def test_noise_stays_raw(dtype: str, codec: CodecName) -> None:
    """What does not shrink is stored as it is."""
    data = noise(MAX)
    assert encode(data, dtype, codec) == (Encoded(RAW, 0, MAX), data)


def test_small_chunk_stays_raw() -> None:
    """Frames and prologue would cost more than they save."""
    for codec in CODEC_NAMES:
        assert encode(bytes(255), "BF16", codec)[0] == Encoded(RAW, 0, 255)
        assert encode(b"", "BF16", codec)[0] == Encoded(RAW, 0, 0)
    assert encode(bytes(256), "BF16")[0].codec == PLANES


def test_bytes_over_a_whole_word_are_taken_as_bytes() -> None:
    """An unknown width, or a chunk cut elsewhere: still shrunk, never cut wrong."""
    encoded, stored = encode(bytes(1001), "F32")
    assert (encoded.codec, encoded.layout) == (PLANES, 0)
    assert decode(stored, encoded, 1001) == bytes(1001)


def test_plane_whose_sample_promised_too_much_is_stored_raw() -> None:
    """Zeros exactly where the sample looks, noise elsewhere: the plane is tried, found large, and kept as it is."""
    words = 1 << 17
    low, high = np.zeros(words, np.uint8), np.frombuffer(noise(words), np.uint8).copy()
    step = (words - 2048) // 7
    for piece in range(8):
        high[piece * step : piece * step + 2048] = 0
    data = np.stack([low, high], axis=1).tobytes()
    out, back = bytearray(len(data)), bytearray(len(data))
    encoded = ChunkEncoder("planes", len(data)).encode(memoryview(data), "I16", memoryview(out))
    assert encoded.codec == PLANES
    assert encoded.stored_bytes < 0.55 * len(data)
    ChunkDecoder().decode(memoryview(out)[: encoded.stored_bytes], encoded, memoryview(back))
    assert back == data


@pytest.mark.parametrize("codec", ["planes", "zstd"])
def test_output_does_not_depend_on_what_the_context_did_before(codec: CodecName) -> None:
    """After noise that did not fit, after other dtypes and sizes: the same bytes as from a fresh context."""
    encoder = ChunkEncoder(codec, MAX)
    chunks = [
        (gaussian("bfloat16", 9000), "BF16"), (noise(MAX), "U8"), (noise(300), "F32"), (bytes(MAX), "F64"),
        (gaussian("float32", 5000), "F32"), (noise(30_000) + bytes(30_000), "I16"),
    ]  # fmt: skip
    for data, dtype in chunks * 2:
        used, fresh = bytearray(len(data)), bytearray(len(data))
        first = encoder.encode(memoryview(data), dtype, memoryview(used))
        second = ChunkEncoder(codec, MAX).encode(memoryview(data), dtype, memoryview(fresh))
        assert first == second
        assert used[: first.stored_bytes] == fresh[: second.stored_bytes]


def test_frame_of_zeros_is_the_one_zstd_makes_whatever_came_before() -> None:
    """The encoder keeps it for the next plane of zeros: where there is room, where there is none, for other lengths."""
    full = np.zeros((32, 8), np.uint8)
    full[:, :6] = np.frombuffer(noise(192), np.uint8).reshape(
        32, 6
    )  # after six planes of noise two of zeros do not fit
    chunks = [bytes(256), full.tobytes(), bytes(512), bytes(512), bytes(4096), full.tobytes()]
    for codec in ("planes", "zstd"):
        encoder = ChunkEncoder(codec, MAX)
        for data in chunks:
            used, fresh = bytearray(len(data)), bytearray(len(data))
            first = encoder.encode(memoryview(data), "I64", memoryview(used))
            second = ChunkEncoder(codec, MAX).encode(memoryview(data), "I64", memoryview(fresh))
            assert (first, used[: first.stored_bytes]) == (second, fresh[: second.stored_bytes])


def test_layout_of_an_encoded_chunk_is_the_documented_one() -> None:
    """Prologue, flags, alignment and zeros between: read here without the decoder."""
    data = gaussian("bfloat16", 5001)
    encoded, stored = encode(data, "BF16")
    assert (encoded.codec, LAYOUTS[encoded.layout].exponent8) == (PLANES, True)
    (low_bytes, low_at), (high_bytes, high_at) = struct.iter_unpack("<II", stored[:16])
    assert low_bytes == 5001  # raw
    assert high_bytes & ZSTD_BIT
    assert (low_at, high_at) == (16, 16 + 5008)
    assert stored[16 + 5001 : high_at] == bytes(7)
    assert len(stored) == high_at + (high_bytes & ~ZSTD_BIT)
    words = np.frombuffer(data, "<u2")
    assert zstandard.decompress(stored[high_at:]) == (words >> 7).astype(np.uint8).tobytes()


# --- Hostile chunks ---------------------------------------------------------------------------------------------


def attempt(stored: bytes, encoded: Encoded, raw_bytes: int) -> bytes | None:
    """Decode, or None for an `IntegrityError`; anything else is the test's failure."""
    try:
        return decode(stored, encoded, raw_bytes)
    except IntegrityError:
        return None


SMALL = gaussian("bfloat16", 300)


@pytest.mark.parametrize("codec", ["planes", "zstd"])
def test_every_mutation_of_a_byte_is_an_integrity_error_or_other_bytes(codec: CodecName) -> None:
    """Each byte of a small chunk, a few values each; a checksum above this room catches the rest."""
    data = SMALL if codec == "planes" else bytes(200) + noise(200) + bytes(200)
    encoded, stored = encode(data, "BF16", codec)
    assert encoded.codec != RAW
    for position in range(len(stored)):
        for flip in (0x01, 0x10, 0x80, 0xFF):
            damaged = bytearray(stored)
            damaged[position] ^= flip
            attempt(bytes(damaged), encoded, len(data))
    assert attempt(stored, encoded, len(data)) == data  # the decoder survived all that


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_truncated_chunk_is_an_integrity_error(codec: CodecName) -> None:
    """At every length but the right one."""
    data = gaussian("bfloat16", 300) if codec != "zstd" else bytes(200) + noise(200) + bytes(200)
    encoded, stored = encode(data, "BF16", codec)
    for length in range(len(stored)):
        assert attempt(stored[:length], encoded, len(data)) is None


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_chunk_of_another_raw_length_is_an_integrity_error(codec: CodecName) -> None:
    """The index says how long the chunk is; the chunk cannot say otherwise."""
    data = gaussian("bfloat16", 300) if codec != "zstd" else bytes(200) + noise(200) + bytes(200)
    encoded, stored = encode(data, "BF16", codec)
    for length in (0, 1, 2, len(data) - 2, len(data) - 1, len(data) + 1, len(data) + 2, 2 * len(data)):
        assert attempt(stored, encoded, length) is None


def planes(*entries: tuple[int, int], rest: bytes = b"") -> bytes:
    """A chunk with this prologue."""
    return b"".join(struct.pack("<II", *entry) for entry in entries) + rest


def frame(size: int, *, declared: bool = True) -> bytes:
    """A zstd frame of zeros."""
    return zstandard.ZstdCompressor(write_content_size=declared).compress(bytes(size))


def _frame_of_window(exponent: int, declared: int, content: bytes = bytes(64)) -> bytes:
    """A frame that asks for a window of 2**(10 + exponent) bytes and declares 8-byte content size."""
    block = (len(content) << 3 | 1).to_bytes(3, "little") + content  # one raw block, the last
    return b"\x28\xb5\x2f\xfd" + bytes([0b11000000, exponent << 3]) + declared.to_bytes(8, "little") + block


HOSTILE = {
    "unknown codec": (Encoded(3, 0, 4), b"1234", 4),
    "unknown layout": (Encoded(PLANES, len(LAYOUTS), 64), bytes(64), 64),
    "raw too long": (Encoded(RAW, 0, 5), b"12345", 4),
    "nothing": (Encoded(PLANES, 1, 0), b"", 64),
    "half a prologue": (Encoded(PLANES, 1, 8), bytes(8), 64),
    "half a word": (Encoded(PLANES, 1, 99), bytes(99), 63),
    "plane past the end": (Encoded(PLANES, 1, 80), planes((32, 16), (32, 49), rest=bytes(64)), 64),
    "offset of 4 GiB": (Encoded(PLANES, 1, 80), planes((32, 16), (32, 2**32 - 1), rest=bytes(64)), 64),
    "length of 2 GiB": (Encoded(PLANES, 1, 80), planes((32, 16), (2**31 - 1, 16), rest=bytes(64)), 64),
    "frame of 2 GiB": (Encoded(PLANES, 1, 80), planes((32, 16), (2**32 - 1, 16), rest=bytes(64)), 64),
    "plane too short": (Encoded(PLANES, 1, 80), planes((32, 16), (31, 48), rest=bytes(64)), 64),
    "plane too long": (Encoded(PLANES, 1, 80), planes((32, 16), (33, 47), rest=bytes(64)), 64),
    "empty frame": (Encoded(PLANES, 0, 16), planes((ZSTD_BIT, 0), rest=bytes(8)), 64),
    "frame is the prologue": (Encoded(PLANES, 0, 16), planes((ZSTD_BIT | 16, 0), rest=bytes(8)), 64),
    "frame of other content": (Encoded(ZSTD, 0, 0), frame(65), 64),
    "frame of no declared size": (Encoded(ZSTD, 0, 0), frame(64, declared=False), 64),
    "skippable frame": (Encoded(ZSTD, 0, 0), b"\x50\x2a\x4d\x18\x08\0\0\0" + bytes(8), 64),
    "skippable frame first": (Encoded(ZSTD, 0, 0), b"\x50\x2a\x4d\x18\x08\0\0\0" + bytes(8) + frame(64), 64),
    "two frames": (Encoded(ZSTD, 0, 0), frame(32) + frame(32), 64),
    "no frame": (Encoded(ZSTD, 0, 0), b"\0" * 64, 64),
    "frame declares 2**64 - 2": (Encoded(ZSTD, 0, 0), _frame_of_window(0, 2**64 - 2), 64),
    "frame declares right and ends early": (Encoded(ZSTD, 0, 0), _frame_of_window(0, 64, bytes(63)), 64),
    "frame goes on after what it declares": (Encoded(ZSTD, 0, 0), _frame_of_window(0, 64, bytes(65)), 64),
    "window of 16 MiB": (Encoded(ZSTD, 0, 0), _frame_of_window(14, 64)[:-1], 64),
    "window of 1 GiB": (Encoded(ZSTD, 0, 0), _frame_of_window(20, 64)[:-1], 64),
    "window of 2 TiB": (Encoded(ZSTD, 0, 0), _frame_of_window(31, 64), 64),
}


@pytest.mark.parametrize(("encoded", "stored", "raw_bytes"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_chunk_is_an_integrity_error(encoded: Encoded, stored: bytes, raw_bytes: int) -> None:
    assert attempt(stored, encoded, raw_bytes) is None


def test_window_is_refused_where_it_would_cost_memory() -> None:
    """A whole frame is decoded straight into `out` and needs none; a cut one would, and is told so."""
    for exponent in (0, 13, 14, 20):
        stored = _frame_of_window(exponent, 64)
        assert decode(stored, Encoded(ZSTD, 0, len(stored)), 64) == bytes(64)
        words = "ends early" if exponent <= 13 else "too much memory"
        with pytest.raises(IntegrityError, match=words):
            decode(stored[:-1], Encoded(ZSTD, 0, len(stored) - 1), 64)


def test_overlapping_planes_are_read_as_they_lie() -> None:
    """They harm nobody: every range is inside the chunk and every plane has its length."""
    stored = planes((8, 16), (8, 16), rest=bytes(range(8)))
    assert decode(stored, Encoded(PLANES, 1, len(stored)), 16) == bytes(byte for byte in range(8) for _ in range(2))


def test_bytes_in_a_plane_that_is_not_compressed_are_read() -> None:
    """No encoder writes it, since raw is shorter; the format allows it."""
    stored = planes((16, 16), rest=bytes(8) + bytes(range(16)))
    assert decode(stored, Encoded(PLANES, 0, len(stored)), 16) == bytes(range(16))


@given(
    st.integers(0, len(LAYOUTS) + 1),
    st.integers(0, 3),
    st.integers(0, 80),
    st.one_of(
        st.binary(max_size=120),
        st.builds(
            lambda entries, rest: planes(*entries, rest=rest),
            st.lists(
                st.tuples(st.sampled_from([0, 8, 16, 2**31, 2**31 + 16, 2**32 - 1]), st.integers(0, 90)), max_size=8
            ),
            st.one_of(st.binary(max_size=80), st.just(frame(16)), st.just(frame(8) * 2)),
        ),
    ),
)
@settings(max_examples=1000, deadline=None, database=None)
def test_any_bytes_are_decoded_or_refused(layout: int, codec: int, raw_bytes: int, stored: bytes) -> None:
    """No other exception, no byte outside `out`."""
    attempt(stored, Encoded(codec, layout, len(stored)), raw_bytes)


def test_memory_does_not_grow_with_what_a_chunk_claims() -> None:
    """Forged lengths, sizes and windows; zstd's own contexts are bounded by the window limit."""
    tracemalloc.start()
    try:
        for encoded, stored, raw_bytes in HOSTILE.values():
            attempt(stored, encoded, raw_bytes)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
