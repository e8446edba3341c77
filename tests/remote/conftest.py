"""A Hub on loopback for each test, and a process that knows no other: no token, no proxy, no cache of the user's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from loopback_fixtures import CONFIG, WEIGHTS, FakeClock, use_endpoint
from loopback_hub import LoopbackHub

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """huggingface_hub reads most variables when it is imported, so that its constants are what must be changed."""
    for name in (*_VARIABLES, *_PROXIES, *(name.lower() for name in _PROXIES)):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "HF_TOKEN_PATH": str(tmp_path / "home" / "token"),
        "HF_STORED_TOKENS_PATH": str(tmp_path / "home" / "stored_tokens"),
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    use_endpoint(monkeypatch, "http://127.0.0.1:9")  # nobody listens there: no test reaches the real Hub
    huggingface_hub.close_session()  # its client has read the proxies of the environment
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """org/model and its private, gated and xet-backed twins, and static/model.bin."""
    root = tmp_path / "hub"
    for name in ("model", "private", "gated", "xet"):
        folder = root / "org" / name
        (folder / "onnx").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(WEIGHTS)
        (folder / "config.json").write_bytes(CONFIG)
        (folder / "empty.txt").write_bytes(b"")
        (folder / "onnx" / "a b#%.onnx").write_bytes(WEIGHTS[:1000])
    (root / "static").mkdir()
    (root / "static" / "model.bin").write_bytes(WEIGHTS)
    with LoopbackHub(root, private=["org/private"], gated=["org/gated"], xet=["org/xet"]) as hub:
        yield hub


@pytest.fixture
def fake_clock() -> FakeClock:
    return FakeClock([])
