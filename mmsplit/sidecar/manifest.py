"""`partition_K.json`: the manifest of one partition, as a record, to text and back.  Pure.

A manifest is read strictly: a field that is missing or of another type, a count that disagrees with its parts, a
version not known here is an error, not a guess.  Unknown fields are ignored, so that a later minor addition does
not break this reader; anything that changes meaning gets a new format version.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final, NamedTuple

from mmsplit.checkpoint.strided import reach_count
from mmsplit.checkpoint.tensor import SourcePlace, TensorRows, TensorView
from mmsplit.dtypes import DTYPES
from mmsplit.errors import FormatError, IntegrityError
from mmsplit.sidecar.framing import FORMAT_VERSION, require_version
from mmsplit.sidecar.json_fields import Fields, load_json_object
from mmsplit.sidecar.layout import CHUNK_BYTES, DATA_START, chunk_count_of

PARTITION_FORMAT: Final = "mmsplit-partition"
#: With these a manifest, as it is written, begins and ends; neither occurs within one.
MANIFEST_START: Final = b'{\n "format": "mmsplit-partition",\n'
MANIFEST_STOP: Final = b"\n ]\n}\n"
CHECKSUM_KIND: Final = "xxh3_64"
CHUNK_DIGEST_KIND: Final = "blake3"
#: The payload's header has 32 bits for part_id and num_parts.
_MAX_PARTS: Final = 2**32 - 1


def manifest_name(part_id: int) -> str:
    """Return the file name of a partition's manifest."""
    return f"partition_{part_id}.json"


def payload_name(part_id: int) -> str:
    """Return the file name of a partition's payload."""
    return f"partition_{part_id}.bin"


class TensorEntry(NamedTuple):
    """One tensor in a partition.  Chunks [`first_chunk`, `first_chunk + chunk_count`) of its index hold it.

    `source_start` and `source_stop` are the half-open byte range in the source shard's file; `also` are other places of
    the source with the same bytes.  A `hidden` one is none of the state dict: only views see it, or nobody.  `xxh3` is
    None in a layer that is not stored here.  With `rows` this is only those rows of a tensor, and all else is said of
    them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    params: int
    size_bytes: int
    xxh3: str | None
    first_chunk: int
    chunk_count: int
    shard: str
    source_start: int
    source_stop: int
    rows: TensorRows | None = None
    also: tuple[SourcePlace, ...] = ()
    hidden: bool = False

    def places(self) -> tuple[SourcePlace, ...]:
        """Return every place of the source that holds these bytes, the tensor's own first."""
        return (SourcePlace(self.name, self.shard, self.source_start, self.source_stop), *self.also)


class LayerEntry(NamedTuple):
    """One layer in a partition; payload bytes [`start`, `stop`) hold it, padding included.

    `alias`, `tied_to`, `stored` and `views` as in `planning.PlannedLayer`.
    """

    name: str
    layer_type: str
    stack: str | None
    block_index: int | None
    start: int
    stop: int
    stored_bytes: int
    tensors: tuple[TensorEntry, ...]
    alias: str | None
    tied_to: int | None
    stored: bool
    views: tuple[TensorView, ...] = ()

    @property
    def total_params(self) -> int:
        """Number of elements stored."""
        return sum(tensor.params for tensor in self.tensors) if self.stored else 0

    @property
    def total_bytes(self) -> int:
        """Raw bytes stored."""
        return sum(tensor.size_bytes for tensor in self.tensors) if self.stored else 0


class Manifest(NamedTuple):
    """The parsed `partition_K.json`.  `stored_bytes` counts encoded chunks, without padding and index."""

    part_id: int
    num_parts: int
    model_id: str
    revision: str | None
    plan_digest: str
    source_digest: str
    payload_file: str
    data_stop: int
    chunk_count: int
    index_sha256: str
    stored_bytes: int
    layers: tuple[LayerEntry, ...]

    @property
    def total_params(self) -> int:
        """Number of elements stored."""
        return sum(layer.total_params for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """Raw bytes stored."""
        return sum(layer.total_bytes for layer in self.layers)

    def stored_tensors(self) -> tuple[TensorEntry, ...]:
        """Return the tensors the payload holds, in payload order; their places count as `tensor` of the index."""
        return tuple(tensor for layer in self.layers if layer.stored for tensor in layer.tensors)


def format_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as JSON that a person can read: a tensor is one line."""
    head = {
        "format": PARTITION_FORMAT,
        "format_version": FORMAT_VERSION,
        "part_id": manifest.part_id,
        "num_parts": manifest.num_parts,
        "model_id": manifest.model_id,
        "revision": manifest.revision,
        "plan_digest": manifest.plan_digest,
        "source_digest": manifest.source_digest,
        "total_params": manifest.total_params,
        "total_bytes": manifest.total_bytes,
        "stored_bytes": manifest.stored_bytes,
        "payload": {
            "file": manifest.payload_file,
            "checksum": CHECKSUM_KIND,
            "digest": CHUNK_DIGEST_KIND,
            "chunk_bytes": CHUNK_BYTES,
            "chunk_count": manifest.chunk_count,
            "data_stop": manifest.data_stop,
            "index_sha256": manifest.index_sha256,
        },
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    layers = ",\n".join(_format_layer(layer) for layer in manifest.layers)
    return ("{\n" + ",\n".join(lines) + ',\n "layers": [\n' + layers + "\n ]\n}\n").encode()


def _format_layer(layer: LayerEntry) -> str:
    head: dict[str, object] = {
        "name": layer.name,
        "layer_type": layer.layer_type,
        "stack": layer.stack,
        "index": layer.block_index,
        "total_params": layer.total_params,
        "total_bytes": layer.total_bytes,
        "stored_bytes": layer.stored_bytes,
        "start": layer.start,
        "stop": layer.stop,
    }
    if layer.alias is not None:
        head |= {"alias": layer.alias, "tied_to": layer.tied_to, "stored": layer.stored}
    if layer.views:
        head["views"] = [_view_json(view) for view in layer.views]
    tensors = ",\n".join(f"    {json.dumps(_tensor_json(tensor))}" for tensor in layer.tensors)
    return "  {" + json.dumps(head)[1:-1] + ', "tensors": [\n' + tensors + "\n  ]}"


def _view_json(view: TensorView) -> dict[str, object]:
    return {
        "name": view.name,
        "tensor": view.base,
        "dtype": view.dtype,
        "shape": view.shape,
        "stride": view.stride,
        "offset": view.offset_bytes,
    }


def _tensor_json(tensor: TensorEntry) -> dict[str, object]:
    rows = tensor.rows
    also = [
        {"name": place.name, "shard": place.shard, "source_range": [place.start_offset, place.stop_offset]}
        for place in tensor.also
    ]
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        **({} if rows is None else {"rows": {"start": rows.start, "stop": rows.stop, "shape": rows.shape}}),
        "params": tensor.params,
        "bytes": tensor.size_bytes,
        "xxh3": tensor.xxh3,
        "chunks": [tensor.first_chunk, tensor.chunk_count],
        "shard": tensor.shard,
        "source_range": [tensor.source_start, tensor.source_stop],
        **({"also": also} if also else {}),
        **({"hidden": True} if tensor.hidden else {}),
    }


def parse_manifest(data: bytes, path: str) -> Manifest:
    """Parse and check a manifest.  Raises `FormatError` if it is not one, `IntegrityError` if it contradicts itself."""
    fields = Fields(load_json_object(data, path), path)
    if fields.get("format", str) != PARTITION_FORMAT:
        fields.fail(f"not the manifest of a partition: format is {fields.get('format', str)[:40]!r}")
    require_version(fields.values.get("format_version"), path)
    payload = fields.inner("payload")
    kinds = (("checksum", CHECKSUM_KIND), ("digest", CHUNK_DIGEST_KIND), ("chunk_bytes", CHUNK_BYTES))
    for key, known in kinds:
        if payload.values.get(key) != known:
            raise FormatError(
                f"{key} is not one this mmsplit reads",
                path=path,
                expected=str(known),
                found=repr(payload.values.get(key))[:40],
            )
    manifest = Manifest(
        part_id=fields.count("part_id"),
        num_parts=fields.count("num_parts"),
        model_id=fields.get("model_id", str),
        revision=fields.optional("revision", str),
        plan_digest=fields.sha256("plan_digest"),
        source_digest=fields.sha256("source_digest"),
        payload_file=payload.plain_name("file"),
        data_stop=payload.count("data_stop"),
        chunk_count=payload.count("chunk_count"),
        index_sha256=payload.sha256("index_sha256"),
        stored_bytes=fields.count("stored_bytes"),
        layers=tuple(_parse_layer(layer) for layer in fields.each("layers")),
    )
    _require_consistent(manifest, fields)
    return manifest


def refuse_other_version(data: bytes, path: str) -> None:
    """Raise `FormatError` if the text, whatever else is wrong with it, says it is a manifest of another version."""
    try:
        values = load_json_object(data, path)
    except IntegrityError:
        return
    version = values.get("format_version")
    if values.get("format") == PARTITION_FORMAT and type(version) is int:
        require_version(version, path)


def _parse_layer(fields: Fields) -> LayerEntry:
    alias = fields.optional("alias", str)
    tensors = tuple(_parse_tensor(tensor) for tensor in fields.each("tensors"))
    if alias is not None and len(tensors) != 1:
        fields.fail("a tied layer has not exactly one tensor")
    return LayerEntry(
        name=fields.get("name", str),
        layer_type=fields.get("layer_type", str),
        stack=fields.optional("stack", str),
        block_index=fields.optional("index", int),
        start=fields.count("start"),
        stop=fields.count("stop"),
        stored_bytes=fields.count("stored_bytes"),
        tensors=tensors,
        alias=alias,
        tied_to=fields.optional("tied_to", int),
        stored=True if alias is None else fields.get("stored", bool),
        views=tuple(_parse_view(view) for view in fields.each("views")) if "views" in fields.values else (),
    )


def _parse_view(fields: Fields) -> TensorView:
    return TensorView(
        name=fields.get("name", str),
        base=fields.get("tensor", str),
        dtype=fields.get("dtype", str),
        shape=_sizes(fields, "shape"),
        stride=_sizes(fields, "stride"),
        offset_bytes=fields.count("offset"),
    )


def _sizes(fields: Fields, key: str) -> tuple[int, ...]:
    sizes = fields.get(key, list)
    if not all(type(size) is int and size >= 0 for size in sizes):
        fields.fail(f"{key} is not a list of sizes")
    return tuple(sizes)


def _parse_place(fields: Fields) -> SourcePlace:
    return SourcePlace(fields.get("name", str), fields.plain_name("shard"), *fields.pair("source_range"))


def _parse_tensor(fields: Fields) -> TensorEntry:
    first, count = fields.pair("chunks")
    start, stop = fields.pair("source_range")
    return TensorEntry(
        name=fields.get("name", str),
        dtype=fields.get("dtype", str),
        shape=_sizes(fields, "shape"),
        params=fields.count("params"),
        size_bytes=fields.count("bytes"),
        xxh3=None if fields.values.get("xxh3") is None else fields.xxh3("xxh3"),
        first_chunk=first,
        chunk_count=count,
        shard=fields.plain_name("shard"),
        source_start=start,
        source_stop=stop,
        rows=None if fields.values.get("rows") is None else _parse_rows(fields.inner("rows")),
        also=tuple(_parse_place(place) for place in fields.each("also")) if "also" in fields.values else (),
        hidden=fields.optional("hidden", bool) is True,
    )


def _parse_rows(fields: Fields) -> TensorRows:
    return TensorRows(fields.count("start"), fields.count("stop"), _sizes(fields, "shape"))


def _require_consistent(manifest: Manifest, fields: Fields) -> None:
    def require(holds: bool, what: str, tensor: str | None = None) -> None:
        if not holds:
            raise IntegrityError(f"manifest contradicts itself: {what}", path=fields.path, tensor=tensor)

    require(manifest.part_id < manifest.num_parts <= _MAX_PARTS, "part_id is not below num_parts")
    require(fields.count("total_params") == manifest.total_params, "total_params is not the sum of its layers")
    require(fields.count("total_bytes") == manifest.total_bytes, "total_bytes is not the sum of its layers")
    require(
        manifest.stored_bytes == sum(layer.stored_bytes for layer in manifest.layers),
        "stored_bytes is not the sum of its layers",
    )
    require(fields.inner("payload").get("file", str) == payload_name(manifest.part_id), "payload has another name")
    position = DATA_START
    for layer, values in zip(manifest.layers, fields.each("layers"), strict=True):
        require(values.count("total_params") == layer.total_params, f"total_params of {layer.name} do not fit")
        require(values.count("total_bytes") == layer.total_bytes, f"total_bytes of {layer.name} do not fit")
        require(layer.start == position <= layer.stop, f"{layer.name} does not begin where the layer before it ends")
        require((layer.tied_to or 0) < manifest.num_parts, f"{layer.name} is tied to a partition that is none")
        position = layer.stop
        for tensor in layer.tensors:
            require(_fits_shape(tensor), "dtype and shape do not fit params and bytes", tensor.name)
            require(_fits_rows(tensor), "rows do not fit the shape", tensor.name)
            require(tensor.rows is None or layer.alias is None, "a tied tensor is sliced", tensor.name)
            for place in tensor.also:
                same = place.stop_offset - place.start_offset == tensor.size_bytes
                require(same, "another place of the source has another length", tensor.name)
        sizes = {tensor.name: tensor.size_bytes for tensor in layer.tensors if tensor.rows is None}
        for view in layer.views:
            require(_view_fits(view, sizes.get(view.base, -1)), "view does not lie in a whole tensor", view.name)
    require(position == manifest.data_stop, "the last layer does not end where the data ends")
    chunk = 0
    names: set[str] = set()
    for tensor in manifest.stored_tensors():
        require(tensor.name not in names, "a tensor is stored twice", tensor.name)
        names.add(tensor.name)
        require(tensor.first_chunk == chunk, "chunks are not numbered in order", tensor.name)
        require(tensor.chunk_count == chunk_count_of(tensor.size_bytes), "chunk count does not fit", tensor.name)
        require(
            tensor.source_stop - tensor.source_start == tensor.size_bytes,
            "source range does not fit",
            tensor.name,
        )
        require(tensor.xxh3 is not None, "a stored tensor has no checksum", tensor.name)
        chunk += tensor.chunk_count
    require(chunk == manifest.chunk_count, "chunk_count is not that of its tensors")


def _fits_shape(tensor: TensorEntry) -> bool:
    """Whether params and bytes are those of dtype and shape; of an unknown dtype nothing is known."""
    known = DTYPES.get(tensor.dtype)
    return known is None or (
        _product(tensor.shape) == tensor.params and tensor.params * known.bits == 8 * tensor.size_bytes
    )


def _fits_rows(tensor: TensorEntry) -> bool:
    """Whether a slice has the shape that its rows of the whole tensor have."""
    if tensor.rows is None:
        return True
    start, stop, whole = tensor.rows
    return bool(whole) and start < stop <= whole[0] and tensor.shape == (stop - start, *whole[1:])


def _view_fits(view: TensorView, base_bytes: int) -> bool:
    """Whether every element of a view lies in its tensor of `base_bytes`; its dtype must be known for that."""
    known = DTYPES.get(view.dtype)
    if known is None or known.bits % 8 or len(view.shape) != len(view.stride):
        return base_bytes >= view.offset_bytes and len(view.shape) == len(view.stride)
    return view.offset_bytes + reach_count(view.shape, view.stride) * known.bits // 8 <= base_bytes


def _product(shape: Sequence[int]) -> int | None:
    """Number of elements, or None beyond 64 bits: a hostile shape must not cost the time of a huge number."""
    params = 1
    for size in shape:
        params *= size
        if params >= 2**64:
            return None
    return params
