"""Makes the corpus that fuzzing begins with: `python tests/fuzz/make_corpus.py`.

It takes the fixtures of other tests, those that are small, and makes safetensors files and small models.
Files called `found-*` are what fuzzing found once; they stay as they are.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
CORPUS = Path(__file__).parent / "corpus"
#: Above this a fixture says nothing that smaller ones do not say.
_MOST_BYTES = 5000


def main() -> None:
    """Make everything anew but what was found."""
    for path in sorted(CORPUS.glob("*/*")):
        if not path.name.startswith("found-"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    fixtures = TESTS / "checkpoint"
    for path in sorted((fixtures / "torch_fixtures").glob("*.bin")):
        if path.stat().st_size <= _MOST_BYTES:
            _keep("torch", path.name, path.read_bytes())
    for path in sorted((fixtures / "gguf_fixtures").glob("*.gguf")):
        if path.stat().st_size <= _MOST_BYTES:
            _keep("gguf", path.name, path.read_bytes())
    _keep_safetensors()
    _keep_models()


def _keep(target: str, name: str, data: bytes) -> None:
    place = CORPUS / target / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)


def _keep_safetensors() -> None:
    from checkpoints import Weight, write_shard

    several = [
        Weight("a", "F32", (2, 3)),
        Weight("é.b", "BF16", (4,)),
        Weight("none", "I64", (0, 5)),
        Weight("c", "U8", ()),
    ]
    odd = [Weight("x", "F4", (2, 2)), Weight("y", "F8_E4M3", (3,)), Weight("z", "BOOL", (1,))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f")
        for name, weights, metadata, pad in (
            ("several", several, {"format": "pt"}, 0),
            ("odd", odd, None, 5),
            ("empty", [], {}, 0),
        ):
            write_shard(path, weights, metadata=metadata, pad=pad)
            _keep("safetensors", f"{name}.safetensors", path.read_bytes())
    index = {"metadata": {"total_size": 9}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    _keep("weights_index", "plain.json", json.dumps(index).encode())
    _keep("weights_index", "bin.json", json.dumps({"weight_map": {"é": "pytorch_model.bin"}}).encode())


def _keep_models() -> None:
    """The models that sets are made of: a set itself would have to be made anew with every change of its format."""
    from checkpoints import CAUSAL_CONFIG, llama_weights, write_checkpoint

    weights = llama_weights(1, rows=8, columns=8)
    files = {"config.json": CAUSAL_CONFIG, "one/tokens.txt": b"abc"}
    write_checkpoint(CORPUS / "set" / "plain", [weights[:2], weights[2:]], index=True, files=files)
    for form, name in (("gguf", "model.gguf"), ("torch", "pytorch_model.bin")):
        (CORPUS / "set" / form).mkdir()
        fixture = {"gguf": "shapes.gguf", "torch": "views.zip.bin"}[form]
        shutil.copy(CORPUS / form / fixture, CORPUS / "set" / form / name)


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    main()
