"""scripts/demo to its end, but for the environment that it makes itself at first use."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
from checkpoints import Weight, write_shard

ROOT = Path(__file__).parent.parent
TORCH_FIXTURES = ROOT / "tests" / "checkpoint" / "torch_fixtures"


def load_demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the script, as it is found in the checkout."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    loader = SourceFileLoader("demo", str(ROOT / "scripts" / "demo"))
    spec = importlib.util.spec_from_loader("demo", loader)
    assert spec is not None
    demo = importlib.util.module_from_spec(spec)
    loader.exec_module(demo)
    return demo


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_the_demo_comes_to_its_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], form: str
) -> None:
    """Plan, split, verify, load, merge and compare of a small checkpoint; nothing that it made is left."""
    source = tmp_path / "source"
    if form == "safetensors":
        source.mkdir()
        names = ["model.embed_tokens.weight", *(f"model.layers.{n}.mlp.up_proj.weight" for n in range(3))]
        write_shard(source / "model.safetensors", [Weight(name, "BF16", (64, 64)) for name in names])
    else:
        source = TORCH_FIXTURES / "module.zip.bin"
    demo = load_demo(monkeypatch)
    monkeypatch.setattr(demo.environment, "enter", lambda: None)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "argv", ["demo", str(source), "--dir", str(tmp_path / "work")])
    demo.main()
    assert "byte for byte" in capfd.readouterr().out
    assert not (tmp_path / "work").exists()
