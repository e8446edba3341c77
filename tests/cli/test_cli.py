"""The command line: results on stdout, messages on stderr, one exit code per branch, never a traceback."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from safetensors.numpy import save_file

import mmsplit
from mmsplit.cli import run
from mmsplit.cli.app import GOES_ON, app

COMMANDS = app.list_commands(click.Context(app))
TINY = {
    "model.embed_tokens.weight": np.arange(64, dtype=np.float32).reshape(16, 4),
    "model.layers.0.mlp.weight": np.ones((8, 4), np.float32),
    "model.layers.1.mlp.weight": np.zeros((8, 4), np.float32),
    "model.norm.weight": np.ones(4, np.float32),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of four layers with a tied head."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    save_file(TINY, directory / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "num_hidden_layers": 2}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def partition_set(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint in two partitions."""
    assert run(["split", str(checkpoint), "-o", str(tmp_path / "set"), "-n", "2"]) == 0
    return tmp_path / "set"


def test_plan_json_is_the_contract(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`plan --json` has the keys that others build on, and every tensor is in it."""
    assert run(["plan", str(checkpoint), "--num-parts", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_parts"] == 2
    assert [part["part_id"] for part in plan["partitions"]] == [0, 1]
    tensors = [name for part in plan["partitions"] for layer in part["layers"] for name in layer["tensors"]]
    assert sorted(set(tensors)) == sorted(TINY)
    for part in plan["partitions"]:
        assert part["total_bytes"] == sum(layer["total_bytes"] for layer in part["layers"])
        assert part["total_params"] == sum(layer["total_params"] for layer in part["layers"])
        assert all(layer["name"] and layer["layer_type"] for layer in part["layers"])
    assert any("own copy" in note for note in plan["notes"])


def test_inspect_json_is_the_contract(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`inspect --json` of a checkpoint counts tensors, parameters and bytes and lists the layers."""
    assert run(["inspect", str(checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"] == len(TINY)
    assert found["total_params"] == sum(array.size for array in TINY.values())
    assert found["total_bytes"] == sum(array.nbytes for array in TINY.values())
    assert [layer["name"] for layer in found["layers"]] == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
    ]
    assert found["notes"] == []


def test_verify_json_is_the_contract(partition_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`verify --json` says ok, or lists every problem with partition, tensor, start, stop and what; exit code 5."""
    assert run(["verify", str(partition_set), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    payload = partition_set / "partition_1.bin"
    data = bytearray(payload.read_bytes())
    data[4096 + 5] ^= 1
    payload.write_bytes(data)
    assert run(["verify", str(partition_set), "--json"]) == 5
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    (problem,) = report["problems"]
    assert {"partition", "tensor", "start", "stop", "what"} <= set(problem)
    assert (problem["partition"], problem["start"]) == (1, 4096)


@pytest.mark.parametrize("command", ["inspect", "plan", "split", "verify", "merge"])
def test_results_are_on_stdout_and_json(
    command: str, checkpoint: Path, partition_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command prints its result on stdout, and with --json nothing but JSON."""
    words = {
        "inspect": ["inspect", str(partition_set)],
        "plan": ["plan", str(checkpoint), "-n", "2"],
        "split": ["split", str(checkpoint), "-n", "2", "-o"],
        "verify": ["verify", str(partition_set)],
        "merge": ["merge", str(partition_set), "-o"],
    }[command]
    needs_output = words[-1] == "-o"
    capsys.readouterr()
    assert run([*words, *([str(tmp_path / "a")] if needs_output else [])]) == 0
    assert capsys.readouterr().out.strip()
    assert run([*words, *([str(tmp_path / "b")] if needs_output else []), "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["plan", "SOURCE", "-n", "0"], 2, "1 to 5 partitions"),
        (["plan", "SOURCE", "-n", "-3"], 2, "1 to 5 partitions"),
        (["plan", "SOURCE", "-n", "99"], 2, "1 to 5 partitions"),
        (["plan", "SOURCE"], 2, "into how many"),
        (["plan", "SOURCE", "--boundaries", "model.layers.9"], 2, "Close are"),
        (["plan", "SOURCE", "--weights", "1,x"], 2, "not a positive number"),
        (["plan", "SOURCE", "-n", "x"], 2, "not a valid integer"),
        (["split", "SOURCE", "-n", "2"], 2, "--output"),
        (["split", "SOURCE", "-n", "2", "-o", "OUT", "--resume", "--force"], 2, "exclude each other"),
        (["split", "SOURCE", "-n", "2", "-o", "OUT", "--codec", "lzma"], 2, "lzma"),
        (["nope"], 2, "nope"),
        (["plan", "MISSING", "-n", "2"], 3, "no such file"),
        (["plan", "EMPTY", "-n", "2"], 3, "no .safetensors"),
        (["plan", "CUT", "-n", "2"], 3, "shorter than its header"),
        (["verify", "EMPTY"], 4, "no partition set here"),
        (["merge", "EMPTY", "-o", "OUT"], 4, "no partition set here"),
        (["verify", "MISSING"], 4, "no such file"),
        (["merge", "LACKING", "-o", "OUT"], 5, "partition 1 is not here"),
        (["split", "SOURCE", "-n", "2", "-o", "SET"], 6, "--resume"),
        (["split", "SOURCE", "-n", "2", "-o", "FILE"], 6, "not a directory"),
    ],
)
def test_exit_codes_and_messages(
    words: list[str],
    code: int,
    says: str,
    checkpoint: Path,
    partition_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each kind of bad input ends in one clear message on stderr and the exit code of its branch."""
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "CUT").mkdir()
    (tmp_path / "CUT" / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-1])
    (tmp_path / "FILE").write_text("")
    lacking = tmp_path / "LACKING"
    lacking.mkdir()
    for path in partition_set.iterdir():
        if path.is_file() and not path.name.startswith("partition_1."):
            (lacking / path.name).write_bytes(path.read_bytes())
    places = {"SOURCE": checkpoint, "SET": partition_set, "OUT": tmp_path / "OUT", "MISSING": tmp_path / "MISSING"}
    places |= {name: tmp_path / name for name in ("EMPTY", "CUT", "FILE", "LACKING")}
    capsys.readouterr()
    assert run([str(places.get(word, word)) for word in words]) == code
    output = capsys.readouterr()
    assert says in output.err
    assert "Traceback" not in output.err
    assert output.out == ""


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --debug, wherever it stands, the traceback comes before the message; the exit code is the same."""
    assert run(["plan", str(tmp_path / "missing"), "-n", "2", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_result_that_cannot_be_written(checkpoint: Path) -> None:
    """A full disk behind stdout is an output error, not a bug of ours; a closed stdout is nobody's fault."""
    command = f'"{sys.executable}" -m mmsplit inspect "{checkpoint}"'
    full = subprocess.run(f"{command} >/dev/full", shell=True, capture_output=True, text=True, check=False)
    assert full.returncode == 6
    assert "the result: No space left" in full.stderr
    closed = subprocess.run(f"{command} >&-", shell=True, capture_output=True, text=True, check=False)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_a_terminal_without_our_characters(checkpoint: Path) -> None:
    """Where the encoding lacks a character its code is shown; nothing fails."""
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    words = [sys.executable, "-m", "mmsplit", "plan", str(checkpoint), "-n", "2"]
    result = subprocess.run(words, capture_output=True, env=environment, check=False)
    assert result.returncode == 0


def test_names_of_strangers_do_not_reach_the_terminal_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences and line ends in tensor names are shown as codes, and long names are cut."""
    names = ["a\x1b[31mred.weight", "b\nb.weight", "c" * 5000]
    save_file({name: np.ones(2, np.float32) for name in names}, tmp_path / "model.safetensors")
    for words in (["inspect", "--layers"], ["plan", "-n", "3"]):
        assert run([words[0], str(tmp_path), *words[1:]]) == 0
        output = capsys.readouterr()
        assert "\x1b" not in output.out + output.err
        assert max(map(len, output.out.splitlines())) < 400


def test_an_empty_path_is_no_path(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unset shell variable must not mean the current directory."""
    assert run(["split", str(checkpoint), "-o", "", "-n", "2"]) == 2
    assert run(["plan", "", "-n", "2"]) == 2
    assert "the path is empty" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error(checkpoint: Path) -> None:
    """`mmsplit inspect … | head -1` ends quietly and well, also under pipefail."""
    command = (
        f'"{sys.executable}" -m mmsplit inspect --layers "{checkpoint}" | head -n 1 >/dev/null; exit ${{PIPESTATUS[0]}}'
    )
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupt_is_clean(checkpoint: Path, tmp_path: Path) -> None:
    """Ctrl-C during a split: exit code 130, one line, no manifest; --resume finishes."""
    program = (
        "import os, signal, sys\n"
        "from mmsplit.cli import run\n"
        "from mmsplit.sidecar import payload_writer\n"
        "place = payload_writer.PayloadWriter.place\n"
        "def interrupted(self, *arguments):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return place(self, *arguments)\n"
        "payload_writer.PayloadWriter.place = interrupted\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    words = ["split", str(checkpoint), "-o", str(tmp_path / "out"), "-n", "2"]
    result = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 128 + signal.SIGINT
    assert "--resume" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "partition_set.json").exists()
    assert run([*words, "--resume"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupted_command_says_how_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """Only what has --resume is told to use it."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    assert command in GOES_ON
    loaded = app.get_command(click.Context(app), command)
    assert loaded is not None
    monkeypatch.setattr(loaded, "invoke", interrupted)
    monkeypatch.setattr(loaded, "make_context", lambda *_, **__: click.Context(loaded))
    assert run([command]) == 130
    said = capsys.readouterr().err
    assert "interrupted. " in said
    assert ("--resume" in said) == any("--resume" in option.opts for option in loaded.params)


@pytest.mark.parametrize(("answer", "code", "word"), [("n\n", 0, "not run"), ("", 130, "nothing done")])
def test_who_does_not_want_so_much_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str, code: int, word: str
) -> None:
    """No is an answer and no error; no answer at all ends it like Ctrl-C."""
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    assert run(["bench", "--sample-gb", "500"]) == code
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], ["split", "--help"]])
def test_help_needs_no_numpy(words: list[str]) -> None:
    """Help and version answer without loading what only work needs."""
    program = "import sys\nfrom mmsplit.cli import run\nassert run(sys.argv[1:]) == 0\n"
    program += "assert 'huggingface_hub' not in sys.modules\n"
    if words[0] != "split":
        program += "assert 'numpy' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", program, *words], check=True, capture_output=True)


def test_importing_mmsplit_loads_nothing() -> None:
    """`import mmsplit` loads no other module of the package and no dependency."""
    program = (
        "import sys\nimport mmsplit\n"
        "assert not [m for m in sys.modules if m.startswith('mmsplit.') or m in ('numpy', 'click', 'zstandard')]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_verify_of_partitions_made_one_at_a_time(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a node has is verified by the directory's name, too; that the set manifest is not there goes to stderr."""
    node = str(tmp_path / "node-1")
    assert run(["split", str(checkpoint), "-o", node, "-n", "2", "--only", "1"]) == 0
    capsys.readouterr()
    assert run(["verify", node]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ok: 1 partition(s), ")
    assert "partition_set.json is not here: partition 1 of 2 verified, each by itself" in err
    assert run(["verify", node, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["single_partitions"] == {"part_ids": [1], "num_parts": 2}
    assert run(["verify", node, "--root", "sha256:" + "0" * 64]) != 0


def test_the_same_option_is_the_same_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    """What several commands take has one range, and defaults stand in plain brackets."""
    ranges = set()
    for command in COMMANDS:
        assert run([command, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "[default: (" not in text, command
        ranges |= set(re.findall(r"--connections INTEGER RANGE .*?(1 ?<= ?x ?<= ?\d+)", text))
        assert "--token" not in text or "better put into HF_TOKEN" in text, command
    assert len(ranges) == 1


def test_reprs_are_short(checkpoint: Path, tmp_path: Path) -> None:
    """Of what a session at the prompt shows."""
    planned = mmsplit.plan(checkpoint, 2)
    mmsplit.split(checkpoint, tmp_path / "set", 2)
    with mmsplit.open_partition(tmp_path / "set" / "partition_0.json") as part:
        for shown in (planned, planned.partitions[0], part.layers[0]):
            assert len(repr(shown)) < 120
            assert repr(shown).startswith(f"<{type(shown).__name__} ")
