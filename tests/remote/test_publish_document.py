"""docs/publish.md tells the truth: the commands that it shows run, one after the other, against a loopback Hub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from checkpoints import CAUSAL_CONFIG, llama_weights, tree, write_checkpoint
from loopback_hub import MEMBER_TOKEN
from upload_hub import UploadHub

DOCUMENT = Path(__file__).parents[2] / "docs" / "publish.md"
WEB = "https://models.example.com"


def test_every_command_shown_runs(tmp_path: Path) -> None:
    """With another checkpoint, another root digest and another web server; everything else is as it stands there."""
    blocks = re.findall(r"```console\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    commands = re.findall(r"^\$ (mmsplit .*)$", "\n".join(blocks), re.MULTILINE)
    assert len(commands) >= 8
    write_checkpoint(tmp_path / "Llama-3.2-1B", [llama_weights(4)], files={"config.json": CAUSAL_CONFIG})
    (tmp_path / "hub" / "static").mkdir(parents=True)
    (tmp_path / "hub" / "static" / "llama-parts").symlink_to(tmp_path / "parts")
    with UploadHub(tmp_path / "hub") as hub:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": MEMBER_TOKEN,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
        }
        root = ""
        for command in commands:
            said = re.sub(r"sha256:[0-9a-f]{64}", root, command).replace(f"{WEB}/", hub.static_url(""))
            words = [sys.executable, "-m", *said.split()]
            ended = subprocess.run(
                words, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
            )
            assert ended.returncode == 0, f"{command}\n{ended.stderr}"
            found = re.search(r"root digest (sha256:[0-9a-f]{64})", ended.stdout)
            root = found[1] if found else root
    assert tree(tmp_path / "node1") == tree(tmp_path / "node0") == tree(tmp_path / "parts")
    assert tree(tmp_path / "merged") == tree(tmp_path / "Llama-3.2-1B")
