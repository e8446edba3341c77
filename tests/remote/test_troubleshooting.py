"""docs/troubleshooting.md tells the truth: every command in it is run, and says what the page shows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from checkpoints import CAUSAL_CONFIG, llama_weights, write_checkpoint
from loopback_hub import MEMBER_TOKEN, LoopbackHub

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
MODELS = ("Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B", "my-org/secret-model")


class Example(NamedTuple):
    """A command of the page and the lines that the page shows of what it prints."""

    command: str
    shown: list[str]

    @property
    def fails(self) -> bool:
        return any(line.startswith("mmsplit: error") for line in self.shown)


def examples() -> list[Example]:
    found: list[Example] = []
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(Example(line[2:], []))
            elif line.strip():
                found[-1].shown.append(line)
    return found


@pytest.fixture
def example_hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """The three models of the page."""
    for name in MODELS:
        weights = [llama_weights(2, rows=2000, columns=100)]
        files = {"config.json": CAUSAL_CONFIG, "tokenizer.json": b"{}" * 100}
        write_checkpoint(tmp_path / "hub" / name, weights, files=files)
    with LoopbackHub(tmp_path / "hub", gated=MODELS[1:2], private=MODELS[2:]) as hub:
        yield hub


def ran(example: Example, hub: LoopbackHub, place: Path) -> tuple[int, str]:
    """Run a command as a shell would, the loopback Hub in the place of the real one and of its mirror."""
    words = shlex.split(example.command.replace("https://mirror.example", hub.endpoint))
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(place / "home")}
    while "=" in words[0] and words[0].partition("=")[0].isupper():
        name, _, value = words.pop(0).partition("=")
        variables[name] = value.replace("hf_yourTokenHere", MEMBER_TOKEN)
    assert words[0] == "mmsplit"
    result = subprocess.run(
        [sys.executable, "-m", *words],
        env={**os.environ, **variables},
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    said = result.stdout + result.stderr
    assert "Traceback" not in said
    host = hub.endpoint.removeprefix("http://")
    said = said.replace(hub.endpoint, "https://huggingface.co").replace(host, "huggingface.co")
    return result.returncode, said.replace(str(place / "home"), "…")


def test_every_command_of_the_page_does_what_it_shows(example_hub: LoopbackHub, tmp_path: Path) -> None:
    """One after the other, as a reader would; those that show an error end with 7, all others with 0."""
    place = tmp_path / "place"
    place.mkdir()
    page = examples()
    assert len(page) > 15
    for example in page:
        code, said = ran(example, example_hub, place)
        assert code == (7 if example.fails else 0), (example, said)
        for line in example.shown:
            assert line in said.splitlines(), (example.command, said)
