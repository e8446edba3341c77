"""Write the fixtures beside this file, with a real PyTorch, and what torch.load makes of them into expected.json.

    python make_fixtures.py

The legacy form names its storages by addresses, and zip files carry a serialisation id, so that a second run writes
other bytes that mean the same.  The files in the repository were written by the version that expected.json names.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent
DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64"),
)
#: Saved in the legacy form, torch itself cannot load these again.
NEW_DTYPES = (
    *("uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


class Tiny(nn.Module):
    """A model with a tied head, a buffer, and a parameter that needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.block = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)])
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.block[1].weight.requires_grad_(False)
        self.register_buffer("mask", torch.tril(torch.ones(3, 3, dtype=torch.bool)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(ids)))


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values that tell positions apart."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def views() -> dict[str, torch.Tensor]:
    """Every way in which tensors share storages."""
    base, rows, slab = some(10, 3), some(6, 5, seed=1), some(2, 3, 4, seed=2)
    lonely = some(100, seed=3)
    flat = some(24, seed=4)
    return {
        "base": base,
        "base.slice": base[2:4],
        "base.column": base[:, 1],
        "base.steps": base[::3],
        "base.tied": base,
        "base.scalar": base[1, 2],
        "transposed": rows.t(),
        "permuted": slab.permute(2, 0, 1),
        "part.of.unsaved": lonely[10:20],
        "steps.of.unsaved": lonely[1:90:7],
        "expanded": some(1, 4, seed=5).expand(3, 4),
        "expanded.scalar": torch.tensor(7.0).expand(2, 2),
        "overlapping": torch.as_strided(flat, (4, 6), (5, 1)),
        "flat.as.matrix": flat.view(4, 6),
        "empty.slice": base[5:5],
    }


def odd_shapes() -> dict[str, torch.Tensor]:
    """Shapes at the edges, and the kinds of tensors that state dicts hold."""
    parameter = nn.Parameter(some(2, 2))
    marked = nn.Parameter(some(3), requires_grad=False)
    marked.note = "an attribute"
    return {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0),
        "empty.matrix": torch.empty(3, 0, 2, dtype=torch.int64),
        "one": torch.ones(1, 1, 1),
        "parameter": parameter,
        "parameter.same": parameter,
        "parameter.with.state": marked,
        "needs.gradient": some(2).requires_grad_(),
        "channels.last": some(1, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "имя ☃": some(2),
    }


def all_dtypes(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """One tensor of each dtype."""
    return {name: some(2, 3, seed=index).mul(3).abs().to(getattr(torch, name)) for index, name in enumerate(names)}


def optimised() -> dict[str, Any]:
    """A training checkpoint: two state dicts, integers as keys, lists, and values that are no tensors."""
    model = Tiny()
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.arange(3)).sum().backward()
    optimiser.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimiser.state_dict(),
        "averages": [some(2), (some(3), None)],
        "epoch": 3,
    }


def wrapped() -> dict[str, Any]:
    """One state dict among values that are no tensors."""
    sizes = {"size": torch.Size([2, 3]), "device": torch.device("cpu"), "dtype": torch.bfloat16}
    return {"epoch": 2**40, "model": Tiny().state_dict(), "best": -1.5, "args": {"names": ["a", None, True], **sizes}}


def read_files() -> dict[str, tuple[Any, dict[str, Any]]]:
    """File name -> what is saved in it, and how."""
    legacy = {"_use_new_zipfile_serialization": False}
    objects = {
        "module": Tiny().state_dict(),
        "views": views(),
        "shapes": odd_shapes(),
        "wrapped": wrapped(),
    }
    files: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name, value in objects.items():
        files[f"{name}.zip.bin"] = value, {}
        files[f"{name}.legacy.bin"] = value, legacy
    return files | {
        "dtypes.zip.bin": (all_dtypes((*DTYPES, *NEW_DTYPES)), {}),
        "dtypes.legacy.bin": (all_dtypes(DTYPES), legacy),
        "unnamed_dtypes.zip.bin": (all_dtypes(("complex32", "complex128")), {}),
        "optimised.zip.bin": (optimised(), {}),
        "protocol4.zip.bin": (OrderedDict(wrapped()), {"pickle_protocol": 4}),
        "protocol5.legacy.bin": (wrapped(), {"pickle_protocol": 5, **legacy}),
        "list.zip.bin": ([some(2), some(3)], {}),
        "no_byteorder.zip.bin": (Tiny().state_dict(), {"_disable_byteorder_record": True}),
    }


def refused_files() -> dict[str, tuple[Any, dict[str, Any], str]]:
    """File name -> what is saved in it, how, and the name that the error says."""
    legacy = {"_use_new_zipfile_serialization": False}
    marked = some(2)
    marked.note = "an attribute"
    quantised = torch.quantize_per_tensor(some(4), 0.1, 0, torch.qint8)
    sparse = some(3, 3).to_sparse()
    conjugate = torch.tensor([1 + 2j]).conj()
    return {
        "quantised.zip.bin": ({"w": quantised}, {}, "torch._utils._rebuild_qtensor"),
        "sparse.zip.bin": ({"w": sparse}, {}, "torch._utils._rebuild_sparse_tensor"),
        "sparse.legacy.bin": ({"w": sparse}, legacy, "torch._utils._rebuild_sparse_tensor"),
        "meta.zip.bin": ({"w": torch.empty(2, device="meta")}, {}, "torch._utils._rebuild_meta_tensor_no_storage"),
        "whole_module.zip.bin": (nn.Linear(2, 2), {}, "torch.nn.modules.linear.Linear"),
        "whole_module.legacy.bin": (nn.Linear(2, 2), legacy, "torch.nn.modules.linear.Linear"),
        "attributes.zip.bin": ({"w": marked}, {}, "torch._tensor._rebuild_from_type_v2"),
        "conjugated.zip.bin": ({"w": conjugate}, {}, "saved conjugated"),
        "numpy_scalar.zip.bin": ({"w": some(2), "best": np.float64(1)}, {}, "numpy"),
        "one_tensor.zip.bin": (some(2), {}, "one tensor"),
        "no_tensors.zip.bin": ({"epoch": 3}, {}, "no tensors"),
        "bare_storage.zip.bin": ({"s": some(2).untyped_storage()}, {}, "no tensors"),
        "bits.zip.bin": ({"w": some(2).view(torch.bits8)}, {}, "torch.bits8"),
    }


def flatten(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], torch.Tensor]:
    """All tensors of a loaded object by path."""
    if isinstance(value, torch.Tensor):
        return {path: value.detach()}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {p: t for key, item in items for p, t in flatten(item, (*path, str(key))).items()}


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    """What a reader must find: geometry, the storage it shares, and a digest of the bytes in row-major order."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": tensor.storage_offset(),
        "storage_bytes": tensor.untyped_storage().nbytes(),
        "storage_sha256": hashlib.sha256(bytes(tensor.untyped_storage())).hexdigest(),
        "contiguous": tensor.is_contiguous(),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }


def expectation(path: Path) -> dict[str, Any]:
    """What torch.load makes of one of these files: its tensors by path, and which of them share a storage."""
    found = flatten(torch.load(path, weights_only=False))
    groups: dict[int, list[str]] = {}
    for where, tensor in found.items():
        groups.setdefault(tensor.untyped_storage()._cdata, []).append("\n".join(where))
    return {
        "tensors": [{"path": list(where), **describe(tensor)} for where, tensor in found.items()],
        "shared": sorted(group for group in groups.values() if len(group) > 1),
    }


def no_source(_: Any) -> None:
    """The legacy form saves a module's source and where it lies; it does without if there is none."""
    raise OSError("a fixture names no path of the machine that made it")


def main() -> None:
    """Write all files."""
    torch.serialization.get_source_lines_and_file = no_source
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # of what is experimental, and what is deprecated
    for path in HERE.glob("*.bin"):
        path.unlink()
    files = {}
    for name, (value, options) in read_files().items():
        torch.save(value, HERE / name, **options)
        files[name] = expectation(HERE / name)
    torch.serialization.set_crc32_options(False)
    torch.save(Tiny().state_dict(), HERE / "no_crc32.zip.bin")
    torch.serialization.set_crc32_options(True)
    files["no_crc32.zip.bin"] = expectation(HERE / "no_crc32.zip.bin")
    refused = {}
    for name, (value, options, words) in refused_files().items():
        torch.save(value, HERE / name, **options)
        refused[name] = words
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), HERE / "torchscript.zip.bin")
    refused["torchscript.zip.bin"] = "TorchScript"
    (HERE / "hostile.legacy.bin").write_bytes(hostile_legacy())
    refused["hostile.legacy.bin"] = "os.system"
    record = {"torch": torch.__version__, "read": files, "refused": refused}
    (HERE / "expected.json").write_text(json.dumps(record, indent=1) + "\n")


def hostile_legacy() -> bytes:
    """What runs a command when it is unpickled, after a preamble as torch writes it."""
    preamble = (torch.serialization.MAGIC_NUMBER, 1001, {"protocol_version": 1001, "little_endian": True})
    attack = b"\x80\x02}X\x01\x00\x00\x00wcos\nsystem\nX\x04\x00\x00\x00true\x85Rs."
    return b"".join(pickle.dumps(value, protocol=2) for value in preamble) + attack


if __name__ == "__main__":
    main()
